"""The plain-language reading of a study, computed from its numbers: who won, who did not, and by how much."""

from __future__ import annotations

import math
import statistics
from typing import Any

BASELINE = "AdamW"
TEST_IMAGES = 400
WITHIN = 10.0
"""A rate counts as usable if it ends within this factor of the method's own best final loss."""


def reading(study: dict[str, Any]) -> list[str]:
    """Sentences on a study of the demo, complete or interrupted.

    A difference counts only beyond the noise: for losses, every seed of one method below every seed of
    the other; for accuracies, two standard errors.
    """
    methods = {method["name"]: method for method in study["methods"] if method["runs"]}
    sentences = []
    baseline = methods.get(BASELINE)
    if baseline is not None and _losses(baseline):
        sentences += _race(baseline, methods)
        sentences += _final_losses(baseline, methods)
        sentences += _accuracies(baseline, methods)
    sentences += _control(methods)
    sentences += _rates(study["sensitivity"])
    sentences += _failures(methods, study["sensitivity"])
    return sentences


def _race(baseline: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    """Who reached the baseline's final loss, in how many steps and seconds."""
    target = statistics.median(_losses(baseline))
    own = _arrival(baseline, target)
    steps, seconds = own if own else (baseline["runs"][0]["steps"][-1], math.nan)
    head = f"{BASELINE} ended at a training loss of {target:.2g} (after {steps} steps, {seconds:.2f} CPU s). "
    arrivals = {name: _arrival(method, target) for name, method in methods.items() if name != BASELINE}
    reached = sorted((when, name) for name, when in arrivals.items() if when)
    if not reached:
        return [head + "No other method got there."]
    text = "; ".join(f"{name} in {s} steps and {t:.2f} s" for (s, t), name in reached)
    missed = [name for name, when in arrivals.items() if not when]
    never = f" Not in every seed or not at all: {_list(missed)}." if missed else ""
    sentences = [f"{head}It was reached by {text}.{never}"]
    quicker = [name for (_, t), name in reached if t < seconds / 1.1]
    by = f"got there sooner than {BASELINE} by more than a tenth"
    if quicker:
        return [*sentences, f"In CPU time {_list(quicker)} {by}."]
    return [*sentences, f"In CPU time nobody {by}: slower steps ate the gain."]


def _arrival(method: dict[str, Any], target: float) -> tuple[int, float] | None:
    """Median step and time at which the loss first was at ``target``; None unless all runs got there."""
    arrivals = []
    for run in method["runs"]:
        points = zip(run["steps"], run["loss"], run["cpu_seconds"], strict=True)
        arrivals.append(next(((step, clock) for step, loss, clock in points if loss <= target), None))
    if method["name"] == BASELINE:  # its median run is the target, so that half of its runs get there
        arrivals = [arrival for arrival in arrivals if arrival]
    if not arrivals or None in arrivals:
        return None
    steps, clocks = zip(*[arrival for arrival in arrivals if arrival], strict=True)
    return int(statistics.median(steps)), statistics.median(clocks)


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
        for names, what in ((better, "below"), (worse, "above"), (tied, "within the spread of"))
        if names
    ]
    return [f"Final training loss, seed by seed, against {BASELINE}: {'; '.join(parts)}."] if parts else []


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
            f"seeds and {TEST_IMAGES} test images, up to {100 * noise:.1f} points): what the rules gain here "
            "is speed, not accuracy."
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
    if "Backprop" not in costs:
        return []
    same = "SGD" in methods and all(
        a["loss"] == b["loss"]
        for a, b in zip(methods["SGD"]["runs"], methods["Backprop"]["runs"], strict=False)
    )
    others = [f"{name} {cost:.1f}×" for name, cost in costs.items() if name not in ("SGD", "Backprop")]
    trains = "trains as SGD does, bit for bit, and " if same else ""
    return [
        f"Backprop, the null control, {trains}costs {costs['Backprop']:.2f}× a plain SGD step: that is the "
        f"hooks. A step of the others: {', '.join(others)} (this network is tiny; hooks weigh less in larger "
        "ones)."
    ]


def _rates(lines: list[dict[str, Any]]) -> list[str]:
    """How many of the tried rates are usable."""
    counts = []
    for line in lines:
        losses = [loss for loss in line["final_loss"] if loss is not None]
        if losses:
            usable = sum(loss <= WITHIN * max(min(losses), 1e-3) for loss in losses)
            counts.append((usable, line["name"]))
    if not counts:
        return []
    total = len(lines[0]["rates"])
    text = ", ".join(f"{name} {usable}" for usable, name in sorted(counts, key=lambda c: -c[0]))
    return [
        f"Of {total} rates over four decades, this many end within a factor of {WITHIN:g} of the method's "
        f"best (losses below 0.001 count as 0.001): {text}."
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
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
