"""Exact solves against dense float64 definitions: kinds of layers, shapes, offsets, scales."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from exact_definitions import RULES, define
from torch import Tensor, nn

from plywise import ProxProp


def read(layer: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """A and Δ as matrices."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride).mT
        return patches.reshape(-1, patches.shape[2]), delta.flatten(2).mT.reshape(-1, delta.shape[1])
    return x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])


def measure_error(name: str, layer: nn.Module, x: Tensor, scale: float) -> tuple[float, bool]:
    """The relative error of a rule's update in float32, and whether it is counted."""
    delta = torch.randn_like(layer(x)) * scale
    rule = RULES[name]().attach(layer)
    layer.zero_grad()
    layer(x).backward(delta)
    found = [p.grad.double().reshape(len(p), -1) for p in layer.parameters()]
    rule.detach()
    wide = copy.deepcopy(layer).double()
    rows, targets = read(wide, x.double(), delta.double())
    expected = define(name, rows, targets, layer.bias is not None, len(x))
    if not 1e-30 < float(expected.abs().max()) < 1e36:  # the answer itself leaves the range of float32
        return 0.0, False
    error = torch.linalg.vector_norm(torch.cat(found, 1) - expected) / torch.linalg.vector_norm(expected)
    return float(error), bool(rule.health.counts)


def draw_case(seed: int) -> tuple[nn.Module, Tensor, float]:
    """A layer, its input and the size of Δ. Beyond 1e3, ones beside the rows are lost in float64, too."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    has_bias = draw.random() < 0.6
    count, width, outputs = (
        draw.choice([1, 2, 5, 16, 60]),
        draw.choice([1, 2, 8, 40]),
        draw.choice([1, 3, 20]),
    )
    if draw.random() < 0.5:
        layer: nn.Module = nn.Linear(width, outputs, bias=has_bias)
        x = torch.randn(count, width) if draw.random() < 0.7 else torch.randn(count, 3, width)
    else:
        layer = nn.Conv2d(
            2, outputs, draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([0, 1]), bias=has_bias
        )
        x = torch.randn(-(-count // 8), 2, draw.choice([4, 7]), 5)
    x = draw.choice([0, 1, 100, 1e3, 1e4]) + draw.choice([0.1, 1]) * x
    scale = draw.choice([1, 1e-3, 1e3] if has_bias else [1, 1e-3, 1e3, 1e-30, 1e-15, 1e15, 1e30])
    return layer, x * scale, draw.choice([1, 1e-3, 1e3, 1e-15, 1e15])


@pytest.mark.parametrize("name", RULES)
def test_answers_are_right_to_a_ten_thousandth_unless_that_is_counted(name: str) -> None:
    for seed in range(150):
        error, is_counted = measure_error(name, *draw_case(seed))
        assert error < 1e-4 or is_counted, (seed, error)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("samples", [1, 4])
def test_patches_with_an_offset(name: str, kernel: int, samples: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 20, kernel, 2, padding=kernel // 2)
    error, _ = measure_error(name, layer, 1e4 + 0.1 * torch.randn(samples, 1, 7, 5), 1.0)
    assert error < 1e-4


@pytest.mark.parametrize("name", ["Consequentialism", "NLMS", "BackMatching"])
@pytest.mark.parametrize("size", [1e-28, 1e-15, 1e17])
def test_products_that_leave_the_range_of_float32_have_answers_within_it(name: str, size: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(2, 5, bias=False), size * torch.randn(7, 2)
    error, _ = measure_error(name, layer, x, 1e-25 if size < 1 else 1e-13)
    assert error < 1e-4


def test_one_sample_whose_square_is_out_of_range() -> None:
    layer, x = nn.Linear(3, 8), torch.full((1, 3), 2.0**100)
    rule = ProxProp().attach(layer)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((8, 3), 2.0**-100 / 3), rtol=1e-5, atol=0)
    rule.detach()


def test_one_sample_whose_answer_is_a_quotient_out_of_range_times_the_sample() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(2, 2), 1e15 * (1 + torch.randn(1, 2))
    for name in ("ProxProp", "ProxProp, mean", "Consequentialism"):
        error, _ = measure_error(name, layer, x, 1e-13)
        assert error < 1e-4


def test_large_rows_that_differ_by_a_thousandth() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2, bias=False), 1e15 * (1000 + 0.1 * torch.randn(3, 4))
    error, _ = measure_error("ProxProp", layer, x, 1.0)
    assert error < 1e-4
