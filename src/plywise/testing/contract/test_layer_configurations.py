"""Drawn layers and call orders: Backprop is autograd, every rule gives finite moves of the right shape."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import are_finite, assert_close, copy_gradients

# torch's own remark on padding="same", once in a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
BRIEF = settings(
    max_examples=12, deadline=None, suppress_health_check=CHECKS, derandomize=True, database=None
)


@dataclass(frozen=True)
class Drawn:
    """A convolution and an input for it."""

    dims: int
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    frozen_input: bool
    channels_last: bool

    def layer(self) -> nn.Module:
        torch.manual_seed(1)
        return [nn.Conv1d, nn.Conv2d, nn.Conv3d][self.dims - 1](**self.arguments).double()

    def input(self) -> Tensor:
        torch.manual_seed(2)
        x = torch.randn(self.shape, dtype=torch.float64)
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(not self.frozen_input)


@st.composite
def draw_convolution(draw: st.DrawFn) -> Drawn:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    groups = draw(st.integers(1, 3))
    kernel, dilation = each(1, 3), each(1, 2)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * dims if padding == "same" else each(1, 3)
    size = each(1, 6) if dims < 3 else each(1, 4)
    if padding == "numbers":
        padding = each(0, 2)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    before = [
        math.ceil(r / 2) if padding == "same" else 0 if padding == "valid" else padding[i]
        for i, r in enumerate(reach)
    ]
    for i in range(dims):
        total = reach[i] if padding == "same" else 2 * before[i]
        assume(size[i] + total >= reach[i] + 1)  # the kernel fits
        assume(mode != "reflect" or before[i] < size[i])
        assume(mode != "circular" or before[i] <= size[i])
    arguments: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    rows = draw(st.sampled_from([(), (1,), (2,), (4,), (9,)]))
    shape = (*rows, arguments["in_channels"], *size)
    return Drawn(dims, arguments, shape, draw(st.booleans()), draw(st.booleans()))


def compute_results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    # a plain function of the output whose Δ depends on it
    layer(x).sin().sum().backward()
    return copy_gradients(layer) | ({"input": x.grad} if x.grad is not None else {})


def check(case: Case, layer: nn.Module, plain: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    warm = x.detach().clone()
    rule = attach(case.make(), layer, optimizer, warm=lambda: layer(warm).sin().sum())
    found, expected = compute_results(layer, x), compute_results(plain, y)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        assert value.dtype == torch.float64
    assert are_finite(found)
    if case.is_backprop:
        assert_close(found, expected)
    rule.detach()


@BRIEF
@given(drawn=draw_convolution())
def test_every_rule_on_any_convolution(case: Case, drawn: Drawn) -> None:
    check(case, drawn.layer(), drawn.layer(), drawn.input(), drawn.input())


@st.composite
def draw_linear(draw: st.DrawFn) -> tuple[int, int, bool, tuple[int, ...]]:
    d, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.integers(0, 5), max_size=3))
    return d, m, draw(st.booleans()), (*rows, d)


@settings(BRIEF, max_examples=25)
@given(drawn=draw_linear())
def test_any_linear(case: Case, drawn: tuple[int, int, bool, tuple[int, ...]]) -> None:
    d, m, bias, shape = drawn
    torch.manual_seed(1)
    layer, plain = nn.Linear(d, m, bias).double(), nn.Linear(d, m, bias).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    check(case, layer, plain, x.clone().requires_grad_(), x.clone().requires_grad_())


class Ordered(nn.Module):
    """Three layers of one width, called in any order, each any number of times, with skips."""

    def __init__(self, order: list[int], skip: list[bool], inplace: bool, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)])
        if tied:
            self.layers[2].weight = self.layers[0].weight
        self.order, self.skip, self.act = order, skip, nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        for number, skip in zip(self.order, self.skip, strict=True):
            h = self.act(self.layers[number](x))
            x = x + h if skip else h
        return x


@pytest.mark.one_of_family
@settings(BRIEF, max_examples=25)
@given(
    calls=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6),
    inplace=st.booleans(),
)
def test_any_order_of_calls(case: Case, calls: list[tuple[int, bool]], inplace: bool) -> None:
    order, skip = [c[0] for c in calls], [c[1] for c in calls]
    torch.manual_seed(3)
    x = torch.randn(7, 4, dtype=torch.float64)
    rule = case.make()
    tied = not (rule.alters_backward and rule.takes_unshared_only)  # refused: see test_structures
    layer, plain = (Ordered(order, skip, inplace, tied).double() for _ in range(2))
    check(case, layer, plain, x.clone().requires_grad_(), x.clone().requires_grad_())
