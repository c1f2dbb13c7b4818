"""The covariance of a layer's inputs at its edges: few rows, constants, large means, weak directions."""

import math

import pytest
import torch

from plywise.arena.diagnostics.covariance import FLOOR, MOST_GROUPS, Covariance
from plywise.errors import PlywiseError


def accumulate(*batches):
    covariance = Covariance()
    for rows in batches:
        covariance.add(rows[None])
    return covariance.summarize()


def make_cross(*scales):
    """Make rows ±s_i e_i: mean 0 and a covariance that is diagonal in s_i² / d."""
    rows = torch.diag(torch.tensor(scales, dtype=torch.float64))
    return torch.cat([rows, -rows])


def test_constant_features_are_counted_and_left_out():
    found = accumulate(torch.cat([make_cross(1, 2), torch.full((4, 3), 0.1)], 1))
    assert (found.constant, found.rank, found.at_least) == (3, 2, False)
    assert found.condition == pytest.approx(4.0, rel=1e-10)
    assert found.spread == pytest.approx(2.0)


def test_fewer_rows_than_features_give_a_lower_bound_of_the_condition_number():
    found = accumulate(make_cross(*range(1, 11))[:4])
    assert (found.rank, found.at_least, found.white) == (3, True, None)


def test_features_that_repeat_one_another_add_no_direction():
    found = accumulate(torch.cat([make_cross(1, 2), make_cross(1, 2)], 1))
    assert (found.rank, found.at_least) == (2, True)
    assert found.condition == pytest.approx(4.0)


def test_weak_directions_above_the_floor_count_and_noise_below_does_not():
    assert accumulate(make_cross(1, math.sqrt(FLOOR * 10))).condition == pytest.approx(0.1 / FLOOR)
    found = accumulate(make_cross(1, math.sqrt(FLOOR / 10)))
    assert (found.rank, found.at_least, found.condition) == (1, True, 1.0)


def test_a_large_mean_is_reported_and_does_not_change_the_condition_number():
    found = accumulate(make_cross(1, 4) + 1e6)
    assert found.condition == pytest.approx(16.0, rel=1e-9)
    assert found.mean_share == pytest.approx(2e12 / (2e12 + 8.5), rel=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_do_not_matter(size):
    found = accumulate((make_cross(1, 4, 5) * size).float())
    assert found.condition == pytest.approx(25.0, rel=1e-6)
    assert found.effective_rank == pytest.approx(42**2 / (1 + 256 + 625), rel=1e-6)


@pytest.mark.parametrize("rows", [torch.ones(5, 3), torch.randn(1, 3), torch.zeros(4, 3)])
def test_rows_that_never_vary_have_no_condition_number(rows):
    found = accumulate(rows)
    assert (found.condition, found.effective_rank, found.spread) == (None, None, None)
    assert (found.constant, found.rank) == (3, 0)


def test_without_rows_nothing_is_reported():
    assert accumulate() is None
    assert accumulate(torch.ones(0, 3)) is None


def test_an_empty_batch_changes_nothing():
    rows = torch.randn(9, 3)
    assert accumulate(rows, rows[:0]) == accumulate(rows)


def test_non_finite_rows_are_refused():
    with pytest.raises(PlywiseError, match="NaN or infinity"):
        accumulate(torch.tensor([[1.0], [float("inf")]]))


def test_the_worst_group_is_reported():
    covariance = Covariance()
    covariance.add(torch.stack([make_cross(1, 2), make_cross(1, 9), make_cross(1, 3)]))
    assert covariance.summarize().condition == pytest.approx(81.0)
    assert MOST_GROUPS >= 3
