"""Plans how much of a bench fits into a budget of time."""

import re
from collections.abc import Mapping
from dataclasses import replace

from plywise._util.progress import format_duration
from plywise.arena.run.config import TIMEOUT_S, BenchConfig, ResolvedBench
from plywise.arena.run.costs import MOST_STEPS, Costs, estimate_seconds
from plywise.errors import BenchError

TRIALS = (16, 12, 10, 8, 6, 5, 4)
"""Numbers of tuning trials to try, the largest first."""
SLACK = 0.9
"""Share of the budget that is planned for."""
LEAST_STEPS = 200
"""The fewest steps of a run whose length the user has not chosen; the most are `MOST_STEPS`."""
MARGIN = 3.0
"""A trial may take this many times the planned time: other points, and a busy machine, are slower."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of a duration: ``90s``, ``45m``, ``2h``, ``1h30m``.

    Raises:
        PlywiseError: it is not a duration.

    Example:
        >>> parse_duration("1h30m")
        5400.0
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip().lower())
    total = sum(float(count) * _UNITS[unit] for count, unit in parts)
    if "".join(count + unit for count, unit in parts) != text.strip().lower() or total <= 0:
        raise BenchError(f"A budget is a duration such as 90s, 45m, 2h or 1h30m, not {text!r}.")
    return total


def estimate(config: BenchConfig, costs: Costs, steps: Mapping[str, int], workers: int) -> float:
    """Seconds that a bench takes: every method is tuned ``trials`` times, then run on both tracks.

    Args:
        config: the bench.
        costs: what `plywise.arena.run.costs.measure_costs` found.
        steps: of each workload.
        workers: trials at once.
    """
    runs = config.trials + (2 if config.trials else 1) * config.seeds
    return estimate_seconds(dict.fromkeys(costs, runs), costs, steps, workers)


def fit_config(
    resolved: ResolvedBench, costs: Costs, workers: int, budget: float | None = None
) -> BenchConfig:
    """Return the config with steps and tuning trials that fit into a budget, and with a limit for each trial.

    Args:
        resolved: the bench.
        costs: what `plywise.arena.run.costs.measure_costs` found.
        workers: trials at once.
        budget: seconds; None: steps and trials are as they are.

    Raises:
        PlywiseError: not even the least fits; says how long that would take.
    """
    config, steps = resolved.config, resolved.steps
    if budget is not None:
        steps = choose_steps(config, costs, steps, workers, budget)
        specs = (replace(w, steps=steps[w.name]) if w.model else w for w in config.workloads)
        config = fit_budget(replace(config, workloads=tuple(specs)), costs, steps, workers, budget)
    return set_timeout(config, costs, steps)


def set_timeout(config: BenchConfig, costs: Costs, steps: Mapping[str, int]) -> BenchConfig:
    """Return the config with a limit that its most expensive trial keeps, if it has none yet."""
    if config.timeout_s is not None:
        return config
    slowest = max(cost.run(steps[workload]) for (workload, _), cost in costs.items())
    return replace(config, timeout_s=max(TIMEOUT_S, round(MARGIN * slowest)))


def fit_budget(
    config: BenchConfig, costs: Costs, steps: Mapping[str, int], workers: int, budget: float
) -> BenchConfig:
    """The config with as many tuning trials as fit, the same for every method; without any, if it has none.

    Raises:
        PlywiseError: not even the least fits; says how long that would take.
    """
    for trials in TRIALS if config.trials else (0,):
        tried = replace(config, trials=trials)
        needed = estimate(tried, costs, steps, workers)
        if needed <= SLACK * budget:
            return tried
    slowest = max(costs, key=lambda pair: costs[pair].step)
    raise BenchError(
        f"{format_duration(budget)} are not enough: {trials} tuning trials and {config.seeds} seeds take "
        f"about {format_duration(needed / SLACK)} with {workers} worker{'s' if workers > 1 else ''}. Take "
        f"fewer methods (the slowest step is that of {slowest[1]} on {slowest[0]}), fewer --steps or "
        "--seeds, or a larger --budget."
    )


def choose_steps(
    config: BenchConfig,
    costs: Costs,
    known: Mapping[str, int],
    workers: int,
    budget: float,
) -> dict[str, int]:
    """Steps of each workload; where the user gives none, as many as fit with 8 tuning trials.

    A trial stays below a third of the config's ``timeout_s``, if it has one.

    Args:
        config: for its seeds and ``timeout_s``, and whether it tunes.
        costs: what `plywise.arena.run.costs.measure_costs` found.
        known: steps of the workloads as they stand.
        workers: trials at once.
        budget: seconds.
    """
    steps = dict(known)
    open_ = [spec.name for spec in config.workloads if spec.model and spec.steps is None]
    runs = 8 + 2 * config.seeds if config.trials else config.seeds
    for name in open_:
        own = [cost for (workload, _), cost in costs.items() if workload == name]
        share = SLACK * budget * workers / len(steps) - runs * sum(cost.rest for cost in own)
        fitting = int(share / (runs * sum(cost.step for cost in own) or 1.0))
        steps[name] = max(LEAST_STEPS, min(MOST_STEPS, fitting // 50 * 50))
        if config.timeout_s is not None:
            steps[name] = min(steps[name], *(cost.steps(config.timeout_s / MARGIN) for cost in own))
    return steps
