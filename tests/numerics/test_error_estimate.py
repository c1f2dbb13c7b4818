"""The estimated error against the real one, where float32 is the only thing that is wrong."""

import math

import pytest
import torch

from plywise.numerics.damped_system import DampedSystem, Solution
from plywise.numerics.error_estimate import bound_square_error, estimate_square_errors

from .problems import F32, F64, Problem, draw_delta, draw_rows, relative, with_ones


def estimate_square_error(system: DampedSystem, solution: Solution, columns: int):
    return estimate_square_errors(system, solution, [(0, columns)])[0]


def solve(problem: Problem, dtype: torch.dtype = F32) -> tuple[torch.Tensor, DampedSystem, Solution]:
    gram, right = problem.build(dtype)
    system = DampedSystem.make(gram, right, problem.damping, problem.dual)
    solution = system.solve()
    answer = solution.answers[..., : right.shape[2]].double()
    return (problem.rows.double().mT @ answer if problem.dual else answer), system, solution


@pytest.mark.parametrize("kind", ["normal", "relu", "pixels", "smooth", "binary", "10", "100"])
@pytest.mark.parametrize("delta", ["normal", "constant", "teacher"])
@pytest.mark.parametrize(
    ("n", "k", "c"), [(64, 9, 3), (20, 25, 3), (64, 64, 3), (65, 60, 90), (60, 65, 90), (250, 200, 3)]
)
def test_the_estimate_follows_the_error(kind, delta, n, k, c):
    rows = with_ones(draw_rows(kind, n, k))
    problem = Problem(rows, draw_delta(delta, rows, c), 1.0)
    answer, system, solution = solve(problem)
    error = relative(answer, problem.slow_solution())
    estimate = math.sqrt(estimate_square_error(system, solution, c))
    assert error < max(2.5 * estimate, 1e-6)
    assert error > 0.02 * estimate


@pytest.mark.parametrize("kind", ["normal", "pixels", "100"])
@pytest.mark.parametrize(
    ("n", "k", "c"), [(64, 1, 2), (64, 2, 3), (64, 9, 3), (64, 30, 3), (64, 50, 9), (64, 80, 9), (9, 64, 2)]
)
def test_the_bound_is_above_the_estimate(kind, n, k, c):
    rows = draw_rows(kind, n, k)
    for damping in (1e-3, 1.0, 1e3):
        problem = Problem(rows, draw_delta("normal", rows, c), damping)
        _, system, solution = solve(problem)
        estimate = estimate_square_error(system, solution, c)
        # below, an error is the rounding of the right-hand sides, which the bound leaves out
        assert bound_square_error(system, solution) >= estimate or estimate < 1e-12


def test_each_group_has_an_estimate_of_its_own():
    rows = torch.cat([draw_rows(kind, 40, 20, i) for i, kind in enumerate(["normal", "pixels", "100"])])
    problem = Problem(rows, draw_delta("normal", rows, 3), 1.0)
    _, system, solution = solve(problem)
    together = estimate_square_error(system, solution, 3)
    for g in range(3):
        one = Problem(problem.rows[g : g + 1], problem.delta[g : g + 1], 1.0)
        _, system, solution = solve(one)
        alone = estimate_square_error(system, solution, 3)
        assert 0.2 < float(together[g]) / alone < 5  # other probes


def test_float64_is_as_accurate_as_its_roundoff_says():
    problem = Problem(draw_rows("pixels", 64, 60).double(), torch.randn(1, 64, 3, dtype=F64), 1.0)
    single, double = (estimate_square_error(*solve(problem, dtype)[1:], 3) for dtype in (F32, F64))
    assert math.sqrt(single / double) == pytest.approx(2.0**29, rel=0.01)


@pytest.mark.parametrize("dual", [False, True])
def test_no_factor_is_no_small_error(dual):
    gram = torch.eye(40)[None].clone()
    gram[0, 7, 7] = -2
    system = DampedSystem.make(gram, torch.randn(1, 40, 2), 1.0, dual)
    assert not estimate_square_error(system, system.solve(), 2) < 1
