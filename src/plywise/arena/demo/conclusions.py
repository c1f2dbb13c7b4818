"""The plain-language reading of a study, computed from its numbers: who won, who did not, and by how much."""

from __future__ import annotations

import math
import statistics
from typing import Any

BASELINE = "AdamW"
CONTROL = "Backprop"
TEST_IMAGES = 400
STATIONS = (0.1, 0.01)
"""Training losses on the way for which steps and seconds are told."""
USABLE = 0.1
"""A rate counts as usable if it ends below this training loss."""
CLEARLY = 0.9
"""Share of another's steps or seconds that counts as fewer."""


def draw_demo_conclusions(study: dict[str, Any]) -> list[str]:
    """Sentences on a study of the demo, complete or interrupted.

    A difference at the end counts only beyond the noise: for losses, every seed of one method below every
    seed of the other; for accuracies, two standard errors. The race is that of the median seeds.
    """
    methods = {method["name"]: method for method in study["methods"] if method["runs"]}
    sentences = []
    baseline = methods.get(BASELINE)
    if baseline is not None and _losses(baseline):
        sentences += _race(baseline, {name: m for name, m in methods.items() if name != CONTROL})
        sentences += _final_losses(baseline, methods)
        sentences += _accuracies(baseline, methods)
    sentences += _control(methods)
    sentences += _rates(study["sensitivity"])
    sentences += _failures(methods, study["sensitivity"])
    return sentences


def _race(baseline: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    """Who reached the baseline's final loss, and stations on the way, in how many steps and seconds."""
    sentences = [_station(methods, target) for target in STATIONS]
    target = statistics.median(_losses(baseline))
    arrivals = _arrivals(methods, target)
    if BASELINE not in arrivals:  # most of its seeds failed
        return sentences
    steps, seconds = arrivals.pop(BASELINE)
    sentences.append(
        f"{BASELINE} ended at a training loss of {target:.2g}, first reached after {steps} steps and "
        f"{seconds:.2f} CPU s. Also there: {_told(arrivals) or 'no other method'}.{_missing(methods, target)}"
    )
    fewer = [name for name, (own, _) in arrivals.items() if own < CLEARLY * steps]
    sooner = [name for name, (_, own) in arrivals.items() if own < CLEARLY * seconds]
    nobody = "nobody (slower steps ate the gain)" if fewer and not sooner else "nobody"
    sentences.append(
        f"By more than a tenth fewer steps than {BASELINE} to that loss: {_list(fewer) or 'nobody'}. "
        f"By more than a tenth less CPU time: {_list(sooner) or nobody}."
    )
    return sentences


def _station(methods: dict[str, Any], target: float) -> str:
    told = _told(_arrivals(methods, target)) or "nobody"
    return f"First at a training loss of {target:g} (median seed): {told}.{_missing(methods, target)}"


def _arrivals(methods: dict[str, Any], target: float) -> dict[str, tuple[int, float]]:
    """Steps and seconds until the loss first was at ``target``, in the median run; the quickest first."""
    never = (math.inf, math.inf)
    found = {}
    for name, method in methods.items():
        runs = [zip(run["steps"], run["cpu_seconds"], run["loss"], strict=True) for run in method["runs"]]
        found[name] = statistics.median_low(
            next(((step, clock) for step, clock, loss in run if loss is not None and loss <= target), never)
            for run in runs
        )
    reached = {name: when for name, when in found.items() if when != never}
    return dict(sorted(reached.items(), key=lambda item: item[1]))  # type: ignore[arg-type]


def _told(arrivals: dict[str, tuple[int, float]]) -> str:
    return "; ".join(
        f"{name} in {steps} steps, {clock:.2f} CPU s" for name, (steps, clock) in arrivals.items()
    )


def _missing(methods: dict[str, Any], target: float) -> str:
    missing = [name for name in methods if name not in _arrivals(methods, target)]
    return f" Not, in the median seed: {_list(missing)}." if missing else ""


def _final_losses(baseline: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    """Whose final loss is below the baseline's in every seed, and whose above."""
    if len(_losses(baseline)) < 2:
        return ["One seed tells nothing about noise: run the demo with --seeds 3."]
    better, worse, tied = [], [], []
    for name, method in methods.items():
        losses = _losses(method)
        if name == BASELINE or not losses:
            continue
        if max(losses) < min(_losses(baseline)):
            better.append(name)
        elif min(losses) > max(_losses(baseline)):
            worse.append(name)
        else:
            tied.append(name)
    parts = [
        f"{_list(names)} {what}"
        for names, what in ((better, "all below"), (worse, "all above"), (tied, "not to be told apart"))
        if names
    ]
    return (
        [f"Final training losses of all seeds against all of {BASELINE}: {'; '.join(parts)}."]
        if parts
        else []
    )


def _accuracies(baseline: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    """Whose test accuracy differs from the baseline's by more than the noise."""
    better: list[str] = []
    worse: list[str] = []
    for name, method in methods.items():
        gap, noise = _gap(method, baseline)
        if name != BASELINE and abs(gap) > noise:
            (better if gap > 0 else worse).append(f"{name} ({100 * gap:+.1f} points)")
    noise = max((_gap(method, baseline)[1] for method in methods.values()), default=0.0)
    sentences = []
    if better:
        sentences.append(f"Test accuracy above {BASELINE}'s by more than the noise: {_list(better)}.")
    else:
        sentences.append(
            f"No method's test accuracy beats {BASELINE}'s by more than the noise (two standard errors over "
            f"seeds or over {TEST_IMAGES} test images, up to {100 * noise:.1f} points)."
        )
    if worse:
        sentences.append(f"Test accuracy below {BASELINE}'s by more than the noise: {_list(worse)}.")
    return sentences


def _gap(method: dict[str, Any], baseline: dict[str, Any]) -> tuple[float, float]:
    """Difference of the mean accuracies, and two standard errors of it: over seeds, and over images."""
    sides = [
        [r["test_accuracy"] for r in m["runs"] if r["test_accuracy"] is not None] for m in (method, baseline)
    ]
    if not all(sides):
        return 0.0, 0.0
    variance = 0.0
    for side in sides:
        mean = statistics.fmean(side)
        seeds = statistics.variance(side) / len(side) if len(side) > 1 else 0.0
        # all seeds are tested on the same images, so that more seeds do not make this part smaller
        variance += max(seeds, mean * (1 - mean) / TEST_IMAGES)
    return statistics.fmean(sides[0]) - statistics.fmean(sides[1]), 2 * math.sqrt(variance)


def _control(methods: dict[str, Any]) -> list[str]:
    """What the null control says about the overhead of attaching anything, and what the rules cost."""
    costs = {name: m["relative_step_cost"] for name, m in methods.items() if m["relative_step_cost"]}
    if CONTROL not in costs:
        return []
    same = "SGD" in methods and all(
        a["loss"] == b["loss"] for a, b in zip(methods["SGD"]["runs"], methods[CONTROL]["runs"], strict=False)
    )
    others = [f"{name} {cost:.1f}×" for name, cost in costs.items() if name not in ("SGD", CONTROL)]
    trains = "trains as SGD does, bit for bit, and " if same else ""
    return [
        f"{CONTROL}, the null control, {trains}costs {costs[CONTROL]:.2f}× a plain SGD step: that is the "
        f"hooks. A step of the others: {', '.join(others)}, all on this small network."
    ]


def _rates(lines: list[dict[str, Any]]) -> list[str]:
    """How many of the tried rates are usable."""
    counts = [
        (sum(loss is not None and loss < USABLE for loss in line["final_loss"]), line["name"])
        for line in lines
        if line["final_loss"]
    ]
    if not counts:
        return []
    text = ", ".join(f"{name} {usable}" for usable, name in sorted(counts, key=lambda c: -c[0]))
    return [
        f"Of {len(lines[0]['rates'])} rates over four decades around the tuned one, this many end below a "
        f"training loss of {USABLE:g} in the shorter runs of the sweep: {text}."
    ]


def _failures(methods: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    runs = [run for method in methods.values() for run in method["runs"]]
    failed = sum(run["failure"] is not None for run in runs)
    losses = [loss for line in lines for loss in line["final_loss"]]
    diverged = sum(loss is None for loss in losses)
    if not runs:
        return []
    also = f", and {diverged} of {len(losses)} in the sweep over rates" if losses else ""
    return [f"{failed} of {len(runs)} runs failed{also}; failures are counted, not dropped."]


def _losses(method: dict[str, Any]) -> list[float]:
    return [run["final_loss"] for run in method["runs"] if run["final_loss"] is not None]


def _list(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
