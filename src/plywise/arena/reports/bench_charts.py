"""Data of the charts in a bench's report, rounded to the digits that a picture can show."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from plywise._util.plain_json import drop_infinite, map_floats
from plywise.arena.scoring.ranking import MethodOnWorkload
from plywise.arena.scoring.records import TrialRecord
from plywise.arena.scoring.results import BenchResults
from plywise.arena.scoring.score import find_best, find_last

DIGITS = 3
"""Significant digits in a picture."""

POINTS = 12_000
"""The most points of all curves of a page together, unless each curve would have fewer than `FEWEST`."""

FEWEST, MOST = 8, 60
"""The fewest points of one curve."""

TRIALS = 500
"""The most tuning trials of a method that are drawn; if there are more, they are chosen evenly."""

BEFORE = "before training"
"""The method whose layers a bench's description of a workload shows."""


def thin(value: Any, digits: int = DIGITS) -> Any:
    """Round numbers at every level of a nested value; whole numbers stay as they are.

    Example:
        >>> thin([0.123456, {"a": 2000, "b": None}])
        [0.123, {'a': 2000, 'b': None}]
    """

    def shorten(number: float) -> float:
        short = float(f"{number:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short

    return map_floats(value, shorten)


def make_curves(results: BenchResults, track: str, workload: str) -> list[dict[str, Any]]:
    """Loss and validation metric of every method while it trains: median, least and greatest of the seeds.

    A run that failed counts as infinity after its last measurement, and what is infinite is None.

    Returns:
        For each method its ``name``, ``steps``, ``cpu`` and ``wall`` (medians at those steps), ``gradients``
        a step, ``loss`` and ``validation`` (three lists each), ``failed`` (pairs of the place in
        ``steps`` where a run was last measured and why it failed) and ``runs``.
    """
    points = min(max(POINTS // max(len(results.cells), 1), FEWEST), MOST)
    found = []
    for method in results.methods:
        cell = results.cells.get((track, workload, method))
        if cell is not None:
            found.append({"name": method, **_make_curve(cell.runs, points)})
    return found


def make_rates(results: BenchResults, workload: str) -> list[dict[str, Any]]:
    """Return the validation metric at the end of each tuning trial, by the first of the tuned numbers.

    Returns:
        For each method its ``name``, the ``number`` (lr, if there is one), its ``default``, and ``points``:
        value, metric (None where it failed) and why it failed.
    """
    found = []
    for method in results.methods:
        space = results.bench["methods"].get(method, {}).get("space") or {}
        trials = results.tuning.get((workload, method), [])
        if space and trials:
            number = "lr" if "lr" in space else next(iter(space))
            points = [
                (line["numbers"][number], find_last(line), line["failure"])
                for line in trials
                if number in line["numbers"]
            ]
            points.sort(key=lambda point: point[0])
            every = math.ceil(len(points) / TRIALS) or 1
            found.append(
                {
                    "name": method,
                    "number": number,
                    "default": space[number]["default"],
                    "points": thin(points[::every]),
                }
            )
    return found


def make_tuning_cost(results: BenchResults, workload: str) -> list[dict[str, Any]]:
    """Return the best result of a method after each number of trials, see `find_best_after_trials`."""
    found = []
    for method in results.methods:
        trials = results.tuning.get((workload, method), [])
        if trials:
            values = [math.inf if line["failure"] is not None else find_best(line) for line in trials]
            low, middle, high = zip(*find_best_after_trials(values), strict=True)
            each = {"low": low[:TRIALS], "middle": middle[:TRIALS], "high": high[:TRIALS]}
            found.append({"name": method, **thin(each)})
    return found


def find_best_after_trials(values: Sequence[float]) -> list[tuple[float, float, float]]:
    """Return for each k the quartiles, over all orders of the trials, of the best of the first k trials.

    So the result does not depend on the order in which trials were run. It is exact: of n values in ascending
    order, the best of k lies at or before the i-th in all but C(n-i, k) of C(n, k) choices.

    Example:
        >>> find_best_after_trials([3.0, 1.0, 2.0])
        [(1.0, 2.0, 3.0), (1.0, 1.0, 2.0), (1.0, 1.0, 1.0)]
    """
    ordered = sorted(values)
    low, middle, high = (
        [ordered[place - 1] for place in _find_places(len(values), share)] for share in (0.25, 0.5, 0.75)
    )
    return list(zip(low, middle, high, strict=True))


def _find_places(n: int, share: float) -> Iterator[int]:
    """Yield for k from 1 to n the first place at or before which the best of k lies in that share of choices.

    The place only moves forward, so all of them together take about n log n multiplications.
    """
    place = n
    for k in range(1, n + 1):
        while place > 1 and 1 - _find_later_share(n, place - 1, k) >= share - 1e-12:
            place -= 1
        yield place


def _find_later_share(n: int, place: int, k: int) -> float:
    """Compute C(n - place, k) / C(n, k), by whichever product has fewer factors."""
    few, many = sorted((place, k))
    return math.prod(max(n - many - j, 0) / (n - j) for j in range(few))


def make_layers(results: BenchResults, track: str, workload: str) -> list[dict[str, Any]]:
    """Return what is known about each layer: for each method ``layers`` (their names) and lists by ``kinds``.

    From the final runs, of several seeds the first one that said anything; or from the bench's description of
    the method; and from that of the workload, under the name `BEFORE`.
    """
    known = {BEFORE: results.bench["workloads"].get(workload, {}).get("layers")}
    for method in results.methods:
        cell = results.cells.get((track, workload, method))
        seeds = [run["layers"] for run in cell.runs if run.get("layers")] if cell else []
        known[method] = next(iter(seeds), results.bench["methods"].get(method, {}).get("layers"))
    return [
        {"name": name, "layers": one["names"], "kinds": {k: thin(v) for k, v in one.items() if k != "names"}}
        for name, one in known.items()
        if one
    ]


def find_front(rows: Iterable[MethodOnWorkload]) -> set[str]:
    """Find the Pareto front of one workload and track, in time, memory and metric.

    A method is beaten if another is as good in all three (processor seconds of a run, peak memory, and test
    metric or else validation metric at the end) and better in one. What was not measured does not count, on
    either side. A method without any metric is not in the front.
    """
    known = {
        row.method: (row.seconds, row.peak_mib, (row.test or row.validation).median)
        for row in rows
        if math.isfinite((row.test or row.validation).median)
    }
    return {
        name
        for name, own in known.items()
        if not any(_beats(other, own) for rival, other in known.items() if rival != name)
    }


def _beats(one: tuple[float | None, ...], other: tuple[float | None, ...]) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


class _Curves:
    """The runs of one method, by the steps at which they were measured."""

    def __init__(self, runs: list[TrialRecord]) -> None:
        self._runs = runs
        self._places = [{step: i for i, step in enumerate(run["steps"])} for run in runs]

    def find_values(self, name: str, step: int) -> list[float]:
        """Return what the runs have measured at a step."""
        found = [
            run[name][where[step]]
            for run, where in zip(self._runs, self._places, strict=True)
            if _has(run, name, where, step)
        ]
        return [value for value in found if value is not None]

    def count_failed(self, name: str, step: int) -> int:
        """Count the runs that had failed before a step, and have no value there."""
        return sum(
            run["failure"] is not None and step >= _find_last_step(run) and not _has(run, name, where, step)
            for run, where in zip(self._runs, self._places, strict=True)
        )

    def make_middle(self, name: str, steps: list[int]) -> list[float | None]:
        """Return the median at each step."""
        return [
            statistics.median(found) if (found := self.find_values(name, step)) else None for step in steps
        ]

    def make_spread(self, name: str, steps: list[int]) -> list[list[float | None]]:
        """Return median, least and greatest at each step; if there is only one run, only the first."""
        # a run that failed counts as infinite from there on: the median must not recover by its absence
        each = [
            [*self.find_values(name, step), *[math.inf] * self.count_failed(name, step)] for step in steps
        ]
        figures = (statistics.median, min, max) if len(self._runs) > 1 else (statistics.median,)
        return [[drop_infinite(figure(found)) if found else None for found in each] for figure in figures]


def _make_curve(runs: list[TrialRecord], points: int) -> dict[str, Any]:
    steps, curves = _thin_steps(runs, points), _Curves(runs)
    return {
        "steps": steps,
        "cpu": thin(curves.make_middle("cpu", steps)),
        "wall": thin(curves.make_middle("wall", steps)),
        "gradients": runs[0]["gradients"],
        "loss": thin(curves.make_spread("loss", steps)),
        "validation": thin(curves.make_spread("validation", steps)),
        "failed": [
            (
                steps.index(_find_last_step(run)) if run["steps"] else 0,
                f"seed {run['seed']}: {run['failure']}",
            )
            for run in runs
            if run["failure"] is not None
        ],
        "runs": len(runs),
    }


def _find_last_step(run: TrialRecord) -> int:
    return max(run["steps"], default=0)


def _thin_steps(runs: list[TrialRecord], points: int) -> list[int]:
    """Choose about this many of the steps at which some run was measured."""
    steps = sorted({step for run in runs for step in run["steps"]})
    every = math.ceil(len(steps) / points)
    last = {max(run["steps"]) for run in runs if run["steps"]}  # the end of a run is always kept
    return [step for i, step in enumerate(steps) if i % every == 0 or step in last]


def _has(run: TrialRecord, name: str, where: dict[int, int], step: int) -> bool:
    # a run that failed while it was measured has a step without the values that came after
    return step in where and where[step] < len(run[name])
