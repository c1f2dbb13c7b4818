"""`compare_methods` compares methods on each workload, `rank_methods` ranks them over all workloads.

A miss is infinite in medians, profiles and ranks. In a quotient it enters as the whole budget of the run,
which is a lower bound, and the figure is marked as a bound (see `intervals`). Times of misses never enter a
mean.
"""

import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from plywise.arena.scoring.intervals import Draws, Interval, Timed, bound_mean_ratio, bound_ratio, find_limits
from plywise.arena.scoring.records import TrialRecord
from plywise.arena.scoring.results import BenchResults, Cell, time_step
from plywise.arena.scoring.score import CLOCKS, find_last, is_trained, to_target

FURTHEST = 4.0
"""Performance profiles end at this ratio: a method four times as slow as the quickest gets no area."""


class Spread(NamedTuple):
    """Median, least and greatest of the seeds; a failed run counts as infinity."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class MethodOnWorkload:
    """One method on one workload in one track.

    Attributes:
        track: "tuned" or "defaults".
        workload: name of the workload.
        method: name of the method.
        runs: how many final runs there are.
        reached: how many of them reached the target.
        reached_loose: how many reached the loose target.
        failed: how many failed.
        times: the median time to the target by clock.
        ratios: that over the peer's; None where there is no peer, both missed, or the target is too soft.
        validation: validation metric at the end.
        test: test metric at the end; None where it was not read.
        step_cost: processor seconds of a step over the reference's; None where either was not timed.
        seconds: processor seconds of a whole run; None where no step was timed.
        peak_mib: memory at its peak, the median of the final runs that measured it: other numbers, such as a
            memory that is tuned, need other amounts. None where no run got as far as a measured step.
        numbers: the tuned numbers of the runs.
    """

    track: str
    workload: str
    method: str
    runs: int
    reached: int
    reached_loose: int
    failed: int
    times: dict[str, Interval]
    ratios: dict[str, Interval | None]
    validation: Spread
    test: Spread | None
    step_cost: float | None
    seconds: float | None
    peak_mib: float | None
    numbers: dict[str, float]


@dataclass(frozen=True)
class MethodRanking:
    """One method over all workloads, in one track and on one clock.

    Attributes:
        method: name of the method.
        rank: by the area under the profile; equals share a rank. None for a null control, which is shown
            and not ranked.
        level: whether another method shares the rank.
        area: area under the performance profile up to `FURTHEST`; 1 for the quickest everywhere.
        profile: time over the quickest method's, by workload; infinite for a miss, and on a workload that the
            method does not fit. A workload that it has not been run on yet is not there.
        ratio: geometric mean over workloads of the time over the peer's; None with nothing to compare.
        compared: number of workloads in ``ratio``.
        reached: number of final runs that reached the target.
        runs: number of final runs.
        end: mean over workloads of the place by the validation metric at the end, 1 the lowest; a workload
            that the method does not fit counts as a failed run.
    """

    method: str
    rank: Interval | None
    level: bool
    area: Interval
    profile: dict[str, float]
    ratio: Interval | None
    compared: int
    reached: int
    runs: int
    end: float


def compare_methods(results: BenchResults) -> list[MethodOnWorkload]:
    """Every method on every workload in every track, where it was run."""
    return [_make_row(results, key, cell) for key, cell in results.cells.items()]


def rank_methods(results: BenchResults, track: str, clock: str) -> list[MethodRanking]:
    """Return all methods of a track on a clock by the areas under their profiles, the best first.

    A method is judged on the workloads that it was run on and, as a miss, on those that it does not fit.
    Workloads whose targets are too easy do not count (see `plywise.arena.scoring.targets.Target.ranks`).
    Null controls set no best time and take no rank.

    Methods with equal areas, such as all that never reach a target, share a rank. They are ordered by the
    share of runs that reached the target, then by their last metric, see `MethodRanking.end`. Their times do
    not count, for the time of a miss is only a bound, which is lower for cheaper steps.
    """
    behind: dict[str, dict[str, tuple[float, Draws]]] = {}
    for workload in results.ranked:
        for method, one in _compare_to_quickest(results, track, workload, clock).items():
            behind.setdefault(method, {})[workload] = one
    values = {
        name: statistics.fmean(float(measure_area(np.array(r))) for r, _ in own.values())
        for name, own in behind.items()
    }
    draws = {
        name: np.mean([measure_area(d) for _, d in own.values()], axis=0) for name, own in behind.items()
    }
    ranked = [name for name in behind if name not in results.nulls]
    ends = _rank_ends(results, track)
    found = []
    for name, own in behind.items():
        pairs = _pair_with_peers(results, track, clock, name)
        runs = [run for workload in own for run in _get_runs(results, (track, workload, name))]
        found.append(
            MethodRanking(
                method=name,
                rank=_rank(name, ranked, values, draws) if name in ranked else None,
                level=name in ranked and sum(values[other] == values[name] for other in ranked) > 1,
                area=_make_interval(values[name], draws[name]),
                profile={workload: r for workload, (r, _) in own.items()},
                ratio=bound_mean_ratio(pairs),
                compared=sum(bound_ratio(*pair) is not None for pair in pairs),
                reached=sum(_reaches(run, results.targets[run["workload"]].strict) for run in runs),
                runs=len(runs),
                end=ends[name],
            )
        )
    return sorted(found, key=lambda one: (-one.area.value, -one.reached / max(one.runs, 1), one.end))


def find_null_ratio(results: BenchResults, track: str, clock: str, null: str) -> Interval | None:
    """Return a null control's times over those of its original, over all workloads: 1 except for noise."""
    return bound_mean_ratio(_pair_with_original(results, track, clock, null))


def measure_noise(results: BenchResults, track: str, clock: str) -> float:
    """Return how far from 1 the intervals of null controls reach: ratios nearer to 1 are not a difference.

    It is taken over the workloads where a null control and its original reached the target in all resamples,
    later than at the first measurement. On other workloads their times have no limits. Infinite where there
    is no such workload, so that nothing counts as a difference; 1 where there is no null control.

    This is the noise of a mean over all workloads, in which that of single ones cancels in part. For verdicts
    on a single workload there is `find_lone_noise`.
    """
    known = (_list_known_pairs(results, track, clock, null) for null in results.nulls)
    return max([1.0, *(_reach(bound_mean_ratio(pairs)) for pairs in known)])


def find_lone_noise(results: BenchResults, track: str, clock: str) -> float:
    """Return how far from 1 a null control reaches on any single workload: the noise of a single workload.

    Infinite or 1 where `measure_noise` is, for the same reasons.
    """
    known = (_list_known_pairs(results, track, clock, null) for null in results.nulls)
    return max(
        [1.0, *(max((_reach(bound_ratio(*pair)) for pair in pairs), default=math.inf) for pairs in known)]
    )


def measure_area(behind: Draws) -> Draws:
    """Areas under one workload's steps of performance profiles: 1 for the quickest, 0 from `FURTHEST` on.

    Example:
        >>> measure_area(np.array([1.0, 2.5, 7.0, float("inf")])).tolist()
        [1.0, 0.5, 0.0, 0.0]
    """
    return np.clip(FURTHEST - np.maximum(behind, 1.0), 0.0, None) / (FURTHEST - 1)


def _make_row(results: BenchResults, key: tuple[str, str, str], cell: Cell) -> MethodOnWorkload:
    track, workload, method = key
    target = results.targets[workload]
    peers = {clock: results.peer(workload, clock) if target.ranks else None for clock in CLOCKS}
    mine = results.trials(workload, method)
    cost = time_step(mine)
    plain = time_step(results.trials(workload, results.reference)) if results.reference else None
    peaks = [run["peak_mib"] for run in cell.runs if run.get("peak_mib") is not None and is_trained(run)]
    tests = [line["test"] for line in cell.runs if line.get("test") is not None]
    return MethodOnWorkload(
        track=track,
        workload=workload,
        method=method,
        runs=len(cell.runs),
        reached=sum(_reaches(run, target.strict) for run in cell.runs),
        reached_loose=sum(_reaches(run, target.loose) for run in cell.runs),
        failed=sum(run["failure"] is not None for run in cell.runs),
        times={clock: _make_interval(one.value, one.draws) for clock, one in cell.times.items()},
        ratios={
            clock: bound_ratio(cell.times[clock], peer.times[clock]) if peer else None
            for clock, peer in peers.items()
        },
        validation=_make_spread([find_last(run) for run in cell.runs]),
        test=_make_spread(tests + [math.inf] * sum(run["failure"] is not None for run in cell.runs))
        if tests
        else None,
        step_cost=cost / plain if cost is not None and plain else None,
        seconds=None if cost is None else cell.times["cpu"].budget,
        peak_mib=statistics.median(peaks) if peaks else None,
        numbers=cell.runs[0]["numbers"],
    )


def _compare_to_quickest(
    results: BenchResults, track: str, workload: str, clock: str
) -> dict[str, tuple[float, Draws]]:
    """By method the time over the quickest's on one workload, as measured and as resampled."""
    times = {
        name: results.cells[track, workload, name].times[clock]
        for name in results.methods
        if (track, workload, name) in results.cells
    }
    setters = [time for name, time in times.items() if name not in results.nulls] or list(times.values())
    if not setters:
        return {}
    best = min(time.value for time in setters)
    best_draws = np.min([time.draws for time in setters], axis=0)
    found = {
        name: (float(_divide_times(np.array(time.value), best)), _divide_times(time.draws, best_draws))
        for name, time in times.items()
    }
    for name in results.methods:
        if (workload, name) in results.refused and name not in found:
            found[name] = math.inf, np.full_like(best_draws, math.inf)
    return found


def _divide_times(times: Draws, best: Draws | float) -> Draws:
    """Times over the best; a miss is infinite whatever the best did, and 0 over 0 is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isinf(times), math.inf, np.where(times == best, 1.0, times / best))


def _rank_ends(results: BenchResults, track: str) -> dict[str, float]:
    """By method the mean, over its workloads, of its place by the validation metric at the end."""
    ends: dict[str, list[int]] = {}
    for workload in results.ranked:
        values = {name: math.inf for name in results.methods if (workload, name) in results.refused}
        for name in results.methods:
            if runs := _get_runs(results, (track, workload, name)):
                values[name] = statistics.median(find_last(run) for run in runs)
        for name, value in values.items():
            ends.setdefault(name, []).append(1 + sum(other < value for other in values.values()))
    return {name: statistics.fmean(ranks) for name, ranks in ends.items()}


def _rank(name: str, ranked: list[str], values: dict[str, float], draws: dict[str, Draws]) -> Interval:
    """One more than the number of methods with more area; limits count those with as much both ways."""
    others = [other for other in ranked if other != name]
    own = draws[name]
    ahead, level = np.zeros_like(own), np.zeros_like(own)
    for other in others:
        ahead += draws[other] > own
        level += draws[other] >= own
    rank = 1 + sum(values[other] > values[name] for other in others)
    return Interval(1 + find_limits(ahead)[0], rank, 1 + find_limits(level)[1])


def _pair_with_peers(results: BenchResults, track: str, clock: str, method: str) -> list[tuple[Timed, Timed]]:
    """Return a method's times and its peers', workload by workload."""
    found = [(results.cells.get((track, w, method)), results.peer(w, clock)) for w in results.ranked]
    return [(cell.times[clock], peer.times[clock]) for cell, peer in found if cell and peer]


def _pair_with_original(
    results: BenchResults, track: str, clock: str, null: str
) -> list[tuple[Timed, Timed]]:
    cells = results.cells
    found = [
        (cells.get((track, w, null)), cells.get((track, w, results.nulls[null]))) for w in results.ranked
    ]
    return [(one.times[clock], other.times[clock]) for one, other in found if one and other]


def _list_known_pairs(results: BenchResults, track: str, clock: str, null: str) -> list[tuple[Timed, Timed]]:
    """Those of the pairs that reached the target in all resamples, later than at the first measurement."""
    # half a step of the grid is left for seconds, of which a step does not always take the same
    return [
        pair
        for pair in _pair_with_original(results, track, clock, null)
        if all(np.isfinite(one.draws).all() and (one.draws > 1.5 * one.grid).all() for one in pair)
    ]


def _reach(ratio: Interval | None) -> float:
    """Return how far from 1 an interval reaches, to either side."""
    return max(ratio.high, 1 / ratio.low) if ratio and ratio.low else math.inf


def _get_runs(results: BenchResults, key: tuple[str, str, str]) -> list[TrialRecord]:
    cell = results.cells.get(key)
    return cell.runs if cell else []


def _reaches(line: TrialRecord, target: float | None) -> bool:
    return math.isfinite(to_target(line, target))


def _make_interval(value: float, draws: Draws) -> Interval:
    low, high = find_limits(draws)
    return Interval(low, value, high)


def _make_spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))
