"""Cascaded Forward against its definition, in float64: sums, solutions, statistics, predictions."""

import io
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from closeness import close, normal_equations_error
from torch import Tensor, nn

import plywise as pw
from plywise.data.digits import load_digits
from plywise.local.cascaded_forward import GradientHead, RidgeHead, cafo_blocks
from plywise.local.component import Signal

CLASSES = 3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def images(n: int = 50) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 6, 6), torch.arange(n) % CLASSES


def plain_blocks(x: Tensor) -> pw.Blocks:
    modules = [
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 5, 2), nn.ReLU(), nn.MaxPool2d(3)),
    ]
    return pw.Blocks(modules, x)


def normed_blocks(x: Tensor, momentum: float | None = None) -> pw.Blocks:
    modules = [
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, momentum=momentum)),
        nn.Sequential(nn.Conv2d(4, 5, 2), nn.ReLU(), nn.BatchNorm2d(5, momentum=momentum)),
    ]
    return pw.Blocks(modules, x)


def adam(groups):
    return torch.optim.Adam(groups, lr=1e-2, eps=1e-4)


def train(learner, x: Tensor, y: Tensor, sizes=(16, 16, 16, 2)) -> list[Tensor]:
    """One epoch; the last batch is an odd one."""
    return [learner.step(*batch) for batch in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)]


def heads(learner) -> list[RidgeHead]:
    return [trainer.component.head for trainer in learner.trainers]


def solutions(learner) -> list[Tensor]:
    return [head.solution().clone() for head in heads(learner)]


def features(blocks: pw.Blocks, x: Tensor) -> list[Tensor]:
    made = []
    with torch.no_grad():
        for block in blocks:
            x = block(x)
            made.append(x)
    return made


def flat_state(learner) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value.clone()
        for number, trainer in enumerate(learner.trainers)
        for name, value in trainer.component.state_dict().items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("ridge", [1e-2, 1e-6, 3.0])
def test_ridge_solves_the_normal_equations_of_all_batches(ridge):
    x, y = images()
    blocks = plain_blocks(x)
    learner = pw.CascadedForward(blocks, CLASSES, head=partial(RidgeHead, ridge=ridge))
    train(learner, x, y)
    for made, W in zip(features(blocks, x), solutions(learner), strict=True):
        assert W.shape == (made[0].numel(), CLASSES)
        assert normal_equations_error(made.flatten(1), y, W, ridge) < 1e-12


def test_order_and_size_of_batches_do_not_matter():
    x, y = images()
    blocks = plain_blocks(x)
    expected = None
    for sizes, order in [
        ((16, 16, 16, 2), torch.arange(50)),
        ((16, 16, 16, 2), torch.randperm(50)),
        ((50,), torch.arange(50)),
        ((1,) * 50, torch.arange(50).flip(0)),
    ]:
        learner = pw.CascadedForward(blocks, CLASSES)
        train(learner, x[order], y[order], sizes)
        if expected is None:
            expected = solutions(learner)
        assert all(close(W, E) for W, E in zip(solutions(learner), expected, strict=True))


@pytest.mark.parametrize("make", [plain_blocks, partial(normed_blocks, momentum=0.0)])
def test_a_second_epoch_changes_nothing(make):
    """Without batch norm, or with one whose statistics stand still."""
    x, y = images()
    learner = pw.CascadedForward(make(x), CLASSES)
    train(learner, x, y)
    once = solutions(learner)
    for _ in range(2):
        train(learner, x, y)
    assert all(close(W, E) for W, E in zip(solutions(learner), once, strict=True))
    train(learner, x, y.roll(1))  # other data does change it
    assert not any(close(W, E, 1e-3) for W, E in zip(solutions(learner), once, strict=True))


def test_batch_norm_uses_the_statistics_of_all_batches_up_to_each():
    """By hand: a batch is normalised by the mean over the statistics of all batches so far."""
    x, y = images()
    blocks = normed_blocks(x)
    learner = pw.CascadedForward(blocks, CLASSES)
    train(learner, x, y)
    below = x
    for block, W in zip(blocks, solutions(learner), strict=True):
        with torch.no_grad():
            raw = block[:2](below).split([16, 16, 16, 2])
        means = torch.stack([part.mean((0, 2, 3)) for part in raw])
        variances = torch.stack([part.var((0, 2, 3)) for part in raw])
        counts = torch.arange(1, 5)[:, None]
        mean, variance = means.cumsum(0) / counts, variances.cumsum(0) / counts
        made = [
            (part - m[:, None, None]) / (v[:, None, None] + block[2].eps).sqrt()
            for part, m, v in zip(raw, mean, variance, strict=True)
        ]
        below = torch.cat(made)
        assert normal_equations_error(below.flatten(1), y, W, 1e-2) < 1e-10
        assert close(block[2].running_mean, mean[-1])
        assert close(block[2].running_var, variance[-1])
        assert int(block[2].num_batches_tracked) == 4


@pytest.mark.parametrize("head", [RidgeHead, GradientHead])
def test_prediction_is_the_sum_of_softmaxes(head):
    x, y = images()
    blocks = normed_blocks(x)
    learner = pw.CascadedForward(blocks, CLASSES, head=head, optimizer=adam)
    train(learner, x, y)
    new = torch.randn(7, 2, 6, 6)
    for block in blocks:
        block.eval()
    scores = []
    for made, reader in zip(features(blocks, new), heads(learner), strict=True):
        W = reader.solution() if head is RidgeHead else reader.linear.weight.T
        scores.append((made.flatten(1) @ W).softmax(1))
    for block in blocks:
        block.train()
    assert close(learner.predict(new), sum(scores).detach(), 1e-13)
    assert all(block.training for block in blocks)
    assert close(learner.as_module(depth=1).eval()(new), scores[0], 1e-13)


def test_export_holds_a_ridge_heads_weights_of_the_moment():
    x, y = images()
    learner = pw.CascadedForward(plain_blocks(x), CLASSES)
    train(learner, x, y)
    module = learner.as_module()
    before = module(x)
    train(learner, x, y.roll(1))
    assert torch.equal(module(x), before)
    assert not close(learner.predict(x), before, 1e-3)
    assert not any(p.requires_grad for head in module.heads for p in head.parameters())


def test_export_shares_a_gradient_heads_weights():
    x, y = images()
    learner = pw.CascadedForward(plain_blocks(x), CLASSES, head=GradientHead, optimizer=adam)
    module = learner.as_module()
    train(learner, x, y)
    assert torch.equal(module(x), learner.predict(x))


def test_before_any_data_all_classes_are_alike():
    x, _ = images()
    learner = pw.CascadedForward(plain_blocks(x), CLASSES)
    assert close(learner.predict(x), torch.full((len(x), CLASSES), 2 / CLASSES), 1e-14)


@pytest.mark.parametrize("head", [RidgeHead, GradientHead])
def test_prediction_of_a_row_does_not_depend_on_its_batch(head):
    x, y = images()
    learner = pw.CascadedForward(normed_blocks(x), CLASSES, head=head, optimizer=adam)
    train(learner, x, y)
    state = flat_state(learner)
    new = 5 * torch.randn(9, 2, 6, 6) + 3  # far from the training data's statistics
    together = learner.predict(new)
    alone = torch.cat([learner.predict(row) for row in new.split(1)])
    assert close(alone, together, 1e-12)
    assert same(flat_state(learner), state)


def test_only_training_batches_enter_the_sums():
    x, y = images()
    learner = pw.CascadedForward(normed_blocks(x), CLASSES)
    train(learner, x, y)
    state, component = flat_state(learner), learner.trainers[0].component
    component.eval()
    _, loss = component(Signal(x + 1, y))
    assert loss > 0
    assert same(flat_state(learner), state)


def test_a_head_does_not_depend_on_later_blocks():
    x, y = images()
    first = normed_blocks(x)[0]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        later = nn.Sequential(nn.Conv2d(4, 3 + seed, 2), nn.Dropout(0.5), nn.BatchNorm2d(3 + seed))
        blocks = pw.Blocks([first, later], x)
        first[2].reset_running_stats()
        learner = pw.CascadedForward(blocks, CLASSES)
        train(learner, x, y)
        found.append(learner.trainers[0].component.state_dict())
    assert same(*found)


@pytest.mark.parametrize("rule", [None, pw.NLMS])
@pytest.mark.parametrize("head", [RidgeHead, GradientHead])
def test_blocks_stay_as_they_are_and_build_no_graph(head, rule):
    x, y = images()
    blocks = plain_blocks(x)
    next(blocks[0].parameters()).requires_grad_(False)
    before = [[p.clone() for p in block.parameters()] for block in blocks]
    flags = [[p.requires_grad for p in block.parameters()] for block in blocks]
    graphs = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    learner = pw.CascadedForward(blocks, CLASSES, head=head, optimizer=adam, rule=rule)
    train(learner, x, y)
    assert graphs == [False] * len(graphs)
    assert len(graphs) >= 8
    for block, values, wanted in zip(blocks, before, flags, strict=True):
        assert all(torch.equal(p, value) for p, value in zip(block.parameters(), values, strict=True))
        assert [p.requires_grad for p in block.parameters()] == wanted
        assert all(p.grad is None for p in block.parameters())
    optimized = {
        id(p)
        for t in learner.trainers
        if t.optimizer
        for group in t.optimizer.param_groups
        for p in group["params"]
    }
    assert not optimized & {id(p) for block in blocks for p in block.parameters()}
    assert len(optimized) == (2 if head is GradientHead else 0)


def test_gradient_heads_learn_as_linear_layers_on_the_features():
    x, y = images()
    blocks = plain_blocks(x)
    learner = pw.CascadedForward(blocks, CLASSES, head=GradientHead, optimizer=adam)
    made = [part.flatten(1) for part in features(blocks, x)]
    weights = [trainer.component.head.linear.weight.detach().clone() for trainer in learner.trainers]
    losses = train(learner, x, y)
    for number, (rows, weight) in enumerate(zip(made, weights, strict=True)):
        weight.requires_grad_()
        optimizer = adam([weight])
        for step, batch in enumerate(torch.arange(50).split([16, 16, 16, 2])):
            loss = F.cross_entropy(rows[batch] @ weight.T, y[batch])
            assert close(losses[step][number], loss.detach(), 1e-12)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert close(learner.trainers[number].component.head.linear.weight, weight, 1e-9)


@pytest.mark.parametrize("head", [RidgeHead, GradientHead])
def test_resumes_bit_for_bit(head):
    x, y = images()

    def make():
        torch.manual_seed(3)
        return pw.CascadedForward(normed_blocks(x), CLASSES, head=head, optimizer=adam)

    whole = make()
    train(whole, x, y)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.step(x, y)
    resumed.predict(x)  # solves: what it remembers of that must go
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.predict(x), whole.predict(x))
    for left, right in zip(train(whole, x + 1, y), train(resumed, x + 1, y), strict=True):
        assert torch.equal(left, right)
    assert same(flat_state(whole), flat_state(resumed))
    assert torch.equal(resumed.predict(x), whole.predict(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_batch_leaves_no_trace(bad):
    x, y = images()
    learner = pw.CascadedForward(normed_blocks(x), CLASSES)
    train(learner, x, y)
    state = flat_state(learner)
    broken = x.clone()
    broken[3, 1, 2, 2] = bad
    with pytest.raises(pw.NonFiniteError, match="inputs hold NaN or infinity"):
        learner.step(broken, y)
    assert same(flat_state(learner), state)


def test_features_that_overflow_do_not_enter_the_sums():
    x, y = torch.full((4, 2), 1e300), torch.arange(4) % CLASSES
    block = nn.Linear(2, 3)
    nn.init.constant_(block.weight, 1e300)
    learner = pw.CascadedForward(pw.Blocks([block], torch.ones(1, 2)), CLASSES)
    with pytest.raises(pw.NonFiniteError, match="features of a Linear hold NaN or infinity"):
        learner.step(x, y)
    assert torch.isfinite(heads(learner)[0].gram).all()


def test_a_float32_network_has_sums_in_float64():
    x, y = images()
    x = x.float()
    modules = [nn.Hardtanh(), *(module.float() for module in plain_blocks(x.double()))]
    blocks = pw.Blocks(modules, x)  # the first one has no parameters that would tell its dtype
    learner = pw.CascadedForward(blocks, CLASSES)
    train(learner, x, y)
    assert learner.predict(x).dtype == torch.float32
    for made, W in zip(features(blocks, x), solutions(learner), strict=True):
        assert W.dtype == torch.float64
        assert normal_equations_error(made.flatten(1).double(), y, W, 1e-2) < 1e-12
    learner = pw.CascadedForward(blocks, CLASSES, head=GradientHead, optimizer=adam)
    losses = train(learner, x, y)
    assert losses[0].dtype == learner.predict(x).dtype == torch.float32


def test_what_cannot_be_is_refused():
    x, y = images()
    with pytest.raises(ValueError, match="ridge"):
        pw.CascadedForward(plain_blocks(x), CLASSES, head=partial(RidgeHead, ridge=0.0))
    with pytest.raises(pw.PlywiseError, match="needs an optimizer"):
        pw.CascadedForward(plain_blocks(x), CLASSES, head=GradientHead)
    learner = pw.CascadedForward(plain_blocks(x), CLASSES)
    with pytest.raises(pw.PlywiseError, match=r"0 … 2"):
        learner.step(x, y + 1)
    assert int(heads(learner)[0].count) == 0


def test_the_papers_blocks():
    blocks = pw.Blocks(cafo_blocks(1), torch.randn(2, 1, 28, 28))
    assert blocks.shapes[1:] == ((32, 14, 14), (128, 7, 7), (512, 3, 3))
    x = torch.randn(5, 1, 28, 28)
    out = blocks[0](x)
    expected = F.max_pool2d(F.conv2d(x, blocks[0][0].weight, blocks[0][0].bias, padding=1).relu(), 2)
    assert close(
        blocks[0][3].running_mean, expected.mean((0, 2, 3))
    )  # the data's own from the first batch on
    centred = expected - expected.mean((0, 2, 3), keepdim=True)
    variance = expected.var((0, 2, 3), keepdim=True, unbiased=False)
    assert close(out, centred / (variance + 1e-4).sqrt(), 1e-12)


@pytest.mark.parametrize("head", [RidgeHead, GradientHead])
def test_digits(head):
    train_set, _, test_set = load_digits()
    x, y = train_set.x.double().view(-1, 1, 8, 8), train_set.y
    learner = pw.CascadedForward(pw.Blocks(cafo_blocks(1, count=2), x[:2]), 10, head=head, optimizer=adam)
    for _ in range(1 if head is RidgeHead else 3):
        train(learner, x, y, (100,) * 11)
    guesses = learner.predict(test_set.x.double().view(-1, 1, 8, 8)).argmax(1)
    assert (guesses == test_set.y).double().mean() > 0.9
