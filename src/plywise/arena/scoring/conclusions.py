"""Conclusions of a bench, in sentences computed from its ranking: which methods won where, what failed.

A difference is named only if its interval leaves 1 out and its value lies beyond what the null control shows
(see `plywise.arena.scoring.intervals.Interval.apart`). What cannot be distinguished is named as such.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable

from plywise.arena.scoring.caveats import list_caveats
from plywise.arena.scoring.intervals import Interval
from plywise.arena.scoring.ranking import (
    MethodOnWorkload,
    MethodRanking,
    find_lone_noise,
    find_null_ratio,
    measure_noise,
    rank_methods,
)
from plywise.arena.scoring.records import DEFAULTS
from plywise.arena.scoring.results import BenchResults
from plywise.arena.scoring.sentences import join
from plywise.arena.scoring.verdicts import BETTER, compare_runs, find_noise

SPARING = 0.9
"""A method saves memory if it needs less than this share of the reference's."""
CODE_MIB = 20.0
"""Memory that a process needs to load code at the first call, measured in the first trial of a process."""

WORDS = {"steps": "steps", "gradients": "gradient passes", "cpu": "CPU time", "wall": "time on the wall"}
"""What clocks are called in a sentence."""

FEWEST = 3
"""With fewer final runs of a method no difference is named."""


def draw_conclusions(results: BenchResults, rows: Iterable[MethodOnWorkload]) -> list[str]:
    """Sentences on a bench, whole or interrupted.

    Args:
        results: the sorted trials.
        rows: their `plywise.arena.scoring.ranking.compare_methods`.
    """
    rows = list(rows)
    if not rows:
        return ["No final run has ended yet, so that there is nothing to compare."]
    track = results.tracks[0]
    rankings = {clock: rank_methods(results, track, clock) for clock in ("steps", "cpu")}
    reached = [*_describe_targets(results), *_list_misses(track, rows), *_say_untuned(results)]
    last = [*_compare_memory(results, track, rows), *list_caveats(results)]
    if statistics.median(len(cell.runs) for cell in results.cells.values()) < FEWEST:
        return [*_say_unranked(results), *reached, *last]
    if not results.ranked:
        return [*_say_unranked(results), *_compare_ends(results, track, rows), *reached, *last]
    return [
        *_say_unranked(results),
        *_give_advice(results, track, rankings, rows),
        *_describe_noise(results, track),
        *_compare_overall(results, track, rankings),
        *_compare_by_workload(results, track, rows),
        *_compare_ends(results, track, rows),
        *reached,
        *last,
    ]


def _describe_targets(results: BenchResults) -> list[str]:
    begun = {workload for _, workload, _ in results.cells} | {workload for workload, _ in results.tuning}
    waiting = [name for name in results.workloads if name not in begun]
    without = [name for name, one in results.targets.items() if one.strict is None and name in begun]
    sentences = [f"Nothing has been run yet on {join(waiting)}."] if waiting else []
    if without:
        why = "no tuning trial of a baseline came to its end"
        if not results.bench["trials"]:
            why = "no baseline was tuned (--trials 8 tunes)"
        sentences.append(f"No target, since {why}: every run counts as a miss on {join(without)}.")
    return sentences


def _say_unranked(results: BenchResults) -> list[str]:
    """Say on which workloads no method is ranked, for their targets are nearer to chance than to the best."""
    parts = [
        f"{name} ({target.strict:.3g}, where knowing nothing gives {target.naive:.3g} and the best run "
        f"{target.best:.3g})"
        for name, target in results.targets.items()
        if not target.ranks
    ]
    lost = [f"No method is ranked where every final run failed: {join(results.failed)}."]
    if not parts:
        return lost if results.failed else []
    whole = "" if results.ranked else " No workload is left to rank methods on."
    return [
        *(lost if results.failed else []),
        "Nobody is ranked where the target is nearer to knowing nothing than to the best that was reached: "
        f"{', '.join(parts)}.{whole}",
    ]


def _describe_noise(results: BenchResults, track: str) -> list[str]:
    if not results.nulls:
        return ["There is no null control in this bench, so its timing noise is unknown."]
    sentences = []
    for null, original in results.nulls.items():
        parts = [
            f"{format_span(ratio)} in {WORDS[clock]}"
            for clock in ("steps", "cpu", "wall")
            if (ratio := find_null_ratio(results, track, clock, null)) is not None
        ]
        if parts:
            sentences.append(
                f"{null} is {original} once more, the null control: its times over those of {original} are "
                f"{', '.join(parts)}."
            )
        else:
            sentences.append(f"{null}, the null control, cannot be compared with {original} in this track.")
    limits = {clock: measure_noise(results, track, clock) for clock in ("steps", "cpu")}
    if any(map(math.isinf, limits.values())):
        return [
            *sentences,
            "A null control has no times to learn the noise from: no difference is named below.",
        ]
    parts = [f"{limit:.2f}× in {WORDS[clock]}" for clock, limit in limits.items()]
    alone = f"; on a single workload within {find_lone_noise(results, track, 'cpu'):.2f}× in {WORDS['cpu']}"
    return [
        *sentences,
        f"Where the null control always reached the target it is within {' and '.join(parts)}"
        f"{alone if len(results.ranked) > 1 else ''}: that is noise.",
    ]


def _compare_overall(
    results: BenchResults, track: str, rankings: dict[str, list[MethodRanking]]
) -> list[str]:
    """Say which methods need fewer steps, or less time, than the best baseline over all workloads."""
    sentences = []
    better: dict[str, list[str]] = {}
    for clock, found in rankings.items():
        limit = measure_noise(results, track, clock)
        compared = [one for one in found if one.ratio and one.method not in results.nulls]
        apart = find_different(results, found, limit)
        ratios = {one.method: one.ratio.value for one in apart if one.ratio}
        ahead = sorted((one for one in apart if ratios[one.method] < 1), key=lambda one: ratios[one.method])
        behind = [name for name, ratio in ratios.items() if ratio > 1]
        level = [
            one.method
            for one in compared
            if one not in apart and one.reached and one.method not in results.baselines
        ]
        better[clock] = [one.method for one in ahead]
        if not compared:
            continue
        parts = [
            f"{one.method} {format_span(one.ratio)}{_note_compared(results, one)}"
            for one in ahead
            if one.ratio
        ]
        sentences.append(
            f"Ahead of the best baseline in {WORDS[clock]} to the target, beyond noise: "
            f"{join(parts) or 'no method'}."
            + (f" Behind: {join(behind)}." if behind else "")
            + (f" Undecided: {join(level)}." if level else "")
        )
    eaten = [name for name in better.get("steps", []) if name not in better.get("cpu", [])]
    if eaten:
        sentences.append(
            f"Fewer steps, but not less CPU time beyond noise: {join(eaten)}. More expensive "
            "steps cancel the gain, or noise hides it."
        )
    return sentences


def find_different(results: BenchResults, found: list[MethodRanking], limit: float) -> list[MethodRanking]:
    """Find methods that differ from the best baseline; one with null controls only if these differ alike."""
    sides = {
        one.method: one.ratio.value > 1 for one in found if one.ratio is not None and one.ratio.apart(limit)
    }
    doubtful = {
        original for null, original in results.nulls.items() if sides.get(null) != sides.get(original)
    }
    return [one for one in found if one.method in sides and one.method not in {*results.nulls, *doubtful}]


def _compare_by_workload(results: BenchResults, track: str, rows: list[MethodOnWorkload]) -> list[str]:
    """Say which methods won on each workload in processor time, and in one sentence where none did."""
    limit = find_lone_noise(results, track, "cpu")
    sentences = []
    unbeaten: dict[str, list[str]] = {}
    unreached = []
    for workload in results.ranked:
        peer = results.peer(workload, "cpu")
        here = [row for row in rows if row.track == track and row.workload == workload]
        if peer is None or not here:
            continue
        if math.isinf(peer.times["cpu"].value):
            if results.targets[workload].strict is not None:
                unreached.append(workload)
            continue
        name = peer.runs[0]["method"]
        found = [(row.ratios["cpu"], row.method) for row in here if row.method not in results.nulls]
        ahead = sorted(
            (ratio.value, method, ratio)
            for ratio, method in found
            if ratio is not None and ratio.value < 1 and ratio.apart(limit)
        )
        if ahead:
            parts = ", ".join(f"{method} {format_span(ratio)}" for _, method, ratio in ahead[:3])
            more = f", and {len(ahead) - 3} more" if len(ahead) > 3 else ""
            sentences.append(f"On {workload}, less CPU time to the target than {name}: {parts}{more}.")
        else:
            unbeaten.setdefault(name, []).append(workload)
    if unreached:
        sentences.append(
            f"No baseline reached the target in its median run on {join(unreached)}: times are not "
            "compared there. The best of many measurements on few validation samples is hard to repeat; more "
            "of them, or more seeds, help."
        )
    if unbeaten and not math.isinf(limit):
        parts = ", than ".join(f"{name} on {join(where)}" for name, where in unbeaten.items())
        sentences.append(f"Nobody takes less CPU time to the target, beyond noise, than {parts}.")
    return sentences


def _list_misses(track: str, rows: list[MethodOnWorkload]) -> list[str]:
    """Say which methods missed the target, and whether they reached the loose one."""
    shown = [row for row in rows if row.track == track]
    missed = [row for row in shown if 2 * row.reached < row.runs]
    near = [row for row in missed if 2 * row.reached_loose > row.runs]
    close = f" The loose target was in reach of {_name_methods(near, missed)}." if near else ""
    said = f"More than half of the runs missed the target: {_name_methods(missed, shown)}.{close}"
    return [said] if missed else []


def _compare_ends(results: BenchResults, track: str, rows: list[MethodOnWorkload]) -> list[str]:
    """Say which methods end with a better test metric than the best baseline, beyond noise."""
    sentences = []
    for workload in results.workloads:
        medians = {
            row.method: row.test.median
            for row in rows
            if (row.track, row.workload) == (track, workload) and row.test
        }
        baselines = [name for name in results.baselines if name in medians]
        if not baselines:
            continue
        peer = min(baselines, key=medians.__getitem__)
        names = (*medians, *results.nulls.values())
        tests = {name: _read_tests(results, track, workload, name) for name in names}
        controls = [(tests[n], tests[original]) for n, original in results.nulls.items() if n in tests]
        noise = max((find_noise(*pair) for pair in controls), default=0)
        compared = [name for name in medians if name not in results.nulls]
        below = [n for n in compared if compare_runs(tests[n], tests[peer], noise=noise) == BETTER]
        if below:
            sentences.append(
                f"On {workload}, the test metric at the end is lower than that of {peer}, beyond noise: "
                f"{join(below)}."
            )
    return sentences


def _read_tests(results: BenchResults, track: str, workload: str, method: str) -> dict[int, float | None]:
    """Return each run's last test metric, negated, by seed; a null control has other seeds."""
    cell = results.cells.get((track, workload, method))
    runs = cell.runs if cell else []
    return {
        place: None if run["failure"] is not None or run["test"] is None else -run["test"]
        for place, run in enumerate(runs)
    }


def _compare_memory(results: BenchResults, track: str, rows: list[MethodOnWorkload]) -> list[str]:
    """Say which methods need less peak memory than the reference, wherever both were measured."""
    peaks: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.track == track and row.peak_mib is not None:
            peaks.setdefault(row.method, {})[row.workload] = row.peak_mib
    plain = peaks.get(results.reference or "", {})
    parts = []
    for method, own in peaks.items():
        both = [(own[workload], plain[workload]) for workload in own if plain.get(workload)]
        shares = [less / more for less, more in both]
        if shares and max(shares) < SPARING and all(more - less > CODE_MIB for less, more in both):
            parts.append(f"{method} {min(shares):.2f} to {max(shares):.2f}×")
    return [f"Peak memory, as a multiple of {results.reference}'s: {join(parts)}."] if parts else []


def _say_untuned(results: BenchResults) -> list[str]:
    if DEFAULTS not in results.tracks:
        return []
    counts = {
        one.method: (one.reached, one.runs) for one in rank_methods(results, DEFAULTS, "steps") if one.runs
    }
    parts = [
        f"{name} {reached} of {runs}"
        for name, (reached, runs) in sorted(counts.items(), key=lambda item: -item[1][0] / item[1][1])
        if reached and name not in results.nulls
    ]
    if not counts:
        return []
    return [f"Runs at the defaults that reached the target: {join(parts) or 'none of any method'}."]


def _give_advice(
    results: BenchResults, track: str, rankings: dict[str, list[MethodRanking]], rows: list[MethodOnWorkload]
) -> list[str]:
    """Recommend methods, where the intervals allow it."""
    sentences = _advise_tuned(results, track, rankings)
    if DEFAULTS in results.tracks and track != DEFAULTS:
        able = [
            one.method
            for one in rank_methods(results, DEFAULTS, "cpu")
            if one.rank and one.runs and one.reached == one.runs and len(one.profile) == len(results.ranked)
        ]
        sentences.append(
            f"If there is no time to tune: {join(able)} reached every target in every run at the defaults."
            if able
            else "If there is no time to tune: no method reached every target in every run at its defaults."
        )
    return sentences


def _advise_tuned(results: BenchResults, track: str, rankings: dict[str, list[MethodRanking]]) -> list[str]:
    """Recommend methods for CPU time and for the number of steps."""
    sentences = []
    for clock, when in (
        ("cpu", "If CPU time is what counts"),
        ("steps", "If the number of steps is what counts"),
    ):
        limit = measure_noise(results, track, clock)
        sure = [
            one.method
            for one in rankings[clock]
            if one.ratio
            and one.ratio.value < 1
            and one.ratio.apart(limit)
            and one.compared == len(results.ranked)
        ]
        first = [
            one.method for one in rankings[clock] if one.rank and one.rank.low <= 1 and one.area.value > 0
        ]
        use = [name for name in first if name in sure]
        if use:
            sentences.append(f"{when}: use {' or '.join(use)}.")
        elif first:
            baselines = [name for name in first if name in results.baselines]
            keep = f"keep to {' or '.join(baselines)}" if baselines else "no choice is safe"
            sentences.append(
                f"{when}: {keep}; nothing beats the best baseline beyond noise over all workloads."
            )
    return sentences


def format_span(ratio: Interval) -> str:
    """Return a ratio with its limits.

    Example:
        >>> format_span(Interval(0.412, 0.5, float("inf"), "≥"))
        '≥0.50× (0.41 to ∞)'
    """
    limits = f"{_shorten(ratio.low)} to {_shorten(ratio.high)}"
    if ratio.low == 0 and math.isinf(ratio.high):
        limits = "without limits"
    return f"{ratio.mark}{_shorten(ratio.value)}× ({limits})"


def _shorten(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < 10 else f"{value:.3g}"


def _list_some(names: list[str], whole: list[str]) -> str:
    """List names; if only a few of all are missing, name those."""
    others = [name for name in whole if name not in names]
    if len(names) < 2 or 2 * len(others) >= len(names):
        return join(names)
    return f"all {len(whole)} but {join(others)}" if others else f"all {len(whole)}"


def _name_methods(some: list[MethodOnWorkload], whole: list[MethodOnWorkload]) -> str:
    """List the methods of some rows: by name on a single workload, else with the number of workloads."""
    if len({row.workload for row in whole}) == 1:
        return _list_some([row.method for row in some], [row.method for row in whole])
    counts, of = (Counter(row.method for row in group) for group in (some, whole))
    return join([f"{name} on {count} of {of[name]}" for name, count in counts.most_common()])


def _note_compared(results: BenchResults, one: MethodRanking) -> str:
    whole = len(results.ranked)
    return "" if one.compared == whole else f" on {one.compared} of {whole} workloads"
