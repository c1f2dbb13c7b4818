"""How much of a bench fits into somebody's hours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from plywise._util.progress import format_duration
from plywise.arena.methods import find_method
from plywise.arena.run.bench import BenchConfig
from plywise.arena.run.bench_data import BenchData
from plywise.arena.run.executor import PATIENCE, Executor
from plywise.arena.run.job import EVALUATIONS, TrialJob, WorkloadSpec
from plywise.arena.scoring.records import DEFAULTS, FINAL, Key
from plywise.arena.space import defaults
from plywise.errors import PlywiseError

PROBE_STEPS = 10
TRIALS = (16, 12, 10, 8, 6, 5, 4)
"""Tuning trials that are tried to fit, the most first."""
SLACK = 0.9
"""Share of the budget that is planned for."""
LEAST_STEPS, MOST_STEPS = 200, 20_000
"""Bounds for a run's length that nobody has chosen."""
START = 0.3
"""Seconds to start a process and to make a model, roughly."""
MARGIN = 3.0
"""A trial may take this many times what is planned: other points, and a busy machine, are slower."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """Seconds of a duration: ``90s``, ``45m``, ``2h``, ``1h30m``.

    Raises:
        PlywiseError: it is no duration.

    Example:
        >>> seconds_of("1h30m")
        5400.0
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip().lower())
    total = sum(float(count) * _UNITS[unit] for count, unit in parts)
    if "".join(count + unit for count, unit in parts) != text.strip().lower() or total <= 0:
        raise PlywiseError(
            f"A budget is a duration such as 90s, 45m, 2h or 1h30m, not {text!r}.", see="error-bench"
        )
    return total


@dataclass(frozen=True)
class Cost:
    """Seconds that a method's trials take on a workload: one step, and all that is not a step."""

    step: float
    rest: float

    def run(self, steps: int) -> float:
        """Seconds of one trial."""
        return self.rest + steps * self.step

    def steps(self, seconds: float) -> int:
        """Steps of a trial that takes so many seconds, at least 1."""
        return max(1, int((seconds - self.rest) / self.step)) if self.step else MOST_STEPS


Costs = Mapping[tuple[str, str], Cost]
"""By workload and method."""


def measure(
    plan: BenchConfig, material: BenchData, crew: Executor
) -> tuple[dict[tuple[str, str], Cost], dict[tuple[str, str], str]]:
    """A few steps of every method on every workload, with its defaults: what they cost, and which failed.

    A method that fails costs next to nothing: it will fail at its first steps in the bench, too.
    """
    jobs = []
    for asked in plan.entries:
        entry = asked.settled(asked.applied(material.workloads[asked.name]))
        for name in plan.methods:
            method = find_method(name)
            key = Key(entry.name, method.name, FINAL, DEFAULTS, -1, 0)
            short = replace(entry, steps=PROBE_STEPS)
            jobs.append(
                TrialJob(key, short, defaults(method.space), str(material.files[entry.name]), plan.device)
            )
    lines = {(job.key.workload, job.key.method): line for job, line in crew.run(jobs)}
    failures = {pair: line["failure"] for pair, line in lines.items() if line["failure"]}
    return {pair: _cost(line) for pair, line in lines.items()}, failures


def estimate(
    plan: BenchConfig,
    costs: Costs,
    steps: Mapping[str, int],
    workers: int,
    done: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> float:
    """Seconds that a bench takes: every method is tuned ``trials`` times, then run on both tracks.

    Args:
        plan: the bench.
        costs: what `measure` found.
        steps: of each workload.
        workers: trials at once.
        done: trials that have been run, by workload and method.
    """
    runs = plan.trials + (2 if plan.trials else 1) * plan.seeds
    left = {pair: max(0, runs - done.get(pair, 0)) for pair in costs}
    return sum(left[pair] * cost.run(steps[pair[0]]) for pair, cost in costs.items()) / workers


def patient(plan: BenchConfig, costs: Costs, steps: Mapping[str, int]) -> BenchConfig:
    """The plan with a patience that its most expensive trial keeps within, if it has none of its own."""
    if plan.patience is not None:
        return plan
    slowest = max(cost.run(steps[workload]) for (workload, _), cost in costs.items())
    return replace(plan, patience=max(PATIENCE, round(MARGIN * slowest)))


def fit_budget(
    plan: BenchConfig, costs: Costs, steps: Mapping[str, int], workers: int, budget: float
) -> BenchConfig:
    """The plan with as many tuning trials as fit, the same for every method; without any, if it has none.

    Raises:
        PlywiseError: not even the least fits; says how long that would take.
    """
    for trials in TRIALS if plan.trials else (0,):
        tried = replace(plan, trials=trials)
        needed = estimate(tried, costs, steps, workers)
        if needed <= SLACK * budget:
            return tried
    slowest = max(costs, key=lambda pair: costs[pair].step)
    raise PlywiseError(
        f"{format_duration(budget)} are not enough: {trials} tuning trials and {plan.seeds} seeds take about "
        f"{format_duration(needed / SLACK)} with {workers} worker{'s' if workers > 1 else ''}. Take fewer "
        f"methods (the slowest step is that of {slowest[1]} on {slowest[0]}), fewer --steps or --seeds, or a "
        "larger --budget.",
        see="error-bench",
    )


def steps_for(
    plan: BenchConfig,
    costs: Costs,
    entries: Iterable[WorkloadSpec],
    known: Mapping[str, int],
    workers: int,
    budget: float,
) -> dict[str, int]:
    """Steps of each workload; where nobody has said how many, as many as fit with 8 tuning trials.

    A trial stays below a third of the plan's patience, if it has one.

    Args:
        plan: for its seeds and patience, and whether it tunes.
        costs: what `measure` found.
        entries: the workloads as they were asked for.
        known: steps of the workloads as they stand.
        workers: trials at once.
        budget: seconds.
    """
    steps = dict(known)
    open_ = [entry.name for entry in entries if entry.model and entry.steps is None]
    runs = 8 + 2 * plan.seeds if plan.trials else plan.seeds
    for name in open_:
        own = [cost for (workload, _), cost in costs.items() if workload == name]
        share = SLACK * budget * workers / len(steps) - runs * sum(cost.rest for cost in own)
        fitting = int(share / (runs * sum(cost.step for cost in own) or 1.0))
        steps[name] = max(LEAST_STEPS, min(MOST_STEPS, fitting // 50 * 50))
        if plan.patience is not None:
            steps[name] = min(steps[name], *(cost.steps(plan.patience / MARGIN) for cost in own))
    return steps


def _cost(line: dict[str, Any]) -> Cost:
    measured = max(1, len(line["steps"]))
    taken = line["wall"][-1] / max(1, line["steps"][-1]) if line["steps"] else 0.0
    return Cost(taken, START + line["measuring"] / measured * (EVALUATIONS + 1))
