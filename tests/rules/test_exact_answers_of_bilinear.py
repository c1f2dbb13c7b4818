"""Exact updates of bilinear maps, whose rows are products of two inputs, against dense algebra in float64."""

import pytest
import torch
from exact_definitions import RULES, define
from torch import Tensor, nn

from plywise.engine.health import EIGENVALUES

SHAPES = [(20, 4, 3, 5), (5, 4, 3, 5), (2, 2, 2, 2), (300, 6, 5, 4), (1, 3, 4, 2)]


def compute_error(name: str, x1: Tensor, x2: Tensor, outputs: int, has_bias: bool = True) -> float:
    model = nn.Bilinear(x1.shape[1], x2.shape[1], outputs, bias=has_bias)
    delta = torch.randn(len(x1), outputs)
    rule = RULES[name]().attach(model)
    model(x1, x2).backward(delta)
    A = torch.einsum("ni,nj->nij", x1.double(), x2.double()).flatten(1)
    wanted = define(name, A, delta.double(), has_bias, len(x1))
    parts = [model.weight.grad.flatten(1), *([model.bias.grad[:, None]] if has_bias else [])]
    if rule.health.total(EIGENVALUES):
        return 0.0
    rule.detach()
    return float((torch.cat(parts, 1).double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_offsets_of_the_inputs(name: str, has_bias: bool, both: bool, offset: float) -> None:
    # products of 10,000 + noise with each other are rounded by 4 in float32, and their spread is 14,000
    for count, d1, d2, outputs in SHAPES:
        torch.manual_seed(count)
        x1, x2 = torch.randn(count, d1) + offset, torch.randn(count, d2) + offset * both
        assert compute_error(name, x1, x2, outputs, has_bias) < 1e-4, (count, d1, d2)


@pytest.mark.parametrize("sizes", [(1e10, 1e10), (1e-10, 1e-10), (1e20, 1e-20), (1e4, 1e4), (1e18, 1.0)])
@pytest.mark.parametrize("name", RULES)
def test_sizes_of_the_inputs(name: str, sizes: tuple[float, float]) -> None:
    torch.manual_seed(1)
    x1, x2 = torch.randn(20, 4) * sizes[0], torch.randn(20, 3) * sizes[1]
    assert compute_error(name, x1, x2, 5) < 1e-4
