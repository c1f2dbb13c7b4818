"""Decides which of two methods ended better, by the differences of their runs with the same seed.

`plywise bench` compares test metrics so, and `plywise reproduce` the claims of papers. Intervals are
Student's: ``mean ± t · s · √(more + 1/n)`` of n values. Times to a target are compared otherwise, by
resampling (see `plywise.arena.scoring.intervals`): a run that missed took infinitely long, and infinity has
no mean.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond 30 the last is a little wide."""

BETTER, ALIKE, WORSE, UNDECIDED = "better", "alike", "worse", "undecided"

Runs = Mapping[int, float | None]
"""The last metric of each run by seed; None if it failed."""


def student(freedom: int) -> float:
    """Return the factor of a 95 % interval.

    Example:
        >>> student(2)
        4.303
    """
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def bound_mean(values: Sequence[float], more: float = 0.0) -> tuple[float, float] | None:
    """Limits around the mean; None with fewer than two values.

    Args:
        values: independent measurements.
        more: 1 for where one more is expected, 0 for where their mean is.

    Example:
        >>> [round(limit, 2) for limit in bound_mean([1.0, 2.0, 3.0])]
        [-0.48, 4.48]
    """
    n = len(values)
    if n < 2:
        return None
    half = student(n - 1) * statistics.stdev(values) * math.sqrt(more + 1 / n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def compare_runs(ours: Runs, theirs: Runs, *, noise: float = 0.0, within: float | None = None) -> str:
    """Return whether the runs of one method ended better than those of another.

    A failure is worse than any number; it decides only where every run of one method failed and none of the
    other.

    Args:
        ours: its runs; the higher the better.
        theirs: the other's.
        noise: how large a mean difference says nothing (see `find_noise`).
        within: differences up to this count as none.

    Returns:
        `BETTER` or `WORSE` where the interval of the mean difference leaves 0, or all differences up to
        ``within``, out; `ALIKE` where it holds no other differences than these; else `UNDECIDED`.

    Example:
        >>> compare_runs({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.0, 1: 1.1, 2: 1.3})
        'better'
    """
    differences = _subtract(ours, theirs)
    if len(differences) < max(len(ours), len(theirs)):
        whole = [None not in runs.values() for runs in (ours, theirs)]
        if differences or whole[0] == whole[1]:
            return UNDECIDED
        return BETTER if whole[0] else WORSE
    limits = bound_mean(differences)
    if limits is None:
        return UNDECIDED
    low, high = limits
    if within is not None and max(abs(low), abs(high)) <= within:
        return ALIKE
    if abs(statistics.fmean(differences)) <= noise:
        return UNDECIDED
    margin = within or 0.0
    return BETTER if low > margin else WORSE if high < -margin else UNDECIDED


def find_noise(control: Runs, original: Runs) -> float:
    """Return how far a null control is from its original in the mean; infinite where a run of them failed."""
    differences = _subtract(control, original)
    if not differences or len(differences) < len(control):
        return math.inf
    return abs(statistics.fmean(differences))


def _subtract(ours: Runs, theirs: Runs) -> list[float]:
    """Differences of the runs with the same seed, where neither failed."""
    pairs = [(ours[seed], theirs.get(seed)) for seed in sorted(ours)]
    return [one - other for one, other in pairs if one is not None and other is not None]
