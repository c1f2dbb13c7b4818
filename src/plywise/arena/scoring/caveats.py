"""Caveats of a bench: its search, failures, the number of seeds."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from plywise.arena.scoring.intervals import find_confidence
from plywise.arena.scoring.records import TUNED
from plywise.arena.scoring.results import BenchResults
from plywise.arena.scoring.score import choose_best
from plywise.arena.scoring.sentences import join
from plywise.arena.scoring.targets import ENOUGH, SHARE

EDGE = 0.05
"""A chosen number within this share of either end of its range says that the range may be too narrow."""

SEARCHED = 8
"""With fewer tuning trials, the place of the best one says nothing about the range."""


def list_caveats(results: BenchResults) -> list[str]:
    """Sentences on a bench that has at least one final run."""
    return [
        *_say_search(results),
        *_compare_spaces(results),
        *_note_resumed(results),
        *_note_guesses(results),
        *_note_repeated(results),
        *_note_unseen(results),
        *_count_failures(results),
        *_list_soft_targets(results),
        *_find_edges(results),
        *_say_confidence(results),
    ]


def _say_search(results: BenchResults) -> list[str]:
    search = (results.bench.get("plan") or {}).get("search", "sobol")
    if search == "sobol":
        return []
    return [
        f"The numbers were searched by {search}, which learns from a method's own trials: all methods had "
        "the same number of trials, but not the same luck with them."
    ]


def _compare_spaces(results: BenchResults) -> list[str]:
    """Which methods have fewer numbers to tune than others, and so a closer search by the same trials."""
    counts = {
        name: len(one.get("space") or {})
        for name, one in results.bench["methods"].items()
        if not one.get("null")
    }
    most = max(counts.values(), default=0)
    fewer = ", ".join(f"{name} {count or 'none'}" for name, count in counts.items() if count < most)
    if not fewer or results.bench.get("chosen") or TUNED not in results.tracks:
        return []
    return [
        f"Not all methods have {most} numbers to tune ({fewer}): the same number of trials searches fewer "
        "numbers more closely."
    ]


def _note_resumed(results: BenchResults) -> list[str]:
    count = len(results.bench.get("resumed") or [])
    if not count:
        return []
    return [
        f"The bench was resumed {count} time{'s' if count > 1 else ''} on another machine or with other "
        "versions: steps can be compared, times only with care."
    ]


def _note_guesses(results: BenchResults) -> list[str]:
    """Return what was guessed about the user's data, with the flags that overrule it."""
    about = results.bench["workloads"].values()
    return list(dict.fromkeys(guess for one in about for guess in one.get("guesses", ())))


def _note_repeated(results: BenchResults) -> list[str]:
    sentences = []
    for name, one in results.bench["workloads"].items():
        found = {part: count for part, count in one.get("repeated", {}).items() if count}
        if found:
            parts = " and ".join(
                f"{count:,} of {one[part]:,} {part} samples" for part, count in found.items()
            )
            sentences.append(
                f"{parts} of {name} have the inputs of a training sample: what remembers those looks better "
                "than it is on new ones."
            )
    return sentences


def _note_unseen(results: BenchResults) -> list[str]:
    return [
        f"The layers of {name} could not be looked at before training: {one['unseen']}."
        for name, one in results.bench["workloads"].items()
        if one.get("unseen")
    ]


def _count_failures(results: BenchResults) -> list[str]:
    trials = [
        line
        for workload in results.workloads
        for method in results.methods
        for line in results.trials(workload, method)
    ]
    failed = Counter(line["method"] for line in trials if line["failure"] is not None)
    parts = join([f"{name} {count}" for name, count in failed.most_common()])
    sentences = [
        f"{failed.total()} of {len(trials)} trials failed{f' ({parts})' if parts else ''}; failures are "
        "counted, not dropped."
    ]
    if results.refused:
        names = Counter(method for _, method in results.refused)
        parts = join([f"{name} on {count}" for name, count in names.items()])
        sentences.append(
            f"Workloads that a method does not fit count as misses in profiles and ranks: {parts}."
        )
    return sentences


def _list_soft_targets(results: BenchResults) -> list[str]:
    soft = [
        f"{name} {target.strict:.3g} ({'; '.join(target.softness)})"
        for name, target in results.targets.items()
        if target.softness
    ]
    if not soft:
        return []
    return [
        f"Soft targets, which say less: {', '.join(soft)}. With {ENOUGH} tuning trials of the baselines "
        f"or more, a target is what {100 * SHARE:.0f} % of them reach; with fewer it is a matter of chance."
    ]


def _find_edges(results: BenchResults) -> list[str]:
    found: Counter[str] = Counter()
    if results.bench.get("chosen"):
        return []
    for (workload, method), trials in results.tuning.items():
        if len(trials) < SEARCHED:
            continue  # the best of few points is where a point happens to be
        best = choose_best(trials, results.targets[workload].strict)
        space = results.bench["methods"].get(method, {}).get("space") or {}
        for name, one in space.items():
            if best is not None and name in best["numbers"] and is_at_edge(best["numbers"][name], one):
                found[f"{name} of {method}"] += 1
    if not found:
        return []
    whole = len({workload for workload, _ in results.tuning})
    parts = ", ".join(f"{what} on {count} of {whole}" for what, count in found.most_common())
    return [f"The chosen number lies at the edge of its range, which may be too narrow: {parts}."]


def is_at_edge(value: float, one: Mapping[str, Any]) -> bool:
    """Return whether a number lies in the outer twentieth of its range, as bench.json has it.

    Example:
        >>> one = {"low": 1e-3, "high": 1.0, "log": True}
        >>> is_at_edge(0.9, one), is_at_edge(0.03, one)
        (True, False)
    """
    low, high = one["low"], one["high"]
    if one["log"]:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return not EDGE <= (value - low) / (high - low) <= 1 - EDGE


def _say_confidence(results: BenchResults) -> list[str]:
    least = min(len(cell.runs) for cell in results.cells.values())
    if least == 1:
        return [
            "One seed tells nothing about noise: intervals of a single run hold no more than the time "
            "between two measurements."
        ]
    if find_confidence(least) >= 0.95:
        return []
    return [
        f"An interval of {least} seeds is their range at most, which on one workload holds the true median "
        f"with a probability of {100 * find_confidence(least):.0f} %: take single workloads with caution. "
        "Six seeds reach 95 %."
    ]
