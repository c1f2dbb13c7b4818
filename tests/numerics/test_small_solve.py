"""The short way through a small problem: as good as a slow definition, or no answer at all."""

import math

import pytest
import torch

from plywise.numerics.small_solve import is_small, solve_small

from .problems import draw_delta, draw_rows

SHAPES = [(12, 5, 3), (6, 9, 4), (6, 6, 3), (1, 2, 2), (128, 65, 10), (64, 129, 32), (200, 20, 1)]


def solve_slowly(rows, target, damping):
    """Xᵀ in float64, from the rows themselves."""
    rows, target = rows.double(), target.double()
    width = rows.shape[1]
    system = torch.cat([rows, math.sqrt(float(damping)) * torch.eye(width, dtype=torch.float64)])
    right = torch.cat([target, target.new_zeros(width, target.shape[1])])
    return torch.linalg.lstsq(system, right, driver="gelsd").solution.T


def measure_error(answer, right):
    return float((answer - right).norm() / right.norm())


def draw(kind, shape, seed=0):
    n, k, c = shape
    rows = draw_rows(kind, n, k, seed, 1)[0].clone()
    rows[:, -1] = 1
    return rows, draw_delta("normal", rows.unsqueeze(0), c)[0]


@pytest.mark.parametrize("damping", [1e-2, 1.0, torch.tensor([30.0])], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_answer_is_the_definition(shape, damping, dtype):
    rows, target = (part.to(dtype) for part in draw("normal", shape))
    answer = solve_small(rows, target, damping)
    assert answer is not None
    assert answer.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert measure_error(answer, solve_slowly(rows, target, damping)) < tolerance


@pytest.mark.parametrize("kind", ["normal", "relu", "pixels", "3", "100", "10000"])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0, 1e3])
def test_no_answer_is_wrong(kind, damping):
    for seed, shape in enumerate(SHAPES):
        rows, target = (part.float() for part in draw(kind, shape, seed))
        answer = solve_small(rows, target, damping)
        if answer is not None:
            slow = solve_slowly(rows, target, damping)
            assert measure_error(answer, slow) < 3e-5
            assert measure_error(answer[:, -1], slow[:, -1]) < 1e-4


def test_an_offset_of_many_deviations_is_refused():
    rows, target = draw("normal", (64, 65, 8))
    rows = rows.float() + 1e4
    rows[:, -1] = 1
    assert solve_small(rows, target.float(), 1.0) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_leaves_the_range_is_refused(bad):
    rows, target = (part.float() for part in draw("normal", (12, 5, 3)))
    rows[3, 2] = bad
    assert solve_small(rows, target, 1.0) is None
    assert solve_small(rows.T.contiguous(), rows.T[:, :2].contiguous(), 1.0) is None


def test_singular_systems_and_zeros_are_refused():
    rows, target = (part.float() for part in draw("normal", (12, 5, 3)))
    assert solve_small(rows, target, 0.0) is None
    assert solve_small(torch.zeros_like(rows), target, 0.0) is None
    assert solve_small(rows, torch.zeros_like(target), 1.0) is None
    assert solve_small(rows * 1e-30, target * 1e-30, torch.tensor([0.0])) is None


def test_sizes():
    assert is_small(128, 129, 128)
    assert not is_small(256, 785, 1024)
    assert not is_small(0, 5, 3)
