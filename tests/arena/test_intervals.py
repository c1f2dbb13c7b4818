"""Intervals against slow definitions, exact enumeration and known truths."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plywise.arena.scoring.intervals import (
    Interval,
    Timed,
    bound_mean_ratio,
    bound_ratio,
    draw_medians,
    find_confidence,
    find_limits,
    resample_times,
)

times = st.lists(st.one_of(st.floats(0.1, 100), st.just(math.inf)), min_size=1, max_size=7)


def make(*values: float, budget: float = 10.0, seed: int = 0) -> Timed:
    return resample_times(values, budget, np.random.default_rng(seed))


def slow_medians(values: list[float], count: int) -> list[float]:
    chance = random.Random(1)
    return [statistics.median(chance.choices(values, k=len(values))) for _ in range(count)]


@pytest.mark.parametrize("values", [[1, 2, 4], [1, 2, 4, 8], [3, math.inf, 1, 2, math.inf], [5]])
def test_resampled_medians_have_the_distribution_of_the_plain_definition(values):
    """Compared with the enumeration of all resamples."""
    every = [statistics.median(sample) for sample in itertools.product(values, repeat=len(values))]
    drawn = draw_medians(values, np.random.default_rng(0), 40_000)
    slow = slow_medians(values, 20_000)
    for value in set(every):
        share = every.count(value) / len(every)
        assert np.mean(drawn == value) == pytest.approx(share, abs=0.012)
        assert slow.count(value) / len(slow) == pytest.approx(share, abs=0.018)
    assert set(drawn) <= set(every)


@given(times)
def test_an_interval_holds_its_value_and_only_what_resamples_can_be(values):
    one = make(*values)
    low, high = find_limits(one.draws)
    assert min(values) <= low <= high <= max(values)
    assert one.value == statistics.median(values)
    assert not math.isnan(low)
    assert not math.isnan(high)


@given(times, st.floats(0.5, 8))
def test_intervals_scale_with_the_values(values, factor):
    one, other = make(*values), make(*(factor * value for value in values))
    assert other.value == pytest.approx(factor * one.value)
    assert find_limits(other.draws) == pytest.approx([factor * limit for limit in find_limits(one.draws)])


def test_three_seeds_give_their_range():
    for values in ([2, 1, 3], [2, 1, math.inf]):
        one = make(*values)
        assert (*find_limits(one.draws), one.value) == (1, max(values), 2)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_limits_leave_equal_tails(level):
    draws = np.arange(1.0, 1001)
    low, high = find_limits(np.random.default_rng(0).permutation(draws), level)
    assert np.mean((draws > low) & (draws <= high)) == pytest.approx(level)
    assert low == pytest.approx(1000 - high)


@pytest.mark.parametrize("seeds", [3, 5, 7])
def test_ranges_cover_the_true_median_as_often_as_claimed(seeds):
    generator = np.random.default_rng(0)
    values = generator.lognormal(0, 1, (4000, seeds))
    inside = (values.min(1) <= 1) & (values.max(1) >= 1)
    assert inside.mean() == pytest.approx(find_confidence(seeds), abs=0.03)


def test_intervals_of_many_seeds_cover_the_true_median():
    generator = np.random.default_rng(0)
    found = [find_limits(draw_medians(generator.lognormal(0, 1, 25), generator)) for _ in range(300)]
    assert 0.90 <= np.mean([low <= 1 <= high for low, high in found]) <= 1


def test_ratios_over_workloads_cover_the_true_ratio():
    generator = np.random.default_rng(0)

    def draw(middle: float) -> Timed:
        return resample_times(generator.lognormal(math.log(middle), 0.3, 9), 1e9, generator)

    found = [bound_mean_ratio([(draw(2), draw(1)) for _ in range(4)]) for _ in range(200)]
    assert 0.88 <= np.mean([one.low <= 2 <= one.high for one in found]) <= 1


def test_a_ratio_by_hand():
    assert bound_ratio(make(2.0), make(4.0)) == Interval(0.5, 0.5, 0.5)
    low, value, high, mark = bound_ratio(make(1, 2, 3), make(1, 2, 3, seed=1))
    assert (low, value, high, mark) == (1 / 3, 1.0, 3.0, "")


def test_times_that_were_rounded_up_to_a_grid_leave_the_truth_within_the_limits():
    generator = np.random.default_rng(0)
    for _ in range(200):
        mine, other = generator.uniform(1, 9, 2)
        seen = [resample_times([math.ceil(time)] * 3, 10, generator, grid=1) for time in (mine, other)]
        ratio = bound_ratio(*seen)
        assert ratio.low <= mine / other <= ratio.high
        assert bound_mean_ratio([tuple(seen)])[:3] == pytest.approx(ratio[:3])


def test_a_miss_is_no_shorter_for_the_grid():
    missed, there = (resample_times([time], 10, np.random.default_rng(0), grid=1) for time in (math.inf, 4.0))
    assert bound_ratio(missed, there) == Interval(2.5, 2.5, math.inf, "≥")
    assert bound_ratio(there, missed) == Interval(0.0, 0.4, 0.4, "≤")
    start = resample_times([0.0], 10, np.random.default_rng(0), grid=1)
    assert bound_ratio(start, there) == Interval(0.0, 0.0, 0.0), "no time is negative"
    assert bound_ratio(there, there) == Interval(1.0, 1.0, 1.0)


def test_a_miss_gives_a_bound_and_never_a_time():
    missed, there = make(math.inf, budget=10), make(4.0)
    assert bound_ratio(missed, there) == Interval(2.5, 2.5, math.inf, "≥")
    assert bound_ratio(there, missed) == Interval(0.0, 0.4, 0.4, "≤")
    assert bound_ratio(missed, missed) is None


def test_some_misses_leave_a_median_but_no_upper_limit():
    low, value, high, mark = bound_ratio(make(2, 4, math.inf), make(4.0))
    assert (low, value, high, mark) == (0.5, 1.0, math.inf, "")


@given(times, times, st.integers(0, 5))
def test_a_ratio_lies_between_its_limits(mine, other, seed):
    budget = 101.0
    ratio = bound_ratio(make(*mine, budget=budget), make(*other, budget=budget, seed=seed + 1))
    both = math.isinf(statistics.median(mine)) and math.isinf(statistics.median(other))
    assert (ratio is None) == both
    assert both or ratio.low <= ratio.value <= ratio.high


@given(times, times)
def test_a_later_run_never_improves_a_ratio(mine, other):
    """Replacing a time by a miss moves no limit down."""
    peer = make(*other, budget=101.0, seed=9)
    worse = [*mine[:-1], math.inf]
    one, two = (
        bound_ratio(make(*mine, budget=101.0), peer),
        bound_ratio(make(*worse, budget=101.0), peer),
    )
    if one is not None and two is not None:
        assert two.low >= one.low - 1e-12
        assert two.high >= one.high


def test_the_geometric_mean_by_hand():
    found = bound_mean_ratio([(make(2.0), make(1.0)), (make(1.0), make(8.0))])
    assert found[:3] == pytest.approx((0.5, 0.5, 0.5))
    assert bound_mean_ratio([]) is None


def test_the_geometric_mean_against_the_plain_definition():
    """Seeds drawn again within each workload and method, one number at a time."""
    chance = random.Random(0)
    data = [
        ([chance.uniform(1, 3) for _ in range(7)], [chance.uniform(2, 4) for _ in range(7)]) for _ in range(3)
    ]

    def figure(choose) -> float:
        ratios = [statistics.median(choose(mine)) / statistics.median(choose(other)) for mine, other in data]
        return math.prod(ratios) ** (1 / len(ratios))

    slow = sorted(figure(lambda values: chance.choices(values, k=len(values))) for _ in range(4000))
    generator = np.random.default_rng(0)
    found = bound_mean_ratio(
        [tuple(resample_times(values, 1e9, generator) for values in pair) for pair in data]
    )
    assert found.value == pytest.approx(figure(lambda values: values))
    assert found.low == pytest.approx(slow[100], rel=0.03)
    assert found.high == pytest.approx(slow[3900], rel=0.03)


def test_the_geometric_mean_keeps_bounds_and_omits_empty_ratios():
    missed, there, peer = make(math.inf, budget=4.0), make(1.0), make(1.0)
    lower = bound_mean_ratio([(missed, peer), (there, peer)])
    assert (lower.value, lower.high, lower.mark) == (pytest.approx(2.0), math.inf, "≥")
    upper = bound_mean_ratio([(there, missed), (there, peer)])
    assert (upper.low, upper.value, upper.mark) == (0.0, pytest.approx(0.5), "≤")
    assert bound_mean_ratio([(missed, missed), (there, peer)]) == bound_ratio(there, peer)
    both = bound_mean_ratio([(missed, peer), (there, missed)])
    assert (both.low, both.high, both.mark) == (0.0, math.inf, "?")


def test_at_the_target_from_the_start():
    assert bound_ratio(make(0.0), make(0.0)) == Interval(1.0, 1.0, 1.0)
    assert bound_ratio(make(1.0), make(0.0)).value == math.inf


def test_a_difference_needs_both_the_interval_and_the_noise():
    assert Interval(0.4, 0.5, 0.9).apart(1.5)
    assert not Interval(0.4, 0.5, 1.1).apart()
    assert not Interval(0.6, 0.7, 0.9).apart(1.5)
    assert not Interval(0.0, 0.5, 0.9, "?").apart()
    assert not Interval(0.4, 0.5, 0.9).apart(math.inf)


def test_the_same_seed_gives_the_same_interval():
    pairs = [(make(1, 2, math.inf), make(2, 3, 5, seed=4))]
    assert bound_mean_ratio(pairs) == bound_mean_ratio([(make(1, 2, math.inf), make(2, 3, 5, seed=4))])
