"""Layers in half precision, and under autocast: as right as their dtype allows, or counted."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import plywise as pw
from plywise.engine.health import IDENTITY, ROUNDING

EACH = {"stats_every": 1, "refresh_every": 1}

RULES: dict[str, Callable[[], pw.Rule]] = {
    "ProxProp": pw.ProxProp,
    "ProxProp, cg": lambda: pw.ProxProp(solver="cg"),
    "Consequentialism": pw.Consequentialism,
    "NLMS": pw.NLMS,
    "BackMatching, exact": lambda: pw.BackMatching(mode="exact", cap=None),
    "BackMatching": lambda: pw.BackMatching(cap=None),
    "BackMatching, cauchy": lambda: pw.BackMatching(cap=None, scalar="cauchy"),
    "Foof": lambda: pw.Foof(slowdown=1, **EACH),
    "Foof, small damping": lambda: pw.Foof(damping=0.01, slowdown=1, **EACH),
    "FeatureWhitening": lambda: pw.FeatureWhitening(**EACH),
    "KFAC": lambda: pw.KFAC(**EACH),
    "RLS": pw.RLS,
}

DATA = [(0, 1.0, 1.0), (1, 1.0, 1.0), (100, 1.0, 1.0), (10, 1e-4, 1e-4), (0, 1e-2, 1.0), (3, 1e3, 1e-4)]
"""The offset of the inputs, and the scales of inputs and gradients."""

LAYERS: dict[str, list[tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "linear": [(lambda: nn.Linear(40, 10), (16, 40)), (lambda: nn.Linear(8, 64, bias=False), (3, 8))],
    "conv": [(lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5))],
}


def take_steps(
    rule: pw.Rule, layer: nn.Module, data: list[tuple[Tensor, Tensor]], autocast: torch.dtype | None
) -> list[tuple[Tensor, int]]:
    """The update of each step in float64, and the number of events so far."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rule.attach(layer, optimizer)
    found = []
    for x, delta in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = layer(x)
        output.backward(delta.to(output.dtype))
        optimizer.step()
        update = torch.cat([p.grad.double().flatten() for p in layer.parameters()])
        found.append((update, sum(rule.health.counts.values())))
    rule.detach()
    return found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_right_or_counted(name, dtype, autocast, kind):
    for make_layer, shape in LAYERS[kind]:
        for offset, scale, of_delta in DATA:
            if autocast and dtype == torch.float16 and scale * of_delta < 1e-7 and RULES[name]().remembers:
                continue  # autograd's gradient has underflowed: that is what loss scales are for
            torch.manual_seed(1)
            layer = make_layer().to(dtype).float()
            wide = copy.deepcopy(layer).double()
            sizes = layer(torch.zeros(shape)).shape
            data = [
                (((torch.randn(shape) + offset) * scale).to(dtype), (torch.randn(sizes) * of_delta).to(dtype))
                for _ in range(3 if RULES[name]().remembers else 1)
            ]
            exact = take_steps(RULES[name](), wide, [(x.double(), d.double()) for x, d in data], None)
            own = layer if autocast else layer.to(dtype)
            inputs = [(x.float() if autocast else x, d) for x, d in data]
            found = take_steps(RULES[name](), own, inputs, dtype if autocast else None)
            before = 0
            for (update, events), (wanted, _) in zip(found, exact, strict=True):
                best = (
                    wanted.to(next(own.parameters()).dtype) - wanted
                ).norm()  # where numbers are subnormal
                allowed = 4 * torch.finfo(dtype).eps * wanted.norm() + 2 * best
                assert events > before or (update - wanted).norm() <= allowed, (offset, scale, of_delta)
                before = events


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_what_a_root_amplifies_is_counted(dtype, autocast):
    # of inputs that are all alike, the root forbids what the gradient mostly is
    torch.manual_seed(1)
    layer = nn.Linear(150, 3)
    data = [((100 + torch.randn(8, 150)).to(dtype), torch.randn(8, 3).to(dtype)) for _ in range(3)]
    if not autocast:
        layer = layer.to(dtype)
    rule = pw.Foof(slowdown=1, **EACH)
    take_steps(rule, layer, [(x.float() if autocast else x, d) for x, d in data], dtype if autocast else None)
    assert rule.health.of("") == {ROUNDING: 3}


def test_an_update_beyond_float16_does_not_enter_the_weights():
    # the gradient is finite; the update of the same norm has larger entries
    torch.manual_seed(4)
    layer = nn.Linear(8, 64, bias=False).half()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    rule = pw.Foof(slowdown=1, **EACH).attach(layer, optimizer)
    while not rule.health.counts:
        optimizer.zero_grad()
        layer((1e4 * (1 + torch.randn(1, 8))).half()).backward(torch.randn(1, 64).half())
        optimizer.step()
        assert layer.weight.isfinite().all()
    assert rule.health.of("") == {IDENTITY: 1}


@pytest.mark.parametrize(
    "make", [pw.Foof, pw.FeatureWhitening, pw.KFAC, pw.RLS], ids=lambda rule: rule.__name__
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ordinary_layers_are_not_counted(make, dtype):
    torch.manual_seed(1)
    layer, rule = nn.Linear(30, 10).to(dtype), make()
    data = [(torch.randn(200, 30).relu().to(dtype), torch.randn(200, 10).to(dtype)) for _ in range(10)]
    take_steps(rule, layer, data, None)
    assert not rule.health.counts
