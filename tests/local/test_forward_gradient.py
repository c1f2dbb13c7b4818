"""Local forward gradient against autograd, in float64: what is exact, and what learning does with it."""

import io
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from closeness import close
from estimates import CLASSES, components, exact, gradients, scores, sgd
from torch import Tensor, nn
from torch.autograd import forward_ad

import plywise as pw
from plywise.local.component import Component, Signal


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Sweep:
    """In place of u: one unit after another, over all layers of a forward."""

    def __init__(self) -> None:
        self.unit = 0  # whose turn it is
        self.passed = 0  # units of the layers before, in this forward

    def __call__(self, z: Tensor) -> Tensor:
        rows = torch.zeros_like(z).flatten(1)
        if 0 <= self.unit - self.passed < rows.shape[1]:
            rows[:, self.unit - self.passed] = 1
        self.passed += rows.shape[1]
        return rows.reshape(z.shape)


def swept(make, signal: Signal) -> tuple[list[Tensor], Component, int]:
    """The sum of the estimates over all units, the component, and how many units there are."""
    sweep = Sweep()
    component = make(sweep)
    total = None
    while True:
        sweep.passed = 0
        found = gradients(component, signal)
        if sweep.unit >= sweep.passed:
            return total, component, sweep.passed
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        sweep.unit += 1


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.gain = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.gain(self.layer(x)))


class Scaled(nn.Module):
    """A parameter of its own around a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale).tanh() * self.scale


def shared(width: int) -> nn.Sequential:
    layer = nn.Linear(width, width)
    return nn.Sequential(layer, nn.Tanh(), Residual(width), layer)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x.reshape(-1, 3, 2))[0].flatten(1)


class Attending(nn.Module):
    """Queries of the input's own rows; the layer hands on a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 3, 2)
        return (rows + self.attend(rows, rows, rows, need_weights=False)[0]).flatten(1)


FLAT = {
    "recurrent": Recurrent,
    "attention": Attending,
    "linear": lambda: nn.Linear(6, 4),
    "deep, in place": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4, bias=False), nn.SiLU(inplace=True)
    ),
    "residual": lambda: Residual(6),
    "own parameter": lambda: Scaled(6),
    "one layer twice": lambda: shared(6),
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, bias=False)), nn.Tanh(), nn.Linear(5, 4)
    ),
    "sequence": lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 4), nn.Tanh(), nn.Flatten()),
    "images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 2, 2, padding=1),
        nn.GroupNorm(1, 2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 2),
        nn.MaxPool2d(2),
    ),
    "no parameters": lambda: nn.Sequential(nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Flatten()),
}


@pytest.mark.parametrize("block", FLAT)
def test_a_sweep_over_the_units_gives_the_exact_gradient(block):
    x, y = torch.randn(4, 6), torch.arange(4) % CLASSES
    first = FLAT[block]()
    width = first(x).flatten(1).shape[1]
    top = nn.Sequential(nn.Flatten(), nn.Linear(width, CLASSES))

    total, component, units = swept(lambda draw: components([first, top], x, draw=draw)[0], Signal(x, y))
    if units == 0:
        assert block == "no parameters"
        return
    repeated = {id(p) for p in component.head.parameters()}  # exact each time
    for parameter, found, expected in zip(
        component.parameters(), total, exact(component, Signal(x, y)), strict=True
    ):
        times = units if id(parameter) in repeated else 1
        assert expected.norm() > 0
        assert close(found / times, expected, 1e-10)


class Classifier(nn.Module):
    """Whose output layer cannot be told from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.top = nn.Linear(6, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(x).tanh())


def used_twice() -> nn.Sequential:
    """The output layer is the first layer too."""
    layer = nn.Linear(CLASSES, CLASSES)
    return nn.Sequential(nn.AvgPool1d(2), layer, nn.Linear(CLASSES, CLASSES), nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("make", "estimated"),
    [
        (lambda: nn.Linear(6, CLASSES), 0),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, CLASSES))), 4),
        (Classifier, 4 + CLASSES),
        (lambda: nn.Sequential(nn.Linear(6, CLASSES), nn.Tanh()), CLASSES),
        (used_twice, 3 * CLASSES),
    ],
)
def test_the_last_block(make, estimated):
    """Its output layer learns exactly where it can be told; estimates of the others sum to the gradient."""
    x, y = torch.randn(4, 6), torch.arange(4) % CLASSES
    signal, block = Signal(x, y), make()
    if estimated == 0:
        component = components([block], x, draw=pytest.fail)[0]
        for found, expected in zip(gradients(component, signal), exact(component, signal), strict=True):
            assert close(found, expected, 1e-13)
        return
    total, component, units = swept(lambda draw: components([block], x, draw=draw)[0], signal)
    assert units == estimated
    known = {id(p) for p in block[2].parameters()} if units == 4 else set()
    for parameter, found, expected in zip(
        component.parameters(), total, exact(component, signal), strict=True
    ):
        assert close(found / (units if id(parameter) in known else 1), expected, 1e-10)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("block", FLAT)
def test_loss_and_signal_are_those_of_the_plain_forward(block, passes):
    x, y = torch.randn(4, 6), torch.arange(4) % CLASSES
    first = FLAT[block]()
    width = first(x).flatten(1).shape[1]
    top = nn.Sequential(nn.Flatten(), nn.Linear(width, CLASSES))
    for component in components([first, top], x, passes=passes):
        following, loss = component(Signal(x, y))
        assert close(following.s, component.block(x), 1e-14)
        assert following.y is y
        assert close(loss, F.cross_entropy(scores(component, x), y), 1e-14)
        x = following.s.detach()


def test_heads_learn_by_their_exact_gradient():
    x, y = torch.randn(9, 6), torch.arange(9) % CLASSES
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, CLASSES)]
    component = components(blocks, x)[0]
    size = sum(1 for _ in component.block.parameters())
    found, expected = gradients(component, Signal(x, y)), exact(component, Signal(x, y))
    for left, right in zip(found[size:], expected[size:], strict=True):
        assert close(left, right, 1e-13)
    for left, right in zip(found[:size], expected[:size], strict=True):
        assert not close(left, right, 1e-3)


def chain(*widths: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]


def test_blocks_are_isolated_to_the_bit():
    """The first block learns the same whatever follows, and nothing flows back into it."""
    x, y = torch.randn(9, 6), torch.arange(9) % CLASSES
    found = []
    for width in (4, 7):
        torch.manual_seed(1)
        modules = chain(6, 5)
        modules.append(nn.Sequential(nn.Linear(5, width), nn.Dropout(), nn.Linear(width, CLASSES)))
        torch.manual_seed(2)  # for the first head
        learner = pw.LocalForwardGradient(pw.Blocks(modules, x), CLASSES, optimizer=sgd)
        first = learner.trainers[0].component
        for _ in range(3):
            learner.step(x, y)
        found.append(first.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    first.zero_grad()
    following, _ = first(Signal(x, y))
    learner.trainers[1].component(following)[1].backward()
    assert all(p.grad is None for p in first.parameters())


def test_resumes_bit_for_bit():
    x, y = torch.randn(10, 6), torch.arange(10) % CLASSES

    def make(seed: int = 5):
        torch.manual_seed(2)
        modules = [
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.2)),
            *chain(5, 4),
            nn.Linear(4, CLASSES),
        ]
        blocks = pw.Blocks(modules, x)
        return pw.LocalForwardGradient(blocks, CLASSES, passes=2, optimizer=sgd, seed=seed)

    def train(learner, steps):
        return [
            learner.step(x[: 10 - 3 * (number % 2)], y[: 10 - 3 * (number % 2)]) for number in range(steps)
        ]

    whole = make()
    train(whole, 3)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(77)  # the caller's random numbers have no part in it
    assert all(torch.equal(a, b) for a, b in zip(train(whole, 3), train(resumed, 3), strict=True))
    assert torch.equal(whole.predict(x), resumed.predict(x))
    other = make(seed=6)
    train(other, 6)
    assert not torch.equal(other.predict(x), whole.predict(x))


def test_frozen_layers_make_no_noise():
    x, y = torch.randn(4, 6), torch.arange(4) % CLASSES
    block = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    block[0].requires_grad_(False)
    drawn = []

    def draw(z: Tensor) -> Tensor:
        assert not z.requires_grad
        drawn.append(z.shape)
        return torch.randn_like(z)

    component = components([block, nn.Linear(4, CLASSES)], x, draw=draw)[0]
    component(Signal(x, y))[1].backward()
    assert drawn == [(4, 4)]
    assert block[0].weight.grad is None
    assert block[2].weight.grad is not None
    with torch.no_grad():  # nobody asks for gradients: nothing is drawn
        assert not component(Signal(x, y))[1].requires_grad
    assert drawn == [(4, 4)]


class Merged(nn.Module):
    """Runs a layer on rows of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 2)).reshape(x.shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Merged, r"Layer 'block\.1\.layer' \(Linear\) hands on \(12, 2\) for 4 samples"),
    ],
)
def test_layers_without_a_row_for_each_sample_are_refused(make, message):
    x, y = torch.randn(4, 6), torch.arange(4) % CLASSES
    block = nn.Sequential(nn.Linear(6, 6), make())
    component = components([block, nn.Linear(6, CLASSES)], x)[0]
    before = block(x)
    with pytest.raises(pw.BlockError, match=message):
        component(Signal(x, y))
    assert torch.equal(block(x), before)  # no hook is left
    with forward_ad.dual_level():  # nor the level of dual numbers, which would nest
        assert forward_ad.unpack_dual(x).tangent is None


def test_what_cannot_be_is_refused():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="passes must be a whole number"):
        components([nn.Linear(6, CLASSES)], x, passes=0)
    with pytest.raises(pw.BlockError, match="one score for each of 3 classes"):
        components([nn.Linear(6, 4)], x)
    in_place = components(
        [nn.Linear(6, 4), nn.Linear(4, CLASSES)],
        x,
        head=lambda shape, classes: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, classes)),
    )
    with pytest.raises(pw.BlockError, match="in place"):
        in_place[0](Signal(x, torch.zeros(4, dtype=torch.long)))
    learner = pw.LocalForwardGradient(pw.Blocks([nn.Linear(6, CLASSES)], x), CLASSES, optimizer=sgd)
    with pytest.raises(pw.PlywiseError, match="class indices"):
        learner.step(x, torch.zeros(4, CLASSES))


def test_it_learns():
    x, y = torch.randn(300, 6), torch.arange(300) % CLASSES
    x[torch.arange(300), y] += 3
    norm = partial(nn.LayerNorm, elementwise_affine=False)
    modules = [nn.Sequential(nn.Linear(a, 8), norm(8), nn.ReLU()) for a in (6, 8)]
    learner = pw.LocalForwardGradient(pw.Blocks([*modules, nn.Linear(8, CLASSES)], x), CLASSES, optimizer=sgd)
    before = (learner.predict(x).argmax(1) == y).double().mean()
    for _ in range(10):
        for batch in torch.randperm(300).split(32):  # the last batch has 12
            losses = learner.step(x[batch], y[batch])
    assert before < 0.6
    assert (learner.predict(x).argmax(1) == y).double().mean() > 0.9
    assert (losses < 0.6).all()


@pytest.mark.parametrize("rule", [pw.Backprop, pw.NLMS, pw.KFAC])
def test_rules_act_on_the_estimate(rule) -> None:
    """The control changes no bit; the others train."""
    x, y = torch.randn(40, 6), torch.arange(40) % CLASSES
    x[torch.arange(40), y] += 3
    weights = []
    for inside in (None, rule):
        torch.manual_seed(1)
        body = [nn.Sequential(nn.Linear(6, 12), nn.ReLU()), nn.Linear(12, CLASSES)]
        learner = pw.LocalForwardGradient(pw.Blocks(body, x), CLASSES, passes=8, optimizer=sgd, rule=inside)
        losses = [float(learner.step(x, y)[-1]) for _ in range(60)]
        assert losses[-1] < losses[0] / 2
        weights.append([p.detach() for block in body for p in block.parameters()])
    assert all(map(torch.equal, *weights)) == (rule is pw.Backprop)
