"""Conjugate gradients in float32 are those of float64 to 1e-4, or it is counted that float64 was needed."""

import pytest
import torch
from algebra import move_of, relative
from torch import Tensor, nn

import plywise as pw
from plywise.engine import health
from plywise.engine.call import LinearCall, Update

SIZES = [(40, 9), (150, 33), (8, 33), (40, 80)]


def draw(kind: str, n: int, k: int) -> Tensor:
    x = torch.randn(n, k, dtype=torch.float64)
    if kind == "rows of very different size":
        x *= 10 ** torch.linspace(-4, 4, n, dtype=torch.float64)[torch.randperm(n)].unsqueeze(1)
    elif kind == "columns of very different size":
        x *= 10 ** torch.linspace(-4, 4, k, dtype=torch.float64)
    elif kind == "offset":
        x += 1000
    return x.float()


KINDS = ["plain", "rows of very different size", "columns of very different size", "offset"]
SOLVERS = pytest.mark.parametrize("solver", ["cg", "cg_flat"])


def solve(rule: pw.Rule, layer: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, dict[str, int]]:
    move = move_of(rule, layer, x, delta)
    return move, rule.health.of("")


@SOLVERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_move_is_right_or_counted(solver: str, kind: str, size: tuple[int, int], steps: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x, delta, layer = draw(kind, *size), torch.randn(size[0], 5), nn.Linear(size[1], 5, bias=seed == 0)
        energy = float(x.double().square().sum()) / min(size)
        rule = pw.ProxProp(tau=10.0**seed / energy, solver=solver, cg_steps=steps)
        move, events = solve(rule, layer, x, delta)
        expected, _ = solve(rule, layer.double(), x.double(), delta.double())
        assert events.keys() <= {health.FLOAT64}
        assert relative(move.double(), expected) < 1e-4, events
        if kind == "plain" and steps <= 3:
            assert not events


@SOLVERS
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e10, 1e15])
def test_inputs_whose_squares_leave_the_range(solver: str, scale: float) -> None:
    for n, k in SIZES:
        torch.manual_seed(n)
        x, delta, layer = torch.randn(n, k), torch.randn(n, 3) * 1e-3, nn.Linear(k, 3, bias=False)
        moves = []
        for factor in (1.0, scale):
            rule = pw.ProxProp(tau=1.0 / n / factor / factor, solver=solver)
            move, events = solve(rule, layer, x * factor, delta)
            moves.append(move.double() * factor)
            assert events.keys() <= {health.FLOAT64}
        assert relative(moves[1], moves[0]) < 1e-4


@SOLVERS
def test_inputs_that_are_all_zero_make_no_move_and_no_event(solver: str) -> None:
    for n in (3, 12):
        move, events = solve(
            pw.ProxProp(solver=solver), nn.Linear(6, 2, bias=False), torch.zeros(n, 6), torch.randn(n, 2)
        )
        assert not move.any()
        assert not events


@pytest.mark.parametrize("steps", [3, 5, 10])
@pytest.mark.parametrize("offset", [0.5, 1.0, 10.0])
def test_rows_with_an_offset_do_not_lose_steps_of_the_iteration(offset: float, steps: int) -> None:
    # in float32 the direction of the mean, once removed, comes back from rounding and costs a step
    torch.manual_seed(0)
    x, delta, layer = torch.randn(256, 900) + offset, torch.randn(256, 200), nn.Linear(900, 200)
    rule = pw.ProxProp(tau=10.0, solver="cg", cg_steps=steps)
    move, events = solve(rule, layer, x, delta)
    expected, _ = solve(rule, layer.double(), x.double(), delta.double())
    assert relative(move.double(), expected) < 1e-4
    assert events.keys() <= {health.FLOAT64}


def test_many_positions_of_a_convolution_stay_in_float32() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(32, 8, 32, 32).relu(), nn.Conv2d(8, 16, 5, padding=2)
    delta = torch.randn(32, 16, 32, 32)
    rule = pw.ProxProp(solver="cg")
    move, events = solve(rule, layer, x, delta)
    assert not events
    expected, _ = solve(rule, layer.double(), x.double(), delta.double())
    assert relative(move.double(), expected) < 1e-4


def test_a_gradient_for_solves_is_added_up_in_short_chains() -> None:
    # torch adds up all positions of a batch in one chain, whose rounding is about 1e-5 here
    torch.manual_seed(0)
    x, layer, delta = torch.randn(200, 3, 32, 32), nn.Conv2d(3, 8, 5, padding=2), torch.randn(200, 8, 32, 32)
    found = []

    class Keeping(pw.Backprop):
        def update(self, call: LinearCall) -> Update:
            found.append(call.precise_gradient(delta).weight)
            return super().update(call)

    move_of(Keeping(), layer, x, delta)
    wide = nn.Conv2d(3, 8, 5, padding=2).double()
    wide(x.double()).backward(delta.double())
    assert relative(found[0].double(), wide.weight.grad) < 3e-6


@SOLVERS
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_what_a_gram_has_lost_beside_the_bias_is_noticed(solver: str, steps: int, scale: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(256, 900) * torch.logspace(0, -4, 900) * scale
    delta = torch.randn(256, 40) * torch.logspace(0, -6, 40)
    layer = nn.Linear(900, 40)
    rule = pw.ProxProp(tau=200.0, solver=solver, cg_steps=steps)
    move, events = solve(rule, layer, x, delta)
    expected, _ = solve(rule, layer.double(), x.double(), delta.double())
    assert events.keys() <= {health.FLOAT64}
    assert relative(move.double(), expected) < 1e-4
