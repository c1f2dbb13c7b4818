"""Intervals of figures by resampling seeds, where a miss is infinite.

The stratified bootstrap: the seeds of each method on each workload are drawn again, with replacement and
among themselves, the figure is computed again, a thousand times over; the interval holds the middle 95 % of
the results. Infinite times need no exception, for medians and ordered values are defined for them.

Times lie on a grid: a run is measured at intervals, and it reached the target somewhere between two
measurements. Seeds with equal times may differ within an interval. So limits of quotients are widened by
one step of the grid, see `lower_ratio`.

The interval of a median of few seeds is at most as certain as the range of the seeds, see `find_confidence`.
The report says this beside every interval.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]
"""A figure for each resample: (draws,)."""

COUNT = 1000
"""Resamples."""

LEVEL = 0.95
"""Share of the resamples that an interval holds."""


class Interval(NamedTuple):
    """A figure between its limits.

    Attributes:
        low: the lower limit.
        value: the figure of the data themselves.
        high: the upper limit.
        mark: ≥ or ≤ if a miss makes the value a bound; ? if misses act in both directions; else empty.
    """

    low: float
    value: float
    high: float
    mark: str = ""

    def apart(self, noise: float = 1.0) -> bool:
        """Return whether a ratio differs from 1 beyond noise.

        The interval must not contain 1, and the value must be further from 1 than ``noise``, the furthest
        limit of a null control.

        Example:
            >>> Interval(1.2, 1.5, 1.9).apart(), Interval(1.2, 1.5, 1.9).apart(1.6)
            (True, False)
            >>> Interval(0.9, 1.5, 1.9).apart()
            False
        """
        sided = self.high < 1 or self.low > 1
        return sided and self.mark != "?" and not 1 / noise <= self.value <= noise


@dataclass(frozen=True)
class Timed:
    """The median time of one method on one workload, as measured and as resampled.

    Attributes:
        value: the median; infinity where half of the runs missed.
        draws: the median of each resample.
        budget: the time that the whole run takes: a miss took an unknown time more than that.
        grid: the time between two measurements: a run may have reached the target this much earlier than
            measured.
    """

    value: float
    draws: Draws
    budget: float
    grid: float = 0.0


def find_confidence(seeds: int) -> float:
    """With which probability the range of ``seeds`` independent values holds the true median.

    Each value is as likely above it as below: all on one side has the probability 2^(1-seeds).

    Example:
        >>> find_confidence(3), find_confidence(5)
        (0.75, 0.9375)
    """
    return 1 - 2.0 ** (1 - seeds)


def draw_medians(values: Sequence[float], generator: np.random.Generator, count: int = COUNT) -> Draws:
    """Medians of resamples of some values, infinite ones among them.

    Args:
        values: one or more numbers; infinity is allowed, NaN is not.
        generator: where the randomness comes from.
        count: how many resamples.

    Returns:
        ``count`` medians. The median of an even number of values is the mean of the middle two.

    Example:
        >>> sorted(set(draw_medians([1, 2, float("inf")], np.random.default_rng(0)).tolist()))
        [1.0, 2.0, inf]
    """
    data = np.asarray(values, dtype=np.float64)
    drawn = data[generator.integers(len(data), size=(count, len(data)))]
    return np.asarray(np.median(drawn, axis=1))


def find_limits(draws: Draws, level: float = LEVEL) -> tuple[float, float]:
    """Return the limits of the middle ``level`` of the draws; both are among the draws.

    Nothing is interpolated, since there is nothing between a number and infinity.

    Example:
        >>> find_limits(np.array([1.0, 2.0, 3.0, np.inf]), 0.5)
        (1.0, 3.0)
    """
    ordered = np.sort(draws)
    tail = (1 - level) / 2
    low = max(math.ceil(tail * len(ordered) - 1e-9) - 1, 0)
    high = max(math.ceil((1 - tail) * len(ordered) - 1e-9) - 1, 0)
    return float(ordered[low]), float(ordered[high])


def resample_times(
    values: Sequence[float], budget: float, generator: np.random.Generator, grid: float = 0.0
) -> Timed:
    """Times to a target, resampled.

    Args:
        values: time of each seed, infinity where it missed.
        budget: the time that a whole run takes.
        generator: where the randomness comes from.
        grid: the time between two measurements; 0: the times are exact.
    """
    return Timed(statistics.median(values), draw_medians(values, generator), budget, grid)


def bound_ratio(mine: Timed, other: Timed) -> Interval | None:
    """Return the quotient of two median times, of which either may be a miss.

    A miss took longer than the whole run, by an unknown time. So a missed numerator gives a
    lower bound (marked ≥), a missed denominator an upper one (≤), with the run's whole budget in the miss's
    place. The limits count a miss as its budget where that is the lesser quotient, and as infinity where it
    is the greater one, so that the interval never claims more than is known. They hold all that lies between
    two measurements, too; times are 1 over themselves all the same.

    Returns:
        The interval; None if both missed, which leaves nothing to compare.
    """
    missed = math.isinf(mine.value), math.isinf(other.value)
    if all(missed):
        return None
    low, _ = find_limits(lower_ratio(mine, other))
    _, high = find_limits(upper_ratio(mine, other))
    above = mine.budget if missed[0] else mine.value
    below = other.budget if missed[1] else other.value
    value = float(_divide(np.array(above), np.array(below)))
    return Interval(low, value, high, "≥" if missed[0] else "≤" if missed[1] else "")


def bound_mean_ratio(pairs: Sequence[tuple[Timed, Timed]]) -> Interval | None:
    """Return the geometric mean of quotients over workloads; misses enter as in `bound_ratio`.

    Pairs where both missed say nothing and are left out; reports show how many pairs remain.

    Returns:
        The interval, marked ≥ or ≤ where a miss is in it, and ? where misses of both kinds are; None
        without a pair to compare.
    """
    single = [(pair, ratio) for pair in pairs if (ratio := bound_ratio(*pair)) is not None]
    if not single:
        return None
    value = _compute_geometric_mean(np.array([[ratio.value] for _, ratio in single]), 0.0)[0]
    low, _ = find_limits(_compute_geometric_mean(np.stack([lower_ratio(*pair) for pair, _ in single]), 0.0))
    _, high = find_limits(
        _compute_geometric_mean(np.stack([upper_ratio(*pair) for pair, _ in single]), math.inf)
    )
    marks = {ratio.mark for _, ratio in single} - {""}
    return Interval(low, float(value), high, "".join(marks) if len(marks) < 2 else "?")


def lower_ratio(mine: Timed, other: Timed) -> Draws:
    """Return resampled quotients, with misses and steps of the grid counted in favour of the numerator."""
    if mine is other:
        return np.ones_like(mine.draws)
    return _divide(_find_shortest(mine), other.draws)


def upper_ratio(mine: Timed, other: Timed) -> Draws:
    """Return resampled quotients, with misses and steps of the grid counted against the numerator."""
    if mine is other:
        return np.ones_like(mine.draws)
    return _divide(mine.draws, _find_shortest(other))


def _find_shortest(one: Timed) -> Draws:
    """The shortest that the resampled times may be: the whole run for a miss, else the measurement before."""
    return np.where(np.isinf(one.draws), one.budget, np.maximum(one.draws - one.grid, 0.0))


def _divide(above: Draws, below: Draws) -> Draws:
    """Divide times: x/inf is 0, inf/x is inf; 0/0, two runs that started at the target, is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(above == below, 1.0, above / below)


def _compute_geometric_mean(ratios: NDArray[np.float64], unknown: float) -> Draws:
    """Geometric means down the columns; ``unknown`` where both 0 and infinity are in a column."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.exp(np.log(ratios).mean(axis=0))
    return np.where(np.isnan(means), unknown, means)
