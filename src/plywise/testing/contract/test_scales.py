"""Same seed, same bits; every solve ends: extreme scales, zeros, rank one, constant features."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from plywise import Rule
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    MODELS,
    are_finite,
    compute_gradients,
    compute_loss,
    copy_weights,
    have_same_bits,
    make_batch,
    make_mlp,
    train,
)

KIND = pytest.mark.parametrize("kind", list(MODELS))


@KIND
def test_same_seed_same_bits(case: Case, kind: str) -> None:
    build, shape = MODELS[kind]
    results = []
    for _ in range(2):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        rule = case.make().attach(model, optimizer)
        torch.manual_seed(3)
        train(model, optimizer, make_batch(shape), 4)
        results.append(copy_weights(model))
        rule.detach()
    assert have_same_bits(*results)


def test_a_rule_draws_no_random_numbers(rule: Rule) -> None:
    model = make_mlp()
    before = torch.get_rng_state()
    attach(rule, model, warm=(6,))
    compute_gradients(model, make_batch())
    rule.explain()
    assert torch.equal(torch.get_rng_state(), before)


def zeros(x: Tensor) -> Tensor:
    return x * 0


def rank_one(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat[:, :1] * flat[:1]).reshape(x.shape)


def same_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).contiguous()


def constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 0.1)


def constant_and_large(x: Tensor) -> Tensor:
    return torch.full_like(x, 1e4 + 0.1)


def one_hot(x: Tensor) -> Tensor:
    y = torch.zeros_like(x).flatten(1)
    y[:, 0] = 1
    return y.reshape(x.shape)


def one_row_alive(x: Tensor) -> Tensor:
    y = x * 0
    y[0] = x[0]
    return y


def uneven(x: Tensor) -> Tensor:
    y = x.clone().flatten(1)
    y[:, ::2] *= 1e6
    y[:, 1::2] *= 1e-6
    return y.reshape(x.shape)


INPUTS = {
    "1e8": lambda x: x * 1e8,
    "1e-8": lambda x: x * 1e-8,
    "shifted": lambda x: x + 1e6,
    "denormal": lambda x: x * 1e-39,
    **{f.__name__: f for f in (zeros, rank_one, same_rows, constant, constant_and_large)},
    **{f.__name__: f for f in (one_hot, one_row_alive, uneven)},
}


@pytest.mark.parametrize("kind", ["mlp", pytest.param("convnet", marks=pytest.mark.one_of_family)])
@pytest.mark.parametrize("what", list(INPUTS))
def test_every_solve_ends(case: Case, rule: Rule, kind: str, what: str) -> None:
    build, shape = MODELS[kind]
    model = build()
    x, y = make_batch(shape, 40 if kind == "mlp" else 6)  # more rows than columns, and fewer
    for rows in (len(y), 4) if kind == "mlp" else (4,):
        data = INPUTS[what](x)[:rows], y[:rows]
        attach(rule, model, warm=lambda data=data: compute_loss(model, data))
        assert are_finite(compute_gradients(model, data))
        rule.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rule.attach(model, optimizer)
    with warnings.catch_warnings():
        # plain gradient descent may diverge at 1e8; then steps are skipped and weights stay finite
        warnings.filterwarnings("ignore", "The gradient of", RuntimeWarning)
        train(model, optimizer, (INPUTS[what](x), y), 4 if rule.remembers else 2)
    assert are_finite(copy_weights(model))


@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_extreme_gradients(case: Case, rule: Rule, factor: float) -> None:
    model = make_mlp()
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    small = compute_gradients(model, make_batch())
    scaled = compute_gradients(model, make_batch(), factor)
    assert are_finite(scaled)
    if not case.not_homogeneous:
        for name, g in scaled.items():
            assert torch.allclose(g / factor, small[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("factor", [1e8, 1e-8, 0.0])
def test_extreme_weights(rule: Rule, factor: float) -> None:
    model = make_mlp()
    with torch.no_grad():
        model[2].weight.mul_(factor)
    attach(rule, model, warm=(6,))
    assert are_finite(compute_gradients(model, make_batch()))


@pytest.mark.parametrize("what", ["same_rows", "constant", "constant_and_large", "one_hot"])
@pytest.mark.parametrize("rows", [4, 40])
def test_rounding_does_not_become_a_step(case: Case, rule: Rule, what: str, rows: int) -> None:
    # where a layer's input does not vary, float32 and float64 must agree on the move: the rounding of a
    # Gram that should be singular, divided by itself, would be a step of any size
    x, y = make_batch(n=rows)
    x = INPUTS[what](x)
    torch.manual_seed(1)
    single = nn.Linear(6, 3)
    double = nn.Linear(6, 3).double()
    double.load_state_dict(single.state_dict())
    moves = []
    for layer, z in ((single, x), (double, x.double())):
        data = z, y
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        attach(rule, layer, optimizer, warm=lambda layer=layer, data=data: compute_loss(layer, data))
        moves.append(compute_gradients(layer, data))
        rule.detach()
    for name, g in moves[0].items():
        size = moves[1][name].norm() + moves[1]["bias"].norm()
        # conjugate gradients in float32 keep no digit of a bias that is 1e-4 of the weights' share
        enough = 1.0 if "cg" in case.name else 0.1
        assert (g.double() - moves[1][name]).norm() <= enough * size, name


def test_a_dead_layer_is_left_alone(rule: Rule) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias.fill_(-1e6)  # no unit ever fires
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule.attach(model, optimizer)
    before = copy_weights(model)
    train(model, optimizer, make_batch(), 3)
    for name in ("0.weight", "0.bias", "2.weight"):
        assert torch.equal(copy_weights(model)[name], before[name]), name
    assert not torch.equal(copy_weights(model)["2.bias"], before["2.bias"])
    assert not rule.health.counts


@pytest.mark.parametrize("kinds", [None, "all"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([4, 3, 3])], ids=str)
def test_a_norm_that_begins_at_zero(rule: Rule, norm: nn.Module, kinds: str | None) -> None:
    # residual branches are often initialised so: nothing passes them before the norm's scale has moved
    torch.manual_seed(1)
    norm = copy.deepcopy(norm)
    nn.init.zeros_(norm.weight)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule.attach(model, optimizer, kinds=kinds)
    before = copy_weights(model)
    train(model, optimizer, make_batch((2, 5, 5)), 3)
    assert not torch.equal(copy_weights(model)["4.bias"], before["4.bias"])
    assert are_finite(copy_weights(model))
    assert not rule.health.total("step skipped")


@pytest.mark.parametrize(("width", "has_bias"), [(272, False), (272, True), (271, False), (271, True)])
def test_wide_layers(rule: Rule, width: int, has_bias: bool) -> None:
    # above 2^17 weights a layer is handled by itself, in pieces, with rows that begin at even addresses
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 500, bias=has_bias))
    model.append(nn.Linear(500, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rule.attach(model, optimizer)
    before = copy_weights(model)
    train(model, optimizer, make_batch(), 6)
    assert not torch.equal(copy_weights(model)["2.weight"], before["2.weight"])
    assert are_finite(copy_weights(model))
    assert not rule.health.total("step skipped")
