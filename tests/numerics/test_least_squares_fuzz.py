"""Random problems: an answer is right to 1e-4, whatever it took, or as right as the plain gradient is."""

import math
import random

import pytest
import torch

from .problems import F32, Problem, draw_delta, draw_rows, with_ones

KINDS = ["normal", "relu", "pixels", "smooth", "binary", "scales", "10", "100", "1000", "10000"]


def draw_problem(rng: random.Random, seed: int, with_bias: bool) -> Problem:
    groups, c = rng.choice([1, 1, 3]), rng.choice([1, 3, 10, 70])
    n, k = rng.choice([1, 2, 3, 6, 17, 40, 64, 150, 300]), rng.choice([1, 2, 3, 4, 9, 30, 33, 64, 130])
    rows = draw_rows(rng.choice(KINDS), n, k, seed, groups)
    if not with_bias and rng.random() < 0.5:
        rows = with_ones(rows)
    delta = draw_delta(rng.choice(["normal", "constant", "centred", "teacher"]), rows, c, seed)
    if rng.random() < 0.2:
        rows, delta = rows.double(), delta.double()
    # with a bias, the column of ones has a scale of its own
    scale = rng.choice([1, 1e-2, 1e2] if with_bias else [1, 1, 1, 1e-30, 1e-20, 1e-9, 1e9, 1e19, 1e30])
    delta = delta * rng.choice([1, 1e-6] if abs(math.log10(scale)) > 3 else [1, 1, 1e-30, 1e30, 1e-6])
    rows = rows * scale
    energy = float(rows.double().square().sum()) / min(rows.shape[1:]) / groups
    return Problem(rows, delta, 10 ** rng.uniform(-6, 6) * energy)


def check(problem: Problem, definition: Problem, answer: torch.Tensor | None, events: list[str]) -> None:
    expected = definition.slow_solution()
    assert answer is not None
    assert len(events) <= 1
    if not 1e-30 < float(expected.norm()) < 1e37:
        return  # beyond float32
    # the size that an answer to Δ can have: where the true one is far smaller, its digits have cancelled
    delta, rows = definition.delta.double().norm(dim=(1, 2)), definition.rows.double().norm(dim=(1, 2))
    root = math.sqrt(definition.damping)
    possible = delta / root * (rows / root).clamp_max(1)
    size = torch.maximum(expected.norm(dim=(1, 2)), 1e-4 * possible)
    error = float(((answer.double() - expected).norm(dim=(1, 2)) / size.clamp_min(1e-300)).max())
    if problem.rows.dtype != F32:
        assert error < 1e-7
    elif events:
        assert error < 1e-5
    else:
        assert error < 1.2e-4 + 5 * definition.gradient_error()


@pytest.mark.parametrize("part", range(4))
def test_random_problems(part):
    rng = random.Random(part)
    for i in range(150):
        problem = draw_problem(rng, 1000 * part + i, with_bias=False)
        check(problem, problem, *problem.solve())


@pytest.mark.parametrize("part", range(4))
def test_random_problems_with_a_bias(part):
    rng = random.Random(100 + part)
    for i in range(100):
        problem = draw_problem(rng, 1000 * part + i, with_bias=True)
        check(problem, problem.with_ones(), *problem.solve_with_bias())
