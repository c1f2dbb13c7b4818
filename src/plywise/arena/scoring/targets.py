"""Makes the targets that runs must reach, and decides when a target is too easy to rank by.

All functions are pure, and take lines of the ledger (see `plywise.arena.scoring.records`).
"""

import math
import statistics
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from plywise.arena.scoring.records import TUNING, TrialRecord
from plywise.arena.scoring.score import find_best, find_early, to_target

SHARE = 0.15
"""Share of the baselines' tuning trials that reach a target which is made of them."""

STRICT_PLACE = 3
"""The best place among the baselines' trials that may set a target, even with few trials: the two best may be
lucky draws."""

ENOUGH = math.ceil(STRICT_PLACE / SHARE)
"""Tuning trials of the baselines from which a target is what `SHARE` of them reach; with fewer it is soft."""

EARLY = 0.8
"""A baseline must reach a value within this share of a run for it to become the target. Then a method that is
up to 1 / 0.8 times slower can still reach it, and a lucky last measurement sets no target."""


class Target(NamedTuple):
    """The validation metrics that runs must reach; None if nothing sets them yet.

    Attributes:
        strict: the target of rankings.
        loose: what a middling setting of the baselines reaches.
        stored: whether ``strict`` was there before the bench, and not taken from its own baselines.
        trials: tuning trials of the baselines in the bench.
        reached: how many of these reached ``strict``.
        naive: the metric of knowing nothing: by chance where that is known, else of untrained networks.
        best: the best metric that any trial of any method measured.
    """

    strict: float | None
    loose: float | None
    stored: bool
    trials: int = 0
    reached: int = 0
    naive: float | None = None
    best: float | None = None

    @property
    def ranks(self) -> bool:
        """Whether methods may be ranked by it: it is nearer to the best metric than to chance.

        Example:
            >>> Target(0.2, None, True, naive=0.9, best=0.1).ranks
            True
            >>> Target(0.7, None, True, naive=0.9, best=0.1).ranks
            False
        """
        if self.strict is None or self.naive is None or self.best is None:
            return True
        return abs(self.strict - self.naive) > abs(self.strict - self.best)

    @property
    def softness(self) -> list[str]:
        """Return phrases that say why the target is easy; none if it is not."""
        if self.strict is None:
            return []
        reasons = []
        if not self.stored and self.trials < ENOUGH:
            place = ORDINALS[min(STRICT_PLACE, self.trials)] if self.trials else "best"
            reasons.append(f"the {place} of {self.trials} trials")
        if self.naive is not None and self.naive <= self.strict:
            reasons.append("reached by knowing nothing")
        elif 2 * self.reached > self.trials:
            reasons.append(f"reached by {self.reached} of {self.trials} trials")
        return reasons


ORDINALS = {1: "best", 2: "2nd best", 3: "3rd best"}


def make_target(bench: dict[str, Any], workload: str, lines: Collection[TrialRecord]) -> Target:
    """Return the target of a workload in a bench: the stored one, or what its baselines' tuning trials give.

    Args:
        bench: what bench.json holds.
        workload: name of the workload.
        lines: the trials on it, of any method and purpose.
    """
    baselines = list_baselines(bench)
    about = bench["workloads"].get(workload, {})
    stored = about.get("target")
    strict = choose_target(lines, baselines) if stored is None else stored
    # a sweep over rates says nothing of what a middling setting reaches
    loose = None if bench.get("chosen") else choose_loose_target(lines, baselines)
    if loose is not None and strict is not None:
        loose = max(loose, strict)
    tuning = _list_tuning(lines, baselines)
    best = min(map(find_best, lines), default=math.inf)
    return Target(
        strict,
        loose,
        stored is not None,
        trials=len(tuning),
        reached=sum(math.isfinite(to_target(line, strict)) for line in tuning),
        naive=_measure_untrained(lines) if about.get("chance") is None else about["chance"],
        best=best if math.isfinite(best) else None,
    )


def list_baselines(bench: dict[str, Any]) -> set[str]:
    """Names of the established methods in a bench, null controls aside."""
    return {name for name, one in bench["methods"].items() if one.get("baseline") and not one.get("null")}


def choose_target(lines: Iterable[TrialRecord], baselines: Collection[str]) -> float | None:
    """Return the target of a workload without a stored one: what 15 % of the baselines' tuning trials reach.

    A trial counts by its best validation metric within the first 80 % of the steps. A quantile does not
    depend on the number of trials. With fewer than `ENOUGH` trials the third best is taken, since the best of
    few may be a lucky draw. Trials that measured nothing count as worse than all others. Only established
    methods set targets, so that no method of plywise sets one in its own favour.

    Args:
        lines: trials on one workload, of any method and purpose.
        baselines: names of the established methods.

    Returns:
        The target; where fewer trials measured anything, the worst of them; None without any.

    Example:
        >>> def trial(early: float, late: float) -> TrialRecord:
        ...     values = {"steps": [0, 50, 100], "validation": [0.9, early, late]}
        ...     return {"method": "sgd", "purpose": "tuning", **values}
        >>> choose_target([trial(0.4, 0.1), trial(0.3, 0.2), trial(0.2, 0.2), trial(0.5, 0.4)], {"sgd"})
        0.4
        >>> choose_target([trial(0.01 * place, 0.0) for place in range(1, 61)], {"sgd"})
        0.09
    """
    tuning = _list_tuning(lines, baselines)
    ordered = _list_early_values(tuning)
    place = max(STRICT_PLACE, math.ceil(SHARE * len(tuning) - 1e-9))
    return ordered[min(place, len(ordered)) - 1] if ordered else None


def choose_loose_target(lines: Iterable[TrialRecord], baselines: Collection[str]) -> float | None:
    """Return a target that a middling setting reaches: the median of the baselines' tuning trials.

    It distinguishes a method that is fast but ends too high from a slow one.

    Args:
        lines: trials on one workload, of any method and purpose.
        baselines: names of the established methods.

    Returns:
        The target, never below the strict one; None without any trial that measured something.

    Example:
        >>> def trial(value: float) -> TrialRecord:
        ...     return {"method": "sgd", "purpose": "tuning", "steps": [0, 100], "validation": [value, 0.0]}
        >>> choose_loose_target([trial(0.1), trial(0.3), trial(0.2), trial(0.5), trial(0.9)], {"sgd"})
        0.3
    """
    lines = list(lines)
    ordered, strict = _list_early_values(_list_tuning(lines, baselines)), choose_target(lines, baselines)
    return None if strict is None else max(statistics.median_high(ordered), strict)


def _list_tuning(lines: Iterable[TrialRecord], baselines: Collection[str]) -> list[TrialRecord]:
    return [line for line in lines if line["purpose"] == TUNING and line["method"] in baselines]


def _list_early_values(trials: list[TrialRecord]) -> list[float]:
    """Return the best early validation metrics of the trials that measured any, ascending."""
    until = EARLY * max((line["steps"][-1] for line in trials if line["steps"]), default=0)
    best = [find_early(line, until) for line in trials]
    return sorted(value for value in best if math.isfinite(value))


def _measure_untrained(lines: Iterable[TrialRecord]) -> float | None:
    """Return the median validation metric before the first step; None where no trial measured it."""
    first = [line["validation"][0] for line in lines if line["validation"] and line["steps"][0] == 0]
    values = [value for value in first if value is not None]
    return statistics.median(values) if values else None
