"""Exact solves of transposed and grouped convolutions, and in half precision, against float64 definitions."""

import copy
import random
from typing import Any

import pytest
import torch
from exact_definitions import RULES, define
from torch import Tensor, nn

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def store(layer: Any, matrices: Tensor) -> Tensor:
    """A weight for each group as a matrix (g, m, k), in the shape in which the layer stores it."""
    weight = matrices.unflatten(2, (layer.in_channels // layer.groups, -1))
    return (weight.transpose(1, 2) if layer.transposed else weight).reshape(layer.weight.shape)


def make_rows(layer: Any, x: Tensor) -> Tensor:
    """A (g, n, k), column by column: the first output of each group where a single tap is 1."""
    unit, groups = copy.deepcopy(layer), layer.groups
    unit.bias, columns = None, []
    width = layer.in_channels // groups * layer.weight[0, 0].numel()
    for tap in range(width):
        matrices = torch.zeros(groups, layer.out_channels // groups, width, dtype=x.dtype)
        matrices[:, 0, tap] = 1
        unit.weight = nn.Parameter(store(layer, matrices))
        output = unit(x).detach().unflatten(1, (groups, -1))
        columns.append(output[:, :, 0].transpose(0, 1).reshape(groups, -1))
    return torch.stack(columns, 2)


def define_layer(name: str, layer: Any, x: Tensor, delta: Tensor) -> list[Tensor]:
    """What a rule's update of a layer in float64 is, in the shapes of its parameters."""
    if isinstance(layer, nn.Linear):
        update = define(name, x, delta, layer.bias is not None, len(x))
        parts = [update[:, : x.shape[1]], update[:, x.shape[1] :].flatten()]
    else:
        rows = make_rows(layer, x)
        targets = delta.unflatten(1, (layer.groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        groups = zip(rows, targets, strict=True)
        update = torch.stack([define(name, A, T, layer.bias is not None, len(x)) for A, T in groups])
        parts = [store(layer, update[:, :, : rows.shape[2]]), update[:, :, rows.shape[2] :].flatten()]
    return parts[: 1 + (layer.bias is not None)]


def draw_convolution(draw: random.Random) -> tuple[Any, Tensor]:
    """A convolution, mostly a transposed one, and an input without an offset."""
    dims, groups = draw.choice([1, 2, 2, 3]), draw.choice([1, 1, 2, 3])
    kernel, stride, dilation = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 1, 2])
    reach = dilation * (kernel - 1)
    settings = {"padding": draw.choice([0, 1]) if reach >= 2 else 0, "groups": groups, "stride": stride}
    settings |= {"dilation": dilation, "bias": draw.random() < 0.6}
    channels = groups * draw.choice([1, 2, 3]), groups * draw.choice([1, 2, 5])
    size = max(draw.choice([2, 3] if dims == 3 else [3, 4, 6]), reach + 1)
    if draw.random() < 0.2:
        layer: Any = PLAIN[dims](*channels, kernel, **settings)
    else:
        output_padding = draw.randrange(max(stride, dilation))
        layer = TRANSPOSED[dims](*channels, kernel, output_padding=output_padding, **settings)
    return layer, torch.randn(draw.choice([1, 2, 5]), channels[0], *[size] * dims)


def measure_error(
    name: str, layer: Any, x: Tensor, scale: float, autocast: torch.dtype | None = None
) -> tuple[float, bool]:
    """The relative error of a rule's update, and whether it is counted."""
    rule = RULES[name]().attach(layer)
    layer.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = layer(x)
    delta = (torch.randn(output.shape) * scale).to(output.dtype)
    output.backward(delta)
    found = [p.grad.double() for p in layer.parameters()]
    rule.detach()
    rows = x.to(autocast or x.dtype).double()  # what the call multiplies
    expected = define_layer(name, copy.deepcopy(layer).double(), rows, delta.double())
    difference, whole = (
        torch.cat([t.flatten() for t in parts]).norm()
        for parts in ([a - b for a, b in zip(found, expected, strict=True)], expected)
    )
    if not 1e-30 < float(whole) < 0.9 * torch.finfo(layer.weight.dtype).max:
        return 0.0, False  # the answer itself leaves the range of the dtype
    return float(difference / whole), bool(rule.health.counts)


@pytest.mark.parametrize("name", RULES)
def test_transposed_and_grouped_convolutions(name: str) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        layer, x = draw_convolution(draw)
        x = draw.choice([0, 1, 100, 1e3, 1e4]) + draw.choice([0.1, 1]) * x
        has_bias = layer.bias is not None
        x = x * draw.choice([1, 1e-3, 1e3] if has_bias else [1, 1e-3, 1e3, 1e-30, 1e-15, 1e15, 1e30])
        error, is_counted = measure_error(name, layer, x, draw.choice([1, 1e-3, 1e3, 1e-15, 1e15]))
        assert error < 1e-4 or is_counted, (seed, error)


def draw_half(seed: int, dtype: torch.dtype) -> tuple[Any, Tensor, float]:
    """A layer, an input that half precision can hold, and the size of Δ."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    if draw.random() < 0.5:
        width = draw.choice([1, 2, 8, 40])
        layer: Any = nn.Linear(width, draw.choice([1, 3, 20]), bias=draw.random() < 0.6)
        x = torch.randn(draw.choice([1, 2, 5, 16, 60]), width)
    else:
        layer, x = draw_convolution(draw)
    x = draw.choice([0, 0, 1, 10, 100, 1e3, 1e4]) + draw.choice([0.1, 1]) * x
    wide = dtype == torch.bfloat16 and layer.bias is None
    return layer, x * draw.choice([1, 1e-8, 1e8] if wide else [1]), draw.choice([1, 1e2, 1e3])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_get_the_rounded_answer(name: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        layer, x, scale = draw_half(seed, dtype)
        error, is_counted = measure_error(name, layer.to(dtype), x.to(dtype), scale)
        assert error < 0.55 * torch.finfo(dtype).eps + 1e-4 or is_counted, (seed, error)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_the_call_and_not_the_answer(name: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        layer, x, scale = draw_half(seed, dtype)
        error, is_counted = measure_error(name, layer, x, scale, autocast=dtype)
        assert error < 1e-4 or is_counted, (seed, error)


OFFSET_CASES = {
    "conv1d": (nn.Conv1d(8, 6, 7), (40, 8, 60)),
    "padded": (nn.Conv2d(6, 8, 3, padding=1), (40, 6, 12, 12)),
    "strided": (nn.Conv2d(6, 8, 3, padding=2, stride=2, dilation=2), (40, 6, 15, 15)),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (40, 6, 12, 12)),
    "conv3d": (nn.Conv3d(3, 4, 3), (20, 3, 8, 8, 8)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, groups=2), (40, 6, 8, 8)),
}


@pytest.mark.parametrize("offset", [5.0, 40.0, 300.0])
@pytest.mark.parametrize("case", OFFSET_CASES)
@pytest.mark.parametrize("name", RULES)
def test_an_offset_of_the_input_costs_no_digits(name: str, case: str, offset: float) -> None:
    torch.manual_seed(0)
    layer, shape = OFFSET_CASES[case]
    offsets = offset * torch.randn(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    error, _ = measure_error(name, layer, torch.randn(shape) + offsets, 1.0)
    assert error < 1e-4
