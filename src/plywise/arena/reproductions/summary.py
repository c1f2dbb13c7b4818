"""The paper's numbers beside ours: means, intervals, verdicts, and whether methods are in the paper's order.

An interval is where one more run is expected with a probability of 95 %, by Student's t:
``mean ± t · s · √(1 + 1/n)`` of n seeds, losses as logarithms: their mean is the geometric one, and no
interval reaches below 0. Papers report one run, so that is what their number is held against. Claims that one
method beats another are judged by the differences of runs with the same seed: the interval of their mean,
``± t · s / √n``, leaves 0 out, or the claim is undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plywise.arena.reproductions.experiment import FULL, Arm, Claim, Experiment, Line, Measure

STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond 30 the last is a little wide."""

REPRODUCED, UNDECIDED, REVERSED = "as in the paper", "undecided", "not as in the paper"


@dataclass(frozen=True)
class Outcome:
    """What came of an arm.

    Attributes:
        arm: its name.
        rate: the learning rate of its runs.
        paper: the paper's number, `DIVERGED`, or None.
        values: of the runs that did not fail, by seed.
        failures: why the others failed, by seed.
        low, mean, high: the interval of one more run around the mean; limits are None with fewer than two
            values, the mean is None without any.
        verdict: the paper's number held against the interval.
        tuning: for each rate tried the number that rates were chosen by; None: it failed.
    """

    arm: str
    rate: float
    paper: float | None
    values: dict[int, float]
    failures: dict[int, str]
    low: float | None
    mean: float | None
    high: float | None
    verdict: str
    tuning: dict[str, float | None]


@dataclass(frozen=True)
class Ruling:
    """What came of a claim.

    Attributes:
        claim: it, in words.
        outcome: `REPRODUCED`, `UNDECIDED` or `REVERSED`.
    """

    claim: str
    outcome: str


def student(freedom: int) -> float:
    """The factor of a 95 % interval.

    Example:
        >>> student(2)
        4.303
    """
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def interval(values: Sequence[float], more: float) -> tuple[float, float] | None:
    """Limits around the mean: ``t · s · √(more + 1/n)``; None with fewer than two values.

    Args:
        values: independent measurements.
        more: 1 for where one more is expected, 0 for where their mean is.

    Example:
        >>> [round(limit, 2) for limit in interval([1.0, 2.0, 3.0], 0)]
        [-0.48, 4.48]
    """
    n = len(values)
    if n < 2:
        return None
    half = student(n - 1) * statistics.stdev(values) * math.sqrt(more + 1 / n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def outcome(
    experiment: Experiment, size: str, arm: Arm, lines: Mapping[int, Line], tuning: Sequence[Line]
) -> Outcome:
    """An arm's runs, summed up.

    Args:
        experiment: whose arm it is.
        size: the size it was run at.
        arm: the arm.
        lines: its final runs by seed, at least one.
        tuning: its tuning trials.
    """
    values = read(experiment.measure, lines)
    failures = {seed: line["failure"] for seed, line in lines.items() if line["failure"]}
    scaled, back = [experiment.measure.scale(value) for value in values.values()], experiment.measure.back
    around = interval(scaled, 1)
    limits = (back(around[0]), back(around[1])) if around else None
    return Outcome(
        arm.name,
        next(iter(lines.values()))["rate"],
        arm.number,
        values,
        failures,
        low=limits[0] if limits else None,
        mean=back(statistics.fmean(scaled)) if values else None,
        high=limits[1] if limits else None,
        verdict=verdict(arm.number, size, values, failures, limits),
        tuning={
            f"{line['rate']:g}": None if line["failure"] else experiment.measure.tuned_by(line)
            for line in tuning
        },
    )


def read(measure: Measure, lines: Mapping[int, Line]) -> dict[int, float]:
    """The measure of the runs that did not fail, by seed."""
    return {seed: measure.read(line) for seed, line in lines.items() if not line["failure"]}


def verdict(
    number: float | None,
    size: str,
    values: Mapping[int, float],
    failures: Mapping[int, str],
    limits: tuple[float, float] | None,
) -> str:
    """The paper's number held against our runs, in words."""
    if number is None:
        return "no number of the paper's is known"
    if math.isnan(number):
        if values:
            return f"the paper's diverged, {len(values)} of ours did not"
        return "diverged, as in the paper"
    if failures:
        return f"{len(failures)} of ours failed, the paper's did not"
    if size != FULL:
        return "not comparable at this size"
    if limits is None:
        return "one run has no interval"
    return "inside the interval" if limits[0] <= number <= limits[1] else "outside the interval"


def ruling(measure: Measure, claim: Claim, one: Mapping[int, Line], other: Mapping[int, Line]) -> Ruling:
    """A claim held against the runs of its two arms with the same seeds."""
    ours, theirs = read(measure, one), read(measure, other)
    both = sorted(ours.keys() & theirs.keys())
    if len(both) < max(len(one), len(other)):
        return Ruling(str(claim), _of_failures(claim, len(ours) == len(one), len(theirs) == len(other), both))
    limits = interval([measure.advantage(ours[seed], theirs[seed]) for seed in both], 0)
    if limits is None:
        return Ruling(str(claim), UNDECIDED)
    low, high = limits
    if claim.within is None:
        found = REPRODUCED if low > 0 else REVERSED if high < 0 else UNDECIDED
    elif max(abs(low), abs(high)) <= claim.within:
        found = REPRODUCED
    else:
        found = REVERSED if low > claim.within or high < -claim.within else UNDECIDED
    return Ruling(str(claim), found)


def _of_failures(claim: Claim, one_whole: bool, other_whole: bool, both: Sequence[int]) -> str:
    """A failure is worse than any number, where every run of one arm failed and none of the other."""
    if both or one_whole == other_whole:
        return UNDECIDED
    return REPRODUCED if one_whole and claim.within is None else REVERSED
