"""Scores one trial by its best metric and its time to a target, and chooses the best trial of a method.

All functions are pure, and take lines of the ledger (see `plywise.arena.scoring.records`).
"""

import math
from collections.abc import Iterable

from plywise.arena.scoring.records import TUNING, TrialRecord

CLOCKS = ("steps", "gradients", "cpu", "wall")
"""The units of time to target: steps, passes forward and backward, processor seconds, seconds."""


def find_best(line: TrialRecord) -> float:
    """Return the lowest validation metric that a trial ever measured; infinity if it measured none.

    Example:
        >>> find_best({"validation": [0.9, None, 0.2, 0.3]})
        0.2
    """
    return min((value for value in line["validation"] if value is not None), default=math.inf)


def find_early(line: TrialRecord, until: float) -> float:
    """The lowest validation metric that a trial measured within its first ``until`` steps, or infinity.

    Example:
        >>> find_early({"steps": [0, 10, 20], "validation": [0.9, 0.3, 0.1]}, 16)
        0.3
    """
    pairs = zip(line["steps"], line["validation"], strict=False)
    return min((value for step, value in pairs if value is not None and step <= until), default=math.inf)


def find_last(line: TrialRecord) -> float:
    """The validation metric that a trial ended with; infinity if it failed, since it did not get there."""
    if line["failure"] is not None or not line["validation"] or line["validation"][-1] is None:
        return math.inf
    return float(line["validation"][-1])


def is_trained(line: TrialRecord) -> bool:
    """Return whether a trial was measured after a step; measurements before say nothing about its method.

    Example:
        >>> is_trained({"steps": [0, 20]}), is_trained({"steps": [0]}), is_trained({"steps": []})
        (True, False, False)
    """
    return any(line["steps"])


def read_clock(line: TrialRecord, clock: str) -> list[float]:
    """Return the values of a clock at each measurement of a trial.

    Args:
        line: the trial.
        clock: one of `CLOCKS`; "gradients" is the steps times what a step of the method takes.

    Example:
        >>> read_clock({"steps": [0, 20], "gradients": 2.0}, "gradients")
        [0.0, 40.0]
    """
    if clock == "gradients":
        return [step * line["gradients"] for step in line["steps"]]
    return list(map(float, line[clock]))


def to_target(line: TrialRecord, target: float | None, clock: str = "steps") -> float:
    """Return the time at which a trial first measured a validation metric at or below the target.

    A trial that never did, because it was slow or because it failed, took infinitely long. One that failed
    after it had reached the target did reach it: a user who trains until the target would have stopped there.
    Its failure is reported beside, and `choose_best` avoids it.

    Args:
        line: the trial.
        target: the metric that counts as done; None counts as out of reach.
        clock: one of `CLOCKS`.

    Returns:
        The clock at that measurement, or infinity. Times between two measurements are not interpolated:
        intervals take the grid into account, see `plywise.arena.scoring.intervals.Timed`.

    Example:
        >>> line = {"steps": [0, 20, 40], "validation": [0.9, 0.4, 0.1], "cpu": [0.0, 1.5, 3.0]}
        >>> to_target(line, 0.4), to_target(line, 0.4, "cpu"), to_target(line, 0.05)
        (20.0, 1.5, inf)
    """
    if target is None:
        return math.inf
    values = line["steps" if clock == "gradients" else clock]
    for place, value in enumerate(line["validation"][: len(values)]):
        if value is not None and value <= target:
            return float(values[place]) * (line["gradients"] if clock == "gradients" else 1.0)
    return math.inf


def choose_best(lines: Iterable[TrialRecord], target: float | None) -> TrialRecord | None:
    """Choose the tuning trial whose numbers a method's final runs get.

    Among the trials that ended, the one that reached the target in the fewest steps; if none did, the one
    with the lowest best validation metric, which also decides between equals. Trials that failed come after
    all others. The test set has no say.

    Args:
        lines: trials of one method on one workload; other than tuning trials are passed over.
        target: the metric that counts as done; None: the best validation metric decides alone.

    Returns:
        The trial, or None if there is no tuning trial.
    """

    def rate(line: TrialRecord) -> tuple[bool, float, float, int]:
        failed = line["failure"] is not None
        return failed, to_target(line, target), find_best(line), line["trial"]

    return min((line for line in lines if line["purpose"] == TUNING), key=rate, default=None)
