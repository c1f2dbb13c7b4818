"""Updates of layers of ordinary size in float32 are those of float64 to 1e-4, or it is counted that not.

Small layers are solved in float64 anyway, so they say little about float32.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from algebra import relative
from torch import Tensor, nn

import plywise as pw

RULES: dict[str, Callable[[], pw.Rule]] = {
    "ProxProp": pw.ProxProp,
    "ProxProp by conjugate gradients": lambda: pw.ProxProp(solver="cg", cg_steps=5),
    "Consequentialism": pw.Consequentialism,
    "BackMatching": pw.BackMatching,
    "BackMatching, exact": lambda: pw.BackMatching(mode="exact"),
    "NLMS": pw.NLMS,
    "RLS": pw.RLS,
    "Foof": lambda: pw.Foof(rank=None),
    "KFAC": pw.KFAC,
    "FeatureWhitening": lambda: pw.FeatureWhitening(rank=None),
    "AdaBK": pw.AdaBK,
    "Precondition": pw.Precondition,
}

LAYERS = {
    "few rows": (nn.Linear(900, 100), (256, 900)),
    "many rows": (nn.Linear(300, 100), (2048, 300)),
    "convolution": (nn.Conv2d(16, 32, 3, padding=1), (32, 16, 16, 16)),
}

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset of one deviation": lambda x: x + 1,
    "offset of thirty deviations": lambda x: x + 30,
    "mostly equal numbers": lambda x: x * (x > 1.6) + 3,
    "activations": lambda x: x.relu(),
    "scales": lambda x: x * torch.logspace(0, -3, x.shape[1]).reshape(1, -1, *[1] * (x.dim() - 2)),
}


def compute_step(rule: pw.Rule, layer: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, bool]:
    """Make one step of a copy of a layer from weights of zero, and tell whether anything was counted."""
    layer = copy.deepcopy(layer).to(x.dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    rule.attach(layer, optimizer)
    layer(x).backward(delta)
    optimizer.step()
    is_counted = bool(rule.health.counts)
    rule.detach()
    return torch.cat([parameter.detach().flatten() for parameter in layer.parameters()]).double(), is_counted


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("size", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_right_or_counted(name: str, size: str, inputs: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[size]
    x = INPUTS[inputs](torch.randn(shape))
    delta = torch.randn_like(layer(x)) / len(x)
    step, is_counted = compute_step(RULES[name](), layer, x, delta)
    expected, _ = compute_step(RULES[name](), layer, x.double(), delta.double())
    assert relative(step, expected) < 1e-4 or is_counted
