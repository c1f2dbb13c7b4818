"""Runs a paper's experiments, keeps each run as it ends, and summarises the results."""

import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise._util.plain_json import map_floats, round_digits
from plywise._util.scratch import Scratch
from plywise.arena.reproductions import find_paper, tables
from plywise.arena.reproductions.experiment import DIGITS, MIDDLE, SIZE_WORDS, Arm, Experiment, Line
from plywise.arena.reproductions.source import ExperimentSource
from plywise.arena.reproductions.summary import judge_claim, make_outcome
from plywise.arena.run.config import TIMEOUT_S
from plywise.arena.run.executor import Executor
from plywise.arena.run.experiment import Design, Progress
from plywise.arena.run.experiment import Experiment as Runs
from plywise.arena.run.ledger import Ledger
from plywise.arena.scoring.records import FINAL, TUNED, TUNING, TrialRecord
from plywise.errors import BenchError, StateError

MARGIN = 10
"""A run is ended after this many times the duration estimated from a few of its steps."""


class Reproduction:
    """A paper's experiments in a folder.

    ``runs.jsonl`` holds the runs, ``reproduce.json`` and ``reproduce.md`` what they say. Runs that the folder
    holds are not run again.

    Args:
        paper: its name, or ``module:name`` of a `Paper` of your own.
        size: `FULL`, `MIDDLE`, `SMALL` or `DIGITS`.
        seeds: final runs of each arm, with seeds from 0.
        folder: where it is kept.
        only: names of experiments; all that have the size if empty.
        device: where training runs.
        arms: which arms are run: their methods or patterns of their names, as in ``cg3* = 1``; all if empty.
            What is summarised is all that the folder holds.

    Raises:
        PlywiseError: there is no such paper, size or experiment, or no such arm in any experiment.
        StateError: the folder holds runs with other settings.
    """

    def __init__(
        self,
        paper: str,
        size: str,
        seeds: int,
        folder: Path,
        only: Sequence[str] = (),
        device: str = "cpu",
        arms: Sequence[str] = (),
    ) -> None:
        if size not in SIZE_WORDS or seeds < 1:
            raise BenchError(
                f"Sizes are full, middle, small, digits and seeds are at least 1, not {size!r} and {seeds}."
            )
        self.paper, self.size, self.seeds, self.folder, self.device = paper, size, seeds, folder, device
        self._found = find_paper(paper)
        some = (DIGITS, MIDDLE)  # sizes that few experiments have
        whole = [one for one in self._found.experiments if size in one.sizes or size not in some]
        self.experiments = [self._found.find(name) for name in only] or whole
        if not self.experiments:
            raise BenchError(f"No experiment of {self._found.name} has {SIZE_WORDS[size]}; proxprop has one.")
        if lacking := next((one for one in self.experiments if size not in one.sizes), None):
            raise BenchError(f"{lacking.name} has no {size} size; it has: {', '.join(lacking.sizes)}.")
        self.ledger = Ledger(folder / "runs.jsonl")
        self._runs = [(one, self._arrange(one, one.arms_at(size))) for one in self.experiments]
        self._plan = [(one, self._arrange(one, self._choose_arms(one, arms))) for one in self.experiments]
        self._refuse_unknown(arms)
        self._refuse_others()

    @property
    def total(self) -> int:
        """Runs of the whole plan."""
        return sum(runs.total for _, runs in self._plan)

    @property
    def done(self) -> int:
        """Those that the ledger holds."""
        return sum(runs.done for _, runs in self._plan)

    def measure(self, executor: Executor) -> float:
        """Estimate the seconds of the remaining runs from a few steps of each method, and set the time limit.

        Raises:
            PlywiseError: a method fails in its first steps.
        """
        slowest = 0.0
        for experiment, runs in self._plan:
            if runs.done < runs.total:
                with self._open_data(experiment, runs):
                    self._probe(experiment, runs, executor)
                steps = experiment.sizes[self.size].steps
                slowest = max(slowest, *(cost.run(steps) for cost in runs.costs.values()))
        executor.timeout_s = max(TIMEOUT_S, MARGIN * slowest)
        return self._estimate_seconds(executor.count)

    def run(self, executor: Executor) -> Generator[Progress, None, None]:
        """Run the runs that the ledger does not hold; each run is kept when it ends."""
        with self.ledger.writing():
            for experiment, runs in self._plan:
                if runs.done < runs.total:
                    with self._open_data(experiment, runs):
                        for piece in runs.run(executor):
                            left = self._estimate_seconds(executor.count)
                            yield Progress(self.done, self.total, piece.line, left)

    def summarize(self) -> dict[str, Any]:
        """Summarise the runs so far."""
        return {
            "paper": self._found.title,
            "name": self._found.name,
            "size": self.size,
            "seeds": self.seeds,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "environment": environment(),
            "device": self.device,
            "unfinished": sum(runs.total - runs.done for _, runs in self._runs),
            "experiments": [self._summarize(*pair) for pair in self._runs],
        }

    def write(self, about: dict[str, Any]) -> None:
        """Write a summary as JSON and Markdown."""
        text = json.dumps(map_floats(about, _write_number), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.folder / "reproduce.json", text + "\n")
        write_whole(self.folder / "reproduce.md", tables.make_markdown(about))

    # ---- runs --------------------------------------------------------------------------------------

    def _choose_arms(self, experiment: Experiment, patterns: Sequence[str]) -> list[Arm]:
        return [
            arm
            for arm in experiment.arms_at(self.size)
            if not patterns or any(_is_called(arm, pattern) for pattern in patterns)
        ]

    def _refuse_unknown(self, patterns: Sequence[str]) -> None:
        arms = [arm for experiment in self.experiments for arm in experiment.arms_at(self.size)]
        for pattern in patterns:
            if not any(_is_called(arm, pattern) for arm in arms):
                names = ", ".join(f"{arm.name!r}" for arm in arms)
                raise BenchError(
                    f"No arm is called {pattern!r}. Write * for a comma in a name. There are: {names}."
                )

    def _arrange(self, experiment: Experiment, arms: Sequence[Arm]) -> Runs:
        """An experiment's runs: an arm with a choice of rates is tuned, and all are run with each seed."""
        source = ExperimentSource(self.paper, experiment.name, self.size)
        methods = [source.find_method(arm.name) for arm in arms]

        def choose(lines: Sequence[TrialRecord], _: float | None) -> TrialRecord | None:
            tuned_by = experiment.measure.tuned_by
            return min(lines, key=lambda line: math.inf if line["failure"] else tuned_by(line), default=None)

        design = Design(self.seeds, tracks=(TUNED,), choose=choose, check=_refuse_mistakes)
        resolved = {source.name: source.resolve()}
        return Runs(resolved, {source.name: methods}, design, self.ledger, self.device)

    def _probe(self, experiment: Experiment, runs: Runs, executor: Executor) -> None:
        """Measure one arm of each method: the others cost the same."""
        ((workload, methods),) = runs.methods.items()
        planned = {method.name for method in methods}
        arms = [arm for arm in experiment.arms_at(self.size) if arm.name in planned]
        alike = {arm.method: arm.name for arm in arms}
        failures = runs.probe(executor, [(workload, arm) for arm in alike.values()])
        for (_, failed), why in failures.items():
            if not _is_outcome(why):
                raise BenchError(f"{failed} failed: {why}.")
        for arm in arms:
            runs.costs[workload, arm.name] = runs.costs[workload, alike[arm.method]]

    @contextmanager
    def _open_data(self, experiment: Experiment, runs: Runs) -> Iterator[None]:
        """An experiment's data in a file, while it runs: all experiments' data together may be large."""
        ((workload, resolved),) = runs.workloads.items()
        with Scratch(self.folder) as scratch:
            file = scratch.path / "data.pt"
            experiment.sizes[self.size].data().save(file)
            runs.workloads[workload] = replace(resolved, file=file)
            yield

    def _refuse_others(self) -> None:
        for experiment, runs in self._runs:
            ((workload, methods),) = runs.methods.items()
            for method in methods:
                for line in runs.lines(workload, method.name):
                    expected = runs.workloads[workload].source.describe(method.grid[line["trial"]])
                    if any(line[name] != value for name, value in expected.items()):
                        raise StateError(
                            f"{self.folder} holds runs of {experiment.name}, {method.name}, with other "
                            f"settings: rate {line['rate']:g} and {line['setting']}, not "
                            f"{expected['rate']:g} and {expected['setting']}. Use another --out.",
                            see="state-bench",
                        )

    def _estimate_seconds(self, workers: int) -> float:
        return sum(runs.seconds_left(workers) for _, runs in self._plan)

    def _summarize(self, experiment: Experiment, runs: Runs) -> dict[str, Any]:
        (workload,) = runs.workloads
        lines = {arm.name: runs.lines(workload, arm.name) for arm in experiment.arms_at(self.size)}
        tuning = {name: [line for line in own if line["purpose"] == TUNING] for name, own in lines.items()}
        finals = {
            name: {line["seed"]: line for line in own if line["purpose"] == FINAL}
            for name, own in lines.items()
        }
        arms = [
            asdict(make_outcome(experiment, self.size, arm, finals[arm.name], tuning[arm.name]))
            for arm in experiment.arms_at(self.size)
            if finals[arm.name]
        ]
        claims = [
            asdict(judge_claim(experiment.measure, claim, finals[claim.better], finals[claim.worse]))
            for claim in experiment.claims_at(self.size)
            if finals[claim.better] and finals[claim.worse]
        ]
        size = experiment.sizes[self.size]
        timed = [line for own in lines.values() for line in own if line["wall"]]
        return {
            **{name: getattr(experiment, name) for name in ("name", "about", "where", "differences")},
            **{"measure": experiment.measure.name, "unit": experiment.measure.unit},
            **{"size": size.about, "steps": size.steps, "arms": arms, "claims": claims},
            "seconds": sum(line["measuring"] + line["wall"][-1] for line in timed),
        }


def _is_called(arm: Arm, pattern: str) -> bool:
    return pattern == arm.method or fnmatchcase(arm.name, pattern)


def _is_outcome(why: str) -> bool:
    """Accept divergence as an outcome; any other failure is a mistake, or the machine is too small."""
    return why.startswith(("diverged", "NonFiniteError"))


def _refuse_mistakes(line: Line) -> None:
    why = line["failure"]
    if why and not _is_outcome(why):
        raise BenchError(
            f"{line['method']} failed: {why}. This run is not counted; those that ended before are kept, and "
            "the same command goes on."
        )


def _write_number(value: float) -> float | str:
    """Six significant digits; what is not finite is written as a word."""
    return round_digits(value) if math.isfinite(value) else "diverged"
