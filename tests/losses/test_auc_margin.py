"""The AUC margin loss: its saddle is the loss over all pairs, and the known faults of others are caught."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plywise.data.digits import load_digits
from plywise.losses.auc_margin import AUCMargin
from plywise.losses.spauc import roc_auc
from plywise.optim import ProximalAnchor


def batch(n: int = 40, positives: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores, torch.arange(n) < positives


def pairwise(scores: Tensor, y: Tensor, margin: float) -> Tensor:
    """The slow definition: all pairs, one by one."""
    pairs = [(margin - (up - down)) ** 2 for up in scores[y] for down in scores[~y]]
    return torch.stack(pairs).mean()


def saddle(scores: Tensor, y: Tensor, **settings: float) -> AUCMargin:
    loss = AUCMargin(**settings).double()
    loss.settle(scores, y)
    return loss


def trained(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], loss: AUCMargin) -> AUCMargin:
    """``loss`` after many steps of its own parameters on fixed scores."""
    scores, y = batch()
    optimizer = make(list(loss.parameters()))
    for _ in range(500):
        optimizer.zero_grad()
        loss(scores, y).backward()
        optimizer.step()
    return loss


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "one group each": lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1, foreach=True),
}


# What follows asks something of a loss(scores, y, a, b, alpha, margin). Ours passes, faulty ones do not.

Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def ours(scores: Tensor, y: Tensor, a: Tensor, b: Tensor, alpha: Tensor, margin: float) -> Tensor:
    loss = AUCMargin(margin, floor=-math.inf).double()
    for mine, given in ((loss.a, a), (loss.b, b), (loss.alpha, alpha)):
        mine.data.copy_(given)
    return loss(scores, y)


def misplaced_parenthesis(
    scores: Tensor, y: Tensor, a: Tensor, b: Tensor, alpha: Tensor, margin: float
) -> Tensor:
    """A mean over all of (the negatives' scores minus the mean of positives): the class mean is too small."""
    inner = torch.where(y, 0.0, scores) - scores[y].mean()
    squares = (scores[y] - a).square().mean() + (scores[~y] - b).square().mean()
    return squares + 2 * alpha * (margin + inner.mean()) - alpha.square()


def nonzero_means(scores: Tensor, y: Tensor, a: Tensor, b: Tensor, alpha: Tensor, margin: float) -> Tensor:
    """Class means as a sum over the number of terms that are not zero."""

    def mean(terms: Tensor) -> Tensor:
        return terms.sum() / torch.count_nonzero(terms)

    squares = mean((scores - a).square() * y) + mean((scores - b).square() * ~y)
    gap = mean(scores * ~y) - mean(scores * y)
    return squares + 2 * alpha * (margin + gap) - alpha.square()


def check_saddle_is_pairwise(formula: Formula, margin: float = 1.0) -> None:
    scores, y = batch()
    scores.requires_grad_(True)
    slow = pairwise(scores, y, margin)
    a, b = scores[y].mean().detach(), scores[~y].mean().detach()
    value = formula(scores, y, a, b, margin + b - a, margin)
    torch.testing.assert_close(value, slow, rtol=1e-13, atol=0)
    (mine,), (theirs,) = torch.autograd.grad(value, scores), torch.autograd.grad(slow, scores)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def check_scores_equal_to_a(formula: Formula) -> None:
    scores, y = torch.tensor([0.5, 0.1, -0.2, 0.0], dtype=torch.float64), torch.tensor([1, 0, 0, 0]) == 1
    a, b, alpha = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 0.0, 0.25))
    wanted = (0.01 + 0.04) / 3 + 0.5 * (1 - 0.1 / 3 - 0.5) - 0.0625  # by hand
    torch.testing.assert_close(formula(scores, y, a, b, alpha, 1.0).item(), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("margin", [0.3, 1.0, 4.0])
def test_the_saddle_is_the_loss_over_all_pairs(margin):
    check_saddle_is_pairwise(ours, margin)


def test_a_score_may_equal_a():
    check_scores_equal_to_a(ours)


@pytest.mark.parametrize(
    ("check", "faulty"),
    [(check_saddle_is_pairwise, misplaced_parenthesis), (check_scores_equal_to_a, nonzero_means)],
)
def test_known_faults_are_caught(check, faulty):
    with pytest.raises(AssertionError):
        check(faulty)


def test_the_nonzero_count_is_nan_and_ours_is_not():
    scores, y = torch.tensor([0.5, 0.1], dtype=torch.float64), torch.tensor([True, False])
    a, b, alpha = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 0.0, 0.25))
    assert nonzero_means(scores, y, a, b, alpha, 1.0).isnan()
    assert ours(scores, y, a, b, alpha, 1.0).isfinite()


@pytest.mark.parametrize("share", [None, 0.3])
def test_the_paper_s_formula_up_to_its_scale(share):
    """v1: means over the whole batch, weighted by p and 1−p; it is p(1−p) times ours."""
    scores, y = batch()
    loss = AUCMargin(1.5, positive_share=share, floor=-math.inf).double()
    values = {"a": 0.3, "b": -0.2, "alpha": 0.7}
    with torch.no_grad():
        for name, value in values.items():
            getattr(loss, name).fill_(value)
    p = share or float(y.double().mean())
    a, b, alpha = values.values()
    first = (1 - p) * ((scores - a).square() * y).mean() + p * ((scores - b).square() * ~y).mean()
    cross = p * (1 - p) * 1.5 + (p * scores * ~y - (1 - p) * scores * y).mean()
    v1 = first + 2 * alpha * cross - p * (1 - p) * alpha**2
    torch.testing.assert_close(p * (1 - p) * loss(scores, y), v1, rtol=1e-13, atol=0)


def test_with_a_share_the_mean_over_batches_is_the_loss_of_the_data():
    scores, y = batch(40, 8)
    loss = AUCMargin(positive_share=0.2).double()
    with torch.no_grad():
        loss.a.fill_(0.5), loss.b.fill_(-0.5), loss.alpha.fill_(0.25)
    parts = [loss(s, t) for s, t in zip(scores.split(5), y.split(5), strict=True)]  # most have no positive
    whole = loss(scores, y)
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-13, atol=0)
    own = AUCMargin().double()
    own.load_state_dict(loss.state_dict())
    torch.testing.assert_close(own(scores, y), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("floor", [0.0, -math.inf])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4, 5.0])
def test_with_alpha_settled_the_loss_is_never_negative(shift, floor):
    scores, y = batch()
    scores = scores + shift * y
    loss = saddle(scores, y, floor=floor)
    value = loss(scores, y).item()
    gap = (1.0 + scores[~y].mean() - scores[y].mean()).item()
    spread = (scores[y].var(correction=0) + scores[~y].var(correction=0)).item()
    missing = gap if floor else max(gap, 0.0)
    assert value >= 0
    assert value == pytest.approx(spread + missing**2, rel=1e-12)  # a hinge where α stays at or above 0
    assert loss.alpha.item() == pytest.approx(missing, rel=1e-12, abs=1e-15)


def test_a_constant_added_to_all_scores_moves_a_and_b_only():
    scores, y = batch()
    first, second = saddle(scores, y), saddle(scores + 100.0, y)
    assert second.a.item() == pytest.approx(first.a.item() + 100)
    assert second.b.item() == pytest.approx(first.b.item() + 100)
    assert second.alpha.item() == pytest.approx(first.alpha.item())
    assert second(scores + 100.0, y).item() == pytest.approx(first(scores, y).item())


def test_at_the_saddle_all_three_stand_still():
    scores, y = batch()
    loss = saddle(scores, y)
    loss(scores, y).backward()
    for parameter in loss.parameters():
        assert parameter.grad.abs().item() < 1e-15


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("floor", [0.0, -math.inf])
def test_any_optimizer_finds_the_saddle(optimizer, floor):
    scores, y = batch()
    wanted = saddle(scores, y, floor=floor)
    loss = trained(OPTIMIZERS[optimizer], AUCMargin(floor=floor).double())
    for mine, theirs in zip(loss.parameters(), wanted.parameters(), strict=True):
        assert mine.item() == pytest.approx(theirs.item(), abs=1e-3)


def test_a_step_of_alpha_ascends():
    scores, y = batch()
    loss = AUCMargin().double()
    before = loss(scores, y)
    derivative = 2 * (1.0 + scores[~y].mean() - scores[y].mean())
    before.backward()
    assert loss.alpha.grad.item() == pytest.approx(-derivative.item())
    torch.optim.SGD([loss.alpha], lr=0.01).step()
    assert loss.alpha.item() == pytest.approx(0.01 * derivative.item())
    assert loss(scores, y) > before


def test_a_dual_that_descends_is_caught():
    """What F without the turned sign would do in one group with the weights: α runs to its floor."""
    scores, y = batch()
    loss = AUCMargin().double()
    loss.alpha.register_hook(torch.neg)
    trained(OPTIMIZERS["SGD"], loss)
    assert loss.alpha.item() <= 0
    assert abs(loss.alpha.item() - saddle(scores, y).alpha.item()) > 0.1


def test_alpha_is_moved_up_to_the_floor_and_earlier_graphs_stay():
    scores, y = batch()
    scores = scores + 5.0 * y  # class means further apart than the margin: α wants to be negative
    loss = saddle(scores - 5.0 * y, y)
    one, two = loss(scores, y), loss(scores, y)  # two micro-batches, one step
    (one + two).backward()
    torch.optim.SGD(loss.parameters(), lr=1.0).step()
    assert loss.alpha.item() < 0
    loss(scores, y)
    assert loss.alpha.item() == 0
    loss.floor = -0.5
    with torch.no_grad():
        loss.alpha.fill_(-3.0)
    loss(scores, y)
    assert loss.alpha.item() == -0.5


def test_derivatives_by_scores_a_and_b():
    scores, y = batch(12, 3)
    loss = AUCMargin().double()

    def value(scores: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"a": a, "b": b}, (scores, y))

    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.4))
    assert torch.autograd.gradcheck(value, (scores.requires_grad_(True), a, b))
    assert torch.autograd.gradgradcheck(value, (scores, a, b))


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
@pytest.mark.parametrize("labels", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_shapes_and_kinds_of_labels_are_one(shape, labels):
    scores, y = batch()
    wanted = saddle(scores, y)(scores, y)
    assert torch.equal(saddle(scores, y)(scores.view(shape), y.to(labels)), wanted)
    assert torch.equal(saddle(scores, y)(scores, y.to(labels).view(shape)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_scores_are_summed_in_float32(dtype):
    scores, y = batch(4000, 9)
    low = scores.to(dtype).requires_grad_(True)
    loss = AUCMargin()
    loss.settle(low, y)
    value = loss(low, y)
    value.backward()
    assert value.dtype == torch.float32
    assert low.grad.dtype == dtype
    exact = saddle(low.detach().double(), y)(low.detach().double(), y)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "y", "words"),
    [
        (torch.zeros(4, 2), torch.zeros(4), r"\(4, 2\)"),
        (torch.zeros(4, 1), torch.zeros(1, 4), r"\(1, 4\)"),
        (torch.zeros(4), torch.zeros(3), r"\(3,\)"),
        (torch.zeros(0), torch.zeros(0), r"\(0,\)"),
        (torch.zeros(()), torch.zeros(()), "a score and a label"),
        (torch.zeros(4), torch.tensor([-1, 1, -1, 1]), "2 of 4 labels.*write y > 0"),
        (torch.zeros(4), torch.tensor([0.0, 1.0, 0.5, math.nan]), "2 of 4 labels"),
        (torch.zeros(4), torch.zeros(4), "0 of 4 samples are positive.*positive_share"),
        (torch.zeros(4), torch.ones(4), "4 of 4 samples are positive"),
    ],
)
def test_wrong_batches_are_refused(scores, y, words):
    with pytest.raises(ValueError, match=words):
        AUCMargin()(scores, y)
    with pytest.raises(ValueError, match=words):
        AUCMargin().settle(scores, y)


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": 0.0},
        {"margin": math.nan},
        {"positive_share": 0.0},
        {"positive_share": 1.0},
        {"positive_share": math.nan},
        {"floor": math.inf},
        {"floor": math.nan},
    ],
)
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"AUCMargin: {name} must"):
        AUCMargin(**wrong)


def test_state_and_copies():
    scores, y = batch()
    loss = trained(OPTIMIZERS["Adam"], AUCMargin().double())
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = AUCMargin().double()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(scores, y), loss(scores, y))
    assert torch.equal(copy.deepcopy(loss)(scores, y), loss(scores, y))
    assert "margin=1.0" in repr(loss)


def rare(digit: int = 8, positives: int = 25) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits, one of which is rare in training: inputs and labels, of training and of test."""
    train, _, test = load_digits()
    y = train.y == digit
    kept = ~y | (y.cumsum(0) <= positives)
    return train.x[kept], y[kept], test.x, test.y == digit


@pytest.mark.parametrize("share", [None, "known"])
def test_a_network_learns_a_rare_digit(share):
    x, y, x_test, y_test = rare()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    loss = AUCMargin(positive_share=share and y.float().mean().item())
    params = [*model.parameters(), loss.a, loss.b]
    optimizer = torch.optim.SGD([*params, loss.alpha], lr=0.1)
    anchor = ProximalAnchor(params)  # as PESG does
    before = roc_auc(model(x_test).detach().flatten(), y_test)
    for step in range(150):
        rows = torch.randint(len(y), (256,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        anchor.add_gradient(0.002)
        optimizer.step()
        anchor.accumulate()
        if step == 75:
            anchor.refresh_to_average()
    after = roc_auc(model(x_test).detach().flatten(), y_test)
    assert before < 0.8
    assert after > 0.95
    assert loss.a > loss.b
