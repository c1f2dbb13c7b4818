"""The short way through a small problem: as good as a slow definition, or no answer at all."""

import math

import pytest
import torch

from plywise.numerics.small_solve import SmallProblem, is_small, solve_small

from .problems import draw_delta, draw_rows

SHAPES = [
    (12, 5, 3),
    (6, 9, 4),
    (6, 6, 3),
    (1, 2, 2),
    (128, 65, 10),
    (64, 129, 32),
    (200, 20, 1),
    (120, 129, 8),
]


def solve_slowly(rows, target, damping):
    """Xᵀ in float64, from the rows themselves."""
    rows, target = rows.double(), target.double()
    width = rows.shape[1]
    system = torch.cat([rows, math.sqrt(float(damping)) * torch.eye(width, dtype=torch.float64)])
    right = torch.cat([target, target.new_zeros(width, target.shape[1])])
    return torch.linalg.lstsq(system, right, driver="gelsd").solution.T


def solve_quickly(rows, target, damping, has_ones=True, is_relative=False):
    """Xᵀ of rows whose last column is of ones, or None."""
    answer = solve_small(
        SmallProblem(rows[:, :-1] if has_ones else rows, target, has_ones, damping, is_relative)
    )
    if answer is None or answer.bias is None:
        return None if answer is None else answer.weight
    return torch.cat([answer.weight, answer.bias.unsqueeze(1)], 1)


def measure_error(answer, right):
    return float((answer - right).norm() / right.norm())


def draw(kind, shape, seed=0):
    n, k, c = shape
    rows = draw_rows(kind, n, k, seed, 1)[0].clone()
    rows[:, -1] = 1
    return rows, draw_delta("normal", rows.unsqueeze(0), c)[0]


@pytest.mark.parametrize("has_ones", [True, False])
@pytest.mark.parametrize("damping", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_answer_is_the_definition(shape, damping, dtype, has_ones):
    rows, target = (part.to(dtype) for part in draw("normal", shape))
    answer = solve_quickly(rows, target, damping, has_ones)
    assert answer is not None
    assert answer.dtype == dtype
    assert answer.is_contiguous()
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    assert measure_error(answer, solve_slowly(rows, target, damping)) < tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_relative_damping_is_a_part_of_the_energy(shape):
    rows, target = (part.double() for part in draw("relu", shape))
    part = 0.1 / min(shape[:2])
    slow = solve_slowly(rows, target, part * float(rows.square().sum()))
    answer = solve_quickly(rows, target, part, is_relative=True)
    assert answer is not None
    assert measure_error(answer, slow) < 1e-12


@pytest.mark.parametrize("kind", ["normal", "relu", "pixels", "3", "100", "10000"])
@pytest.mark.parametrize("damping", [1e-9, 1e-6, 1e-2, 1.0, 1e3])
def test_no_answer_is_wrong(kind, damping):
    for seed, shape in enumerate(SHAPES):
        rows, target = (part.float() for part in draw(kind, shape, seed))
        answer = solve_quickly(rows, target, damping)
        if answer is not None:
            slow = solve_slowly(rows, target, damping)
            assert measure_error(answer, slow) < 3e-5
            assert measure_error(answer[:, -1], slow[:, -1]) < 1e-4


def test_an_offset_of_many_deviations_is_refused():
    rows, target = draw("normal", (64, 65, 8))
    rows = rows.float() + 1e4
    rows[:, -1] = 1
    assert solve_quickly(rows, target.float(), 1.0) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_leaves_the_range_is_refused(bad):
    rows, target = (part.float() for part in draw("normal", (12, 5, 3)))
    rows[3, 2] = bad
    assert solve_quickly(rows, target, 1.0) is None
    assert solve_quickly(rows.T.contiguous(), rows.T[:, :2].contiguous(), 1.0, has_ones=False) is None


def test_singular_systems_and_zeros_are_refused():
    rows, target = (part.float() for part in draw("normal", (12, 5, 3)))
    assert solve_quickly(rows, target, 0.0) is None
    assert solve_quickly(torch.zeros_like(rows), target, 0.0, has_ones=False) is None
    assert solve_quickly(rows, torch.zeros_like(target), 1.0) is None
    assert solve_quickly(rows * 1e-30, target * 1e-30, 0.0, has_ones=False) is None


def test_many_dampings_in_turn_are_each_their_own():
    rows, target = (part.double() for part in draw("normal", (12, 5, 3)))
    for damping in [1.0 + step for step in range(40)] * 2:
        assert (
            measure_error(solve_quickly(rows, target, damping), solve_slowly(rows, target, damping)) < 1e-12
        )


def test_sizes():
    assert is_small(128, 129, 128)
    assert is_small(128, 785, 256)
    assert not is_small(256, 785, 1024)
    assert not is_small(2000, 2000, 1)
    assert not is_small(0, 5, 3)
    assert not is_small(4, 5, 0)
