"""The solvers where the numbers run out: the ladder of fallbacks, degenerate inputs, float32."""

import math

import pytest
import torch
from torch import Tensor, nn

import plywise as pw
from plywise.engine import health
from plywise.engine.maps.convolution import Convolution

F64 = torch.float64


def move_of(
    rule: pw.Rule, layer: nn.Module, x: Tensor, delta: Tensor, on_nonfinite: str = "propagate"
) -> tuple[Tensor, dict[str, int]]:
    """``[D, bias]`` as (outputs, columns) and the events that were counted."""
    layer.zero_grad()
    rule.attach(layer, on_nonfinite=on_nonfinite)
    (layer(x) * delta).sum().backward()
    events = rule.health.of("")
    rule.detach()
    return torch.cat(
        [p.grad.flatten(1) if p.dim() > 1 else p.grad[:, None] for p in layer.parameters()], 1
    ), events


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def slow_ridge(A: Tensor, delta: Tensor, damping: float) -> Tensor:
    """In float64, whatever comes in, by a QR factorisation of the stacked problem: no Gram at all."""
    A, delta = A.to(F64), delta.to(F64)
    stacked = torch.cat([A, math.sqrt(damping) * torch.eye(A.shape[1], dtype=F64)])
    targets = torch.cat([delta, delta.new_zeros(A.shape[1], delta.shape[1])])
    return torch.linalg.lstsq(stacked, targets).solution.T


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.to(F64) - expected).norm() / expected.norm()).item()


# ---- the ladder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [200, 20])  # solved in inputs, in rows
def test_an_offset_costs_no_digits(n):
    torch.manual_seed(0)
    layer = nn.Linear(50, 4)
    # rows nearly equal, of squared size 5e7: rounding of a float32 Gram would outweigh 1/τ
    x, delta = 1e3 + torch.randn(n, 50), torch.randn(n, 4)
    move, events = move_of(pw.ProxProp(tau=100.0), layer, x, delta)
    assert events == {}
    assert relative(move, slow_ridge(with_ones(x), delta, 0.01)) < 1e-4


@pytest.mark.parametrize("n", [200, 20])
def test_nearly_equal_features_are_solved_in_float64(n):
    torch.manual_seed(0)
    layer = nn.Linear(50, 4)
    x, delta = torch.randn(n, 1) + 1e-4 * torch.randn(n, 50), torch.randn(n, 4)
    move, events = move_of(pw.ProxProp(tau=1e8), layer, x, delta)
    assert events == {health.FLOAT64: 1}
    assert relative(move, slow_ridge(with_ones(x), delta, 1e-8)) < 1e-4


@pytest.mark.parametrize("tau", [1e6, 1e10])
def test_a_wide_layer_of_few_smooth_rows_is_solved_in_float64(tau):
    """Whether or not its answer is rounded to float32 before it meets the rows."""
    torch.manual_seed(0)
    layer, n = nn.Linear(600, 300), 100
    x, delta = torch.randn(n, 600).cumsum(1) / 600 + 0.5, torch.randn(n, 300)
    move, events = move_of(pw.ProxProp(tau=tau), layer, x, delta)
    assert events == {health.FLOAT64: 1}
    assert relative(move, slow_ridge(with_ones(x), delta, 1 / tau)) < 1e-4


def test_float32_that_is_well_conditioned_stays_in_float32():
    torch.manual_seed(0)
    x, delta = torch.rand(64, 20), torch.randn(64, 3)
    move, events = move_of(pw.ProxProp(), nn.Linear(20, 3), x, delta)
    assert events == {}
    assert relative(move, slow_ridge(with_ones(x), delta, 1.0)) < 1e-5


def test_a_channel_that_is_nearly_dead_stays_in_float32():
    """Taps that meet none of its few positive numbers have squares that are rounding, and may be negative."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 6, 8, 8, generator=generator)
    for channel, row in ((3, 0), (4, 7), (5, 7)):
        x[:, channel] = 0
        x[:, channel, row] = (0.03 * torch.randn(200, 8, generator=generator) - 0.06).relu()
    delta = torch.randn(200, 4, 8, 8, generator=generator) / len(x)
    conv = nn.Conv2d(6, 4, 5, padding=2)
    gram = Convolution((5, 5), (1, 1), (2, 2), (1, 1), 1).centred_gram(x)[0]
    assert gram.diagonal(dim1=1, dim2=2).min() < 0
    move, events = move_of(pw.ProxProp(), conv, x, delta)
    assert events == {}
    rows = torch.nn.functional.unfold(x, 5, padding=2).mT.flatten(0, 1)
    expected = slow_ridge(with_ones(rows), delta.flatten(2).mT.flatten(0, 1), 1.0)
    assert relative(move, expected) < 1e-4


@pytest.mark.parametrize("n", [9, 4])
def test_a_singular_gram_is_solved_by_clamped_eigenvalues(n):
    """Even in float64 there is no Cholesky factor: then the minimum-norm solution."""
    torch.manual_seed(0)
    x = torch.zeros(9, 4, dtype=F64)
    x[0, :2], x[1, 2], x[2, 3] = 2, 1, 4  # two columns alike: the second pivot is 4 - 2² = 0, exactly
    x, delta = x if n == 9 else x.T.clone(), torch.randn(n, 3, dtype=F64)
    move, events = move_of(pw.ProxProp(tau=1e300), nn.Linear(13 - n, 3, bias=False).double(), x, delta)
    assert events == {health.EIGENVALUES: 1}
    assert relative(move, (torch.linalg.pinv(x) @ delta).T) < 1e-4  # rounding over the floor, 1e-16 / 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [12, 4])
@pytest.mark.parametrize(
    "rule",
    [
        pw.ProxProp(),
        pw.ProxProp(solver="cg"),
        pw.ProxProp(solver="cg_official"),
        pw.Consequentialism(reduction="sum"),
        pw.Consequentialism(bias="centre", reduction="sum"),
        pw.BackMatching(mode="exact", reduction="sum", cap=None),
    ],
    ids=str,
)
def test_an_input_that_is_not_finite_falls_back_to_backpropagation(rule, bad, n):
    torch.manual_seed(0)
    x, delta, layer = torch.randn(n, 6), torch.randn(n, 3), nn.Linear(6, 3)
    x[1, 2] = bad
    plain, _ = move_of(pw.Backprop(), layer, x, delta)
    move, events = move_of(rule, layer, x, delta)
    assert events == {health.IDENTITY: 1}
    torch.testing.assert_close(move, plain, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(pw.NonFiniteError):
        move_of(rule, layer, x, delta, on_nonfinite="raise")
    rule.detach()


@pytest.mark.parametrize("rule", [pw.ProxProp(), pw.Consequentialism(), pw.ProxProp(solver="cg")], ids=str)
def test_one_counter_for_each_fallback(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    rule.attach(model, on_nonfinite="propagate")
    for _ in range(3):
        model(torch.full((5, 4), math.nan)).sum().backward()
    assert rule.health.total(health.IDENTITY) == 6
    assert rule.health.of("1") == {health.IDENTITY: 3}
    rule.detach()


# ---- degenerate inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [8, 3])
def test_rank_one_rows(n, bias):
    torch.manual_seed(0)
    x = torch.outer(torch.randn(n, dtype=F64), torch.randn(5, dtype=F64))
    delta = torch.randn(n, 2, dtype=F64)
    A = with_ones(x) if bias else x
    for rule, damping in [
        (pw.ProxProp(tau=2.0), 0.5),
        (pw.Consequentialism(eps=0.1, reduction="sum"), 0.1 * A.square().sum().item() / min(A.shape)),
    ]:
        move, _ = move_of(rule, nn.Linear(5, 2, bias=bias).double(), x, delta)
        assert relative(move, slow_ridge(A, delta, damping)) < 1e-10
    # for CG every residual beyond the rank is rounding: it must rest, not divide zero by zero
    move, events = move_of(
        pw.ProxProp(tau=2.0, solver="cg", cg_steps=9), nn.Linear(5, 2, bias=bias).double(), x, delta
    )
    assert relative(move, slow_ridge(A, delta, 0.5)) < 1e-10
    assert events == {}


RULES = {
    "ProxProp": lambda: pw.ProxProp(),
    "ProxProp cg": lambda: pw.ProxProp(solver="cg"),
    "ProxProp cg_official": lambda: pw.ProxProp(solver="cg_official"),
    "NLMS": lambda: pw.NLMS(reduction="sum"),
    "append": lambda: pw.Consequentialism(reduction="sum"),
    "centre": lambda: pw.Consequentialism(bias="centre", reduction="sum"),
    "exact": lambda: pw.BackMatching(mode="exact", reduction="sum", cap=None),
    "rate": lambda: pw.BackMatching(reduction="sum", cap=None),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_zero_rows_move_no_weight(name, bias):
    """A layer below which everything is dead: nothing to learn, but for the bias, and no 0/0."""
    torch.manual_seed(0)
    for dtype in (torch.float32, F64):
        for n, d in [(7, 3), (3, 7), (1, 2)]:
            move, _ = move_of(
                RULES[name](),
                nn.Linear(d, 2, bias=bias).to(dtype),
                torch.zeros(n, d).to(dtype),
                torch.randn(n, 2).to(dtype),
            )
            assert (move[:, :d] == 0).all()
            assert torch.isfinite(move).all()
            if bias:
                assert (move[:, d] != 0).all()


@pytest.mark.parametrize("name", RULES)
def test_constant_rows_make_no_giant_step(name):
    """All samples alike (or one only): centring leaves rounding, which must not become a direction.

    What a move does to the outputs it was made for is at most what was asked for, so ‖D‖ ‖a‖ is at most a
    small multiple of ‖Δ‖.
    """
    torch.manual_seed(0)
    for dtype in (torch.float32, F64):
        for n, d in [(1, 2), (5, 2), (7, 3), (64, 20), (5, 20), (33, 200)]:
            for value in (0.1, 0.3, 0.7, 1000.7):
                x, delta = torch.full((n, d), value, dtype=dtype), torch.randn(n, 3, dtype=dtype)
                move, _ = move_of(RULES[name](), nn.Linear(d, 3).to(dtype), x, delta)
                assert torch.isfinite(move).all(), (dtype, n, d, value)
                assert move[:, :d].norm() * x[0].norm() <= 10 * n * delta.norm(), (dtype, n, d, value)


@pytest.mark.parametrize("copies", [2, 3])  # 8 and 12 rows of rank 4 against 10 columns
def test_samples_twice_are_no_obstacle(copies):
    """C8b: with (almost) no damping, duplicates change nothing."""
    torch.manual_seed(0)
    x, delta, layer = torch.randn(4, 9, dtype=F64), torch.randn(4, 2, dtype=F64), nn.Linear(9, 2).double()
    rule = pw.Consequentialism(eps=1e-7, reduction="sum")
    once, _ = move_of(rule, layer, x, delta)
    again, _ = move_of(rule, layer, x.repeat(copies, 1), delta.repeat(copies, 1))
    assert relative(again, once) < 1e-6


# ---- float32 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "m", "tau", "tolerance"),
    [
        (256, 784, 1024, 1.0, 1e-4),
        (256, 784, 1024, 0.05, 1e-4),
        (500, 3072, 400, 0.05, 1e-4),
        (500, 3072, 400, 1.0, 1e-4),
        (500, 400, 100, 1.0, 5e-4),  # in inputs, where AᵀA is ill-conditioned: 1e-4 measured
    ],
)
def test_float32_is_accurate_at_real_sizes(n, d, m, tau, tolerance):
    """Relative error of the move against float64; below 1e-4 at the paper's sizes."""
    torch.manual_seed(0)
    layer, x = nn.Linear(d, m), torch.rand(n, d)
    delta = torch.randn(n, m) / n
    move, events = move_of(pw.ProxProp(tau=tau), layer, x, delta)
    A = with_ones(x).to(F64)
    dual = torch.linalg.solve(A @ A.T + torch.eye(n, dtype=F64) / tau, delta.to(F64))
    error = relative(move, dual.T @ A)
    print(f"{d} -> {m}, n={n}, tau={tau}: {error:.1e} {events}")
    assert error < tolerance
