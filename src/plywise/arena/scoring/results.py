"""Sorts a bench's trials: final runs by track, workload and method, with their times to the targets."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from plywise.arena.scoring.intervals import Timed, resample_times
from plywise.arena.scoring.records import DEFAULTS, FINAL, TUNED, TUNING, TrialRecord, make_key
from plywise.arena.scoring.score import CLOCKS, read_clock, to_target
from plywise.arena.scoring.targets import Target, list_baselines, make_target

TRACKS = (TUNED, DEFAULTS)
"""The tracks, as reports order them."""


@dataclass(frozen=True)
class Cell:
    """The final runs of one method on one workload in one track, and their times to the strict target."""

    runs: list[TrialRecord]
    times: dict[str, Timed]


def _is_lost(cell: Cell) -> bool:
    """Tell whether every run of a cell failed before its target."""
    return all(run["failure"] is not None for run in cell.runs) and math.isinf(cell.times["steps"].value)


@dataclass(frozen=True)
class BenchResults:
    """A bench's trials in order.

    Attributes:
        bench: the bench's own description, as bench.json holds it.
        tracks: the tracks of the bench, tuned first.
        workloads: names of the workloads.
        methods: names of the methods.
        baselines: the established ones among them, null controls aside.
        nulls: null controls, and the method that each repeats.
        refused: pairs of workload and method that do not fit, and why.
        targets: by workload.
        cells: final runs by track, workload and method; only those with a run.
        tuning: tuning trials by workload and method, in their order; only those with a trial.
    """

    bench: dict[str, Any]
    tracks: list[str]
    workloads: list[str]
    methods: list[str]
    baselines: list[str]
    nulls: dict[str, str]
    refused: dict[tuple[str, str], str]
    targets: dict[str, Target]
    cells: dict[tuple[str, str, str], Cell]
    tuning: dict[tuple[str, str], list[TrialRecord]]

    @property
    def failed(self) -> list[str]:
        """The workloads on which every final run failed, and none reached the target before."""
        cells: dict[str, list[Cell]] = {}
        for (_, workload, _), cell in self.cells.items():
            cells.setdefault(workload, []).append(cell)
        return [name for name in self.workloads if name in cells and all(map(_is_lost, cells[name]))]

    @property
    def ranked(self) -> list[str]:
        """The workloads that methods may be ranked on: by their targets, and since some run succeeded."""
        failed = self.failed
        return [name for name in self.workloads if self.targets[name].ranks and name not in failed]

    @property
    def reference(self) -> str | None:
        """The method that costs of steps are compared with: a null control's original, or the first baseline.

        A bench may have a null control without its original, which is then no reference.
        """
        return next((name for name in [*self.nulls.values(), *self.baselines] if name in self.methods), None)

    def peer(self, workload: str, clock: str) -> Cell | None:
        """Return the baseline that all are compared with: the quickest tuned one, on this workload and clock.

        If no baseline was tuned, it is the quickest at its defaults; None without a baseline.
        """
        for track in TRACKS:
            found = [self.cells.get((track, workload, name)) for name in self.baselines]
            there = [cell for cell in found if cell is not None]
            if there:
                return min(there, key=lambda cell: cell.times[clock].value)
        return None

    def trials(self, workload: str, method: str) -> list[TrialRecord]:
        """Return all trials of a method on a workload, of whatever purpose."""
        cells = [self.cells.get((track, workload, method)) for track in TRACKS]
        finals = {make_key(run): run for cell in cells if cell for run in cell.runs}
        return [*self.tuning.get((workload, method), []), *finals.values()]


def gather_results(bench: dict[str, Any], lines: Iterable[TrialRecord]) -> BenchResults:
    """Sort the trials of a bench, whole or interrupted.

    A method with nothing to tune stands in the tuned track with its runs at the defaults.

    Args:
        bench: what bench.json holds.
        lines: trials, in any order.
    """
    lines = list(lines)
    workloads = list(dict.fromkeys([*bench["workloads"], *(line["workload"] for line in lines)]))
    methods = list(dict.fromkeys([*bench["methods"], *(line["method"] for line in lines)]))
    in_order = sorted(lines, key=lambda line: (line["trial"], line["seed"]))
    on: dict[str, list[TrialRecord]] = {name: [] for name in workloads}
    for line in in_order:
        on[line["workload"]].append(line)
    by_method = _sort_by_method(lines)
    finals = _find_finals(bench, in_order)
    targets = {name: make_target(bench, name, on[name]) for name in workloads}
    longest = {name: max((max(x["steps"], default=0) for x in on[name]), default=0) for name in workloads}
    generator, established = np.random.default_rng(0), list_baselines(bench)
    keys = ((track, workload, name) for track in TRACKS for workload in workloads for name in methods)
    return BenchResults(
        bench=bench,
        tracks=[track for track in TRACKS if any(key[0] == track for key in finals)] or bench["tracks"],
        workloads=workloads,
        methods=methods,
        baselines=[name for name in methods if name in established],
        nulls={name: one["null"] for name, one in bench["methods"].items() if one.get("null")},
        refused={(one["workload"], one["method"]): one["reason"] for one in bench.get("refused") or []},
        targets=targets,
        cells={
            key: _make_cell(
                finals[key],
                targets[key[1]].strict,
                (by_method[key[1:]], on[key[1]]),
                longest[key[1]],
                bench,
                generator,
            )
            for key in keys
            if key in finals
        },
        tuning=_sort_by_method(line for line in in_order if line["purpose"] == TUNING),
    )


def time_step(lines: Iterable[TrialRecord], clock: str = "cpu") -> float | None:
    """Return a step by a clock, as in processor seconds: the median of some trials; None if none was timed.

    Example:
        >>> time_step([{"steps": [0, 10], "cpu": [0.0, 0.5]}, {"steps": [0], "cpu": [0.0]}])
        0.05
    """
    each = []
    for line in lines:
        values = read_clock(line, clock)
        if values and line["steps"][len(values) - 1]:
            each.append(values[-1] / line["steps"][len(values) - 1])
    return statistics.median(each) if each else None


def _sort_by_method(lines: Iterable[TrialRecord]) -> dict[tuple[str, str], list[TrialRecord]]:
    found: dict[tuple[str, str], list[TrialRecord]] = {}
    for line in lines:
        found.setdefault((line["workload"], line["method"]), []).append(line)
    return found


def _find_finals(
    bench: dict[str, Any], lines: Iterable[TrialRecord]
) -> dict[tuple[str, str, str], list[TrialRecord]]:
    finals: dict[tuple[str, str, str], list[TrialRecord]] = {}
    for line in lines:
        if line["purpose"] == FINAL:
            finals.setdefault((line["track"], line["workload"], line["method"]), []).append(line)
    for (track, workload, method), runs in list(finals.items()):
        if track == DEFAULTS and TUNED in bench["tracks"] and not _get_space(bench, method):
            finals.setdefault((TUNED, workload, method), runs)
    return finals


def _get_space(bench: dict[str, Any], method: str) -> dict[str, Any]:
    # a method that bench.json does not know of counts as one with something to tune
    return bench["methods"].get(method, {"space": {"?": None}}).get("space") or {}


def _make_cell(
    runs: list[TrialRecord],
    target: float | None,
    others: tuple[list[TrialRecord], ...],
    longest: int,
    bench: dict[str, Any],
    generator: np.random.Generator,
) -> Cell:
    """Return a cell; ``others`` are the trials of its method, and all on its workload."""
    about = bench["workloads"].get(runs[0]["workload"], {})
    steps, between = about.get("steps") or longest, about.get("measure_every") or 0
    times = {}
    for clock in CLOCKS:
        # a method whose every run failed before its first measured step is given the others' pace
        paces = (time_step(lines, clock) for lines in (runs, *others))
        pace = next((pace for pace in paces if pace is not None), 0.0)
        values = [to_target(run, target, clock) for run in runs]
        times[clock] = resample_times(values, steps * pace, generator, between * pace)
    return Cell(runs, times)
