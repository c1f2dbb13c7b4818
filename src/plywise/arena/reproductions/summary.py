"""Compares the paper's numbers with ours: means, intervals, verdicts, and the order of methods.

An interval holds one more run with a probability of 95 %, by Student's t. Losses are taken as logarithms:
their mean is the geometric one, and no interval reaches below 0. Papers report one run, so their number is
compared with this interval. Claims that one method beats another are judged by the differences of runs with
the same seed (see `plywise.arena.scoring.verdicts`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plywise.arena.reproductions.experiment import FULL, Arm, Claim, Experiment, Line, Measure
from plywise.arena.scoring.verdicts import ALIKE, BETTER, UNDECIDED, bound_mean, compare_runs

REPRODUCED, REVERSED = "as in the paper", "not as in the paper"


@dataclass(frozen=True)
class Outcome:
    """The results of an arm.

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
    """The result of a claim.

    Attributes:
        claim: it, in words.
        outcome: `REPRODUCED`, `UNDECIDED` or `REVERSED`.
    """

    claim: str
    outcome: str


def make_outcome(
    experiment: Experiment, size: str, arm: Arm, lines: Mapping[int, Line], tuning: Sequence[Line]
) -> Outcome:
    """Return an arm's runs, summed up.

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
    around = bound_mean(scaled, more=1)
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
        verdict=judge_number(arm.number, size, values, failures, limits),
        tuning={
            f"{line['rate']:g}": None if line["failure"] else experiment.measure.tuned_by(line)
            for line in tuning
        },
    )


def read(measure: Measure, lines: Mapping[int, Line]) -> dict[int, float]:
    """Return the measure of the runs that did not fail, by seed."""
    return {seed: measure.read(line) for seed, line in lines.items() if not line["failure"]}


def judge_number(
    number: float | None,
    size: str,
    values: Mapping[int, float],
    failures: Mapping[int, str],
    limits: tuple[float, float] | None,
) -> str:
    """Compare the paper's number with our runs, in words."""
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


def judge_claim(measure: Measure, claim: Claim, one: Mapping[int, Line], other: Mapping[int, Line]) -> Ruling:
    """Compare a claim with the runs of its two arms with the same seeds."""
    found = compare_runs(_list_merits(measure, one), _list_merits(measure, other), within=claim.within)
    if found == UNDECIDED:
        return Ruling(str(claim), UNDECIDED)
    wanted = BETTER if claim.within is None else ALIKE
    return Ruling(str(claim), REPRODUCED if found == wanted else REVERSED)


def _list_merits(measure: Measure, lines: Mapping[int, Line]) -> dict[int, float | None]:
    """Return what each run ended with, the higher the better; None for one that failed."""
    return {
        seed: None if line["failure"] else measure.better * measure.scale(measure.read(line))
        for seed, line in lines.items()
    }
