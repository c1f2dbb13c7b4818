"""Measures what trials cost, from a few steps of each: seconds of a step, and of everything else."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from plywise.arena.run.config import ResolvedWorkload
from plywise.arena.run.executor import Executor
from plywise.arena.run.job import PROBE_SAMPLES, TrialJob
from plywise.arena.scoring.records import TrialRecord

MOST_STEPS = 20_000
"""Steps of a run whose step costs nothing."""

Pair = tuple[str, str]
"""A workload and a method."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a method's trials take on a workload: for one step, and for everything else."""

    step: float
    rest: float

    def run(self, steps: int) -> float:
        """Seconds of one trial."""
        return self.rest + steps * self.step

    def steps(self, seconds: float) -> int:
        """Steps of a trial that takes so many seconds, at least 1."""
        return max(1, int((seconds - self.rest) / self.step)) if self.step else MOST_STEPS


Costs = Mapping[Pair, Cost]


def measure_costs(
    jobs: Iterable[TrialJob], workloads: Mapping[str, ResolvedWorkload], executor: Executor
) -> tuple[dict[Pair, Cost], dict[Pair, str]]:
    """Measure what each method's trials cost, and which fail.

    A method that fails costs next to nothing: it will fail at its first steps in the experiment, too.

    Args:
        jobs: a probe of each method on each workload.
        workloads: by name.
        executor: runs the probes.
    """
    lines = {job.key[:2]: line for job, line in executor.run(jobs)}
    failures = {pair: line["failure"] for pair, line in lines.items() if line["failure"]}
    costs = {pair: _scale_cost(line, workloads[pair[0]], executor.start_s) for pair, line in lines.items()}
    return costs, failures


def estimate_seconds(left: Mapping[Pair, int], costs: Costs, steps: Mapping[str, int], workers: int) -> float:
    """Seconds that trials take.

    An arm whose cost is not known counts as the mean of those on its workload, or else of all others.

    Args:
        left: trials of each method on each workload.
        costs: what `measure_costs` found.
        steps: of each workload.
        workers: trials at once.
    """
    seconds = {pair: cost.run(steps[pair[0]]) for pair, cost in costs.items()}
    alike: dict[str, list[float]] = defaultdict(list)
    for (workload, _), value in seconds.items():
        alike[workload].append(value)
    means = {workload: fmean(values) for workload, values in alike.items()}
    mean = fmean(seconds.values()) if seconds else 0.0
    likely = {pair: seconds.get(pair, means.get(pair[0], mean)) for pair in left}
    return sum(count * likely[pair] for pair, count in left.items()) / workers


def _scale_cost(line: TrialRecord, workload: ResolvedWorkload, start_s: float) -> Cost:
    """A probe's seconds, scaled to whole sets: it was measured before its first step and after its last."""
    step = line["wall"][-1] / max(1, line["steps"][-1]) if line["steps"] else 0.0
    measured = max(1, len(line["steps"]))
    limits = math.inf, max(PROBE_SAMPLES, workload.workload.batch_size)
    all_samples, probed = (_measured_samples(workload, limit) for limit in limits)
    measurements = workload.workload.steps // workload.workload.interval + 1
    return Cost(step, start_s + line["measuring"] / measured * all_samples / probed * measurements)


def _measured_samples(workload: ResolvedWorkload, limit: float) -> float:
    """Training and validation samples of one measurement, where no set has more than ``limit``."""
    training = min(workload.workload.train_eval_size, workload.sizes["train"], limit)
    return training + min(workload.sizes["validation"], limit)
