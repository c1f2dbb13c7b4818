"""Coordinates against slow definitions, in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from coordinates_cases import STEPS, add_ramp, find_basis, gradient, make_data, matrix_of, new_layer, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

import plywise as pw
from plywise.errors import AttachError

pytestmark = pytest.mark.usefixtures("double")

RATE = 0.05
ONCE: dict[str, Any] = {"stats_every": STEPS, "refresh_every": STEPS}  # the first basis stays
Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, RATE, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: Adam(p, RATE, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, RATE, weight_decay=0.1),
    "nadam": lambda p: NAdam(p, RATE),
    "rmsprop": lambda p: RMSprop(p, RATE, weight_decay=0.1),
    "sgd that maximizes": lambda p: SGD(p, RATE, momentum=0.9, weight_decay=0.1, maximize=True),
    "adam that maximizes": lambda p: Adam(p, RATE, weight_decay=0.1, maximize=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_identity_is_the_optimizer(optimizer: str) -> None:
    plain, turned = new_layer(), new_layer()
    train(plain, OPTIMIZERS[optimizer](plain.parameters()))
    made = OPTIMIZERS[optimizer](turned.parameters())
    rule = pw.Coordinates(power=0, basis="root", stats_every=2, refresh_every=2).attach(turned, made)
    train(turned, made)
    assert torch.allclose(matrix_of(turned), matrix_of(plain), rtol=1e-9, atol=1e-11)
    assert not rule.health.counts


@pytest.mark.parametrize("basis", ["eigen", "root"])
@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_moves_by_the_gradient_in_the_metric(
    basis: Any, power: float, decay: float, maximize: bool
) -> None:
    """With power ½ that is Foof's step with c = 1, with ¼ that of feature whitening."""
    layer = new_layer()
    optimizer = SGD(layer.parameters(), RATE, weight_decay=decay, maximize=maximize)
    pw.Coordinates(power=power, damping=0.3, basis=basis, keep_norm=False, **ONCE).attach(layer, optimizer)
    W, metric = matrix_of(layer), torch.eye(6)
    for number in range(STEPS):
        G, covariance = gradient(number)
        if number == 0:
            T = find_basis(covariance, power, 0.3)
            metric = T @ T.T
        W = W - RATE * ((-G if maximize else G) + decay * W) @ metric
    train(layer, optimizer)
    assert torch.allclose(matrix_of(layer), W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("basis", ["eigen", "root"])
def test_of_a_wide_side_only_the_leading_directions_are_whitened(basis: Any) -> None:
    layer, rank = new_layer(), 2
    optimizer = SGD(layer.parameters(), RATE)
    settings = {"rank": rank, "power": 0.5, "damping": 0.3, "basis": basis}
    pw.Coordinates(keep_norm=False, **settings, **ONCE).attach(layer, optimizer)
    W, covariance = matrix_of(layer), add_ramp(gradient(0)[1])
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0) / values.mean(), vectors.flip(1)
    leading, rest = vectors[:, :rank], values[rank:].mean()
    inner = leading * (values[:rank] + 0.3) ** -1
    metric = inner @ leading.T + (torch.eye(6) - leading @ leading.T) / (rest + 0.3)
    for number in range(STEPS):
        W = W - RATE * gradient(number)[0] @ metric
    train(layer, optimizer)
    assert (matrix_of(layer) - W).norm() < 0.01 * W.norm()  # the vectors come from subspace iteration


@pytest.mark.parametrize("rank", [None, 2])
def test_a_momentum_without_second_moments_is_turned(rank: int | None) -> None:
    """As SGD's momentum would be without the rule, at the end."""
    layer = new_layer()
    optimizer = SGD(layer.parameters(), RATE, momentum=0.9)
    rule = pw.Coordinates(rank=rank, stats_every=2, refresh_every=2).attach(layer, optimizer)
    M = torch.zeros(4, 6)
    for number in range(STEPS):
        M = 0.9 * M + gradient(number)[0]
        train(layer, optimizer, range(number, number + 1))
    rule.detach()
    states = [optimizer.state[layer.weight], optimizer.state[layer.bias]]
    buffers = [states[0]["momentum_buffer"], states[1]["momentum_buffer"][:, None]]
    assert torch.allclose(torch.cat(buffers, 1), M, rtol=1e-8, atol=1e-10)
    assert not rule.health.counts


def test_outliers_do_not_meet_second_moments_of_other_axes() -> None:
    """A momentum that is turned while second moments are not makes steps of any size."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 8)
    optimizer = AdamW(layer.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.0)
    pw.Coordinates(stats_every=1, refresh_every=1, decay=0.5, damping=1e-4, keep_norm=False).attach(
        layer, optimizer
    )
    for number in range(60):
        optimizer.zero_grad()
        x = torch.randn(16, 30) * (100.0 if number % 7 == 3 else 1.0)
        (layer(x) * torch.randn(16, 8)).sum().backward()
        optimizer.step()
        for parameter in layer.parameters():
            state = optimizer.state[parameter]
            corrected = state["exp_avg"] / (1 - 0.9 ** (number + 1))
            root = (state["exp_avg_sq"] / (1 - 0.99 ** (number + 1))).sqrt()
            assert (corrected.abs() <= 10 * root + 1e-12).all()  # as for any sequence of gradients


def test_power_one_half_is_foof() -> None:
    turned, other = new_layer(), new_layer()
    made = SGD(turned.parameters(), RATE)
    pw.Coordinates(power=0.5, damping=1.0, keep_norm=False).attach(turned, made)
    theirs = SGD(other.parameters(), RATE)
    train(turned, made, range(1))
    other.load_state_dict(turned.state_dict())
    foof = pw.Precondition(right=1.0, damping=1.0, keep_norm=False, stats_every=10, refresh_every=10)
    foof.attach(other, theirs)
    with torch.no_grad():
        before = {k: v.clone() for k, v in other.state_dict().items()}
    train(other, theirs, range(1))  # learns the same batch, and moves: only the statistic is wanted
    other.load_state_dict(before)
    # Foof's statistic is absolute, and the coordinates' relative to the mean eigenvalue
    mean = add_ramp(gradient(0)[1]).diagonal().mean()
    theirs.param_groups[0]["lr"] = float(RATE * mean)
    train(turned, made, range(1, 5))
    train(other, theirs, range(1, 5))
    assert torch.allclose(matrix_of(turned), matrix_of(other), rtol=1e-2, atol=1e-2)  # but for that ramp


@pytest.mark.parametrize("power", [0.0, 0.25])
def test_adamw_works_in_the_eigenbasis(power: float) -> None:
    """As SOAP's right side, but for the momentum, which stays in the coordinates of its second moments."""
    layer, every, wd, b1, b2 = new_layer(), 3, 0.1, 0.9, 0.99
    optimizer = AdamW(layer.parameters(), RATE, betas=(b1, b2), weight_decay=wd)
    rule = pw.Coordinates(power=power, damping=0.2, stats_every=every, refresh_every=every)
    rule.attach(layer, optimizer)
    W, T, M, V = matrix_of(layer), torch.eye(6), torch.zeros(4, 6), torch.zeros(4, 6)
    for number in range(STEPS):
        G, covariance = gradient(number)
        T = find_basis(covariance, power, 0.2).flip(1) if number == 0 else T
        M, V = b1 * M + (1 - b1) * G @ T, b2 * V + (1 - b2) * (G @ T).square()
        t = number + 1
        step = M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + 1e-8)
        moved = step @ T.T
        W = W * (1 - RATE * wd) - RATE * moved * step.norm() / moved.norm()
        train(layer, optimizer, range(number, number + 1))
        assert torch.allclose(matrix_of(layer), W, rtol=1e-8, atol=1e-10), number
        if number % every == 0:
            before, T = T, rule.statistics[""]["input.basis"][0].clone()
            M = M * (before * T).sum(0).sign() if number == 0 else M  # vectors have no sign of their own
            assert torch.allclose(T.T @ T, torch.diag((T.T @ T).diagonal()), atol=1e-9)  # orthogonal columns
    rule.detach()
    momentum = torch.cat(
        [optimizer.state[layer.weight]["exp_avg"], optimizer.state[layer.bias]["exp_avg"][:, None]], 1
    )
    assert torch.allclose(momentum, M @ torch.linalg.inv(T), rtol=1e-8, atol=1e-10)  # the weights' own again
    squares = torch.cat(
        [optimizer.state[layer.weight]["exp_avg_sq"], optimizer.state[layer.bias]["exp_avg_sq"][:, None]], 1
    )
    assert torch.allclose(squares, V @ torch.linalg.inv(T).square(), rtol=1e-8)


def make_wide(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer of 180,000 weights, and inputs for it."""
    generator = torch.Generator().manual_seed(2)
    if kind == "convolution":
        return nn.Conv2d(40, 500, 3, bias=False), torch.randn(4, 40, 4, 4, generator=generator)
    if kind == "channels last":
        return make_wide("convolution")[0].to(memory_format=torch.channels_last), make_wide("convolution")[1]
    width = 608 if "aligned" in kind else 600  # of 608 columns no row needs zeros after it
    layer = nn.Linear(width, 300, bias=kind in ("bias", "aligned"))
    return layer, torch.randn(9, width, generator=generator) * torch.linspace(2, 0.1, width) + 0.1


LARGE: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"rank": 8}) for kind in ("bias", "no bias", "convolution", "channels last")),
    *((kind, {"rank": 8}) for kind in ("aligned", "aligned, no bias")),
    *(("bias", settings) for settings in ({"rank": None}, {"rank": 8, "sides": "both"})),
    ("bias", {"rank": 8, "basis": "root", "keep_norm": False}),
]


@pytest.mark.parametrize(("kind", "settings"), LARGE, ids=str)
def test_large_layers_are_turned_as_small_ones_are(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of their rows, with the weights where they are."""
    ends = []
    for largest in (2**17, 2**30):
        monkeypatch.setattr("plywise.engine.coordinates.turned_layers.LARGEST_STACKED", largest)
        torch.manual_seed(4)
        layer, x = make_wide(kind)
        layer, x = layer.double(), x.double()
        optimizer = AdamW(layer.parameters(), 0.01, weight_decay=0.1)
        rule = pw.Coordinates(stats_every=2, refresh_every=2, **settings).attach(layer, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        assert not rule.health.counts
        assert torch.isfinite(layer.weight).all()
        ends.append([parameter.detach().clone() for parameter in layer.parameters()])
    for pieces, whole in zip(*ends, strict=True):
        # Adam divides by roots of squares, also in directions where all that there is is rounding
        assert torch.allclose(pieces, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [5, 600])
def test_a_gradient_that_overflows_once_it_is_turned_stays_as_it_is(width: int) -> None:
    """Of a layer with 180,000 weights some rows are turned before that is seen."""
    layer = nn.Linear(width, 300, bias=False).float()
    optimizer = SGD(layer.parameters(), 1e-38)
    rule = pw.Coordinates(power=0.5, damping=1e-4, rank=2, keep_norm=False).attach(layer, optimizer)
    x = torch.randn(8, width, dtype=torch.float32) * torch.linspace(1, 1e-3, width).float()
    layer(x).sum().backward()
    optimizer.step()
    gradient = torch.randn(300, width, dtype=torch.float32)
    gradient[-1] = 3e38
    layer(x).sum().backward()
    layer.weight.grad.copy_(gradient)
    optimizer.step()
    assert rule.health.counts
    assert torch.allclose(layer.weight.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", ["input", "both"])
@pytest.mark.parametrize(("width", "rank"), [(600, None), (600, 64), (100, None)])
def test_adam_does_not_step_where_no_input_has_anything(width: int, rank: int | None, sides: Any) -> None:
    """All that turned gradients have there is rounding, which Adam would make as large as any other step."""
    x, y = torch.randn(9, width), torch.randn(9, 5)
    layer = nn.Linear(width, 5, bias=False).float()
    before = layer.weight.detach().double()
    optimizer = AdamW(layer.parameters(), 0.01, weight_decay=0.0)
    pw.Coordinates(rank=rank, sides=sides).attach(layer, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        (layer(x.float()) - y.float()).square().mean().backward()
        optimizer.step()
    steps, inputs = layer.weight.detach() - before, torch.linalg.svd(x, full_matrices=False)[2]
    inside = steps @ inputs.T
    assert (steps - inside @ inputs).norm() < 1e-3 * inside.norm()


@pytest.mark.parametrize("begun", [False, True])
def test_second_moments_of_other_axes_are_not_used(begun: bool) -> None:
    """Or Adam's steps along the leading directions would be as large as their gradients."""
    layer = new_layer()
    optimizer = AdamW(layer.parameters(), 0.01, weight_decay=0.0)
    train(layer, optimizer, range(3 * begun))
    with pytest.warns(RuntimeWarning, match="no statistics") if begun else nullcontext():
        pw.Coordinates(damping=1e-4).attach(layer, optimizer)
    for number in range(3, 9):
        before = matrix_of(layer)
        train(layer, optimizer, range(number, number + 1))
        assert (matrix_of(layer) - before).norm() <= 0.01 * 24**0.5 * 1.5  # 24 entries, each about the rate


def test_muon_steps_in_the_coordinates() -> None:
    layer, twin = (nn.Linear(5, 4, bias=False) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    layer, twin = layer.float(), twin.float()
    optimizer = torch.optim.Muon(layer.parameters(), RATE, weight_decay=0.0, momentum=0.0, nesterov=False)
    other = torch.optim.Muon(twin.parameters(), RATE, weight_decay=0.0, momentum=0.0, nesterov=False)
    rule = pw.Coordinates(keep_norm=False).attach(layer, optimizer)

    def step(number: int) -> Tensor:
        optimizer.zero_grad()
        x, delta = (value.float() for value in make_data(number))
        (layer(x) * delta).sum().backward()
        G = layer.weight.grad.clone()
        optimizer.step()
        return G

    step(0)
    T = rule.statistics[""]["input.basis"][0].clone()
    before = layer.weight.detach().clone()
    G = step(1)
    twin.weight.data.zero_()
    twin.weight.grad = G @ T
    other.step()
    assert torch.allclose(layer.weight - before, twin.weight @ T.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Muon", "NorMuon"])
def test_muon_does_not_mind_a_rotation(name: str) -> None:
    """With power 0 it is Muon: the polar factor turns with its argument."""
    ends = []
    for turned in (False, True):
        torch.manual_seed(3)
        layer = nn.Linear(5, 4, bias=False)
        optimizer = getattr(pw.optim, name)(layer.parameters(), lr=RATE, weight_decay=0.1)
        if turned:
            pw.Coordinates(power=0, rank=2, stats_every=2, refresh_every=2).attach(layer, optimizer)
        train(layer, optimizer)
        ends.append(layer.weight.detach().clone())
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-8)


def test_both_sides_turn_the_gradient() -> None:
    layer = new_layer()
    optimizer = SGD(layer.parameters(), RATE)
    rule = pw.Coordinates(sides="both", output_power=0.25, damping=0.1, keep_norm=False)
    rule.attach(layer, optimizer)
    train(layer, optimizer, range(1))
    _, delta = make_data(0)
    T = find_basis(gradient(0)[1], 0.25, 0.1)
    S = find_basis(delta.T @ delta, 0.25, 0.1)
    before, (G, _) = matrix_of(layer), gradient(1)
    train(layer, optimizer, range(1, 2))
    assert torch.allclose(matrix_of(layer), before - RATE * S @ S.T @ G @ T @ T.T, rtol=1e-9)
    assert rule.explain().rows[0].treatment == "Coordinates: input side, power 0.25, output side, power 0.25"


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_skipped_step_leaves_no_trace(optimizer: str) -> None:
    ends = []
    for spoil in (False, True):
        layer = new_layer()
        made = OPTIMIZERS[optimizer](layer.parameters())
        pw.Coordinates(stats_every=2, refresh_every=2).attach(layer, made)
        for number in range(STEPS):
            if spoil and number in (0, 3, 4):
                with pytest.warns(RuntimeWarning) if number == 0 else nullcontext():
                    train(layer, made, range(number, number + 1), float("nan"))
            train(layer, made, range(number, number + 1))
        ends.append(matrix_of(layer))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["Adafactor", "ASGD", "LBFGS"])
def test_what_cannot_be_turned_is_refused_by_name(name: str) -> None:
    layer = new_layer()
    optimizer = getattr(torch.optim, name)(layer.parameters())
    with pytest.raises(AttachError, match=name):
        pw.Coordinates().attach(layer, optimizer)
    pw.Foof().attach(layer, SGD(layer.parameters(), RATE)).detach()


def test_a_wide_side_stays_as_it_is() -> None:
    plain, turned = new_layer(), new_layer()
    train(plain, OPTIMIZERS["adamw"](plain.parameters()))
    made = OPTIMIZERS["adamw"](turned.parameters())
    pw.Coordinates(max_size=5).attach(turned, made)
    train(turned, made)
    assert torch.allclose(matrix_of(turned), matrix_of(plain), rtol=1e-12)


BAD: list[dict[str, Any]] = [
    {"tolerance": -0.1},
    {"tolerance": "low"},
    {"power": -0.1},
    {"power": 2},
    {"basis": "qr"},
    {"sides": "left"},
]


@pytest.mark.parametrize("bad", BAD)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Coordinates"):
        pw.Coordinates(**bad)
