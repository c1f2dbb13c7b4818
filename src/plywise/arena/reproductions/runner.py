"""Runs a paper's experiments, each run kept as it ends, and sums up what came of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise._util.scratch import Scratch
from plywise.arena.reproductions import find_paper, tables
from plywise.arena.reproductions.experiment import DIGITS, SIZE_WORDS, Arm, Experiment, Line
from plywise.arena.reproductions.runs import ExperimentKey, Probe, ReproductionRun, settings
from plywise.arena.reproductions.summary import outcome, ruling
from plywise.arena.run.bench import TUNING_SEED
from plywise.arena.run.executor import PATIENCE, ProcessExecutor
from plywise.arena.run.job import rounded
from plywise.arena.run.ledger import Ledger
from plywise.arena.scoring.records import FINAL, TUNED, TUNING, Key
from plywise.errors import PlywiseError, StateError

MARGIN = 10
"""A run may take so many times what a few of its steps promise, before it is given up."""


@dataclass(frozen=True)
class ReproductionProgress:
    """A run has ended: how many have, of how many, its line, and the seconds that the rest may take."""

    done: int
    total: int
    line: Line
    left: float


class Reproduction:
    """A paper's experiments in a folder.

    ``runs.jsonl`` holds the runs, ``reproduce.json`` and ``reproduce.md`` what they say. Runs that the folder
    holds are not run again.

    Args:
        paper: its name, or ``module:name`` of a `Paper` of your own.
        size: `FULL`, `SMALL` or `DIGITS`.
        seeds: final runs of each arm, with seeds from 0.
        folder: where it is kept.
        only: names of experiments; all that have the size if empty.
        device: where training runs.

    Raises:
        PlywiseError: there is no such paper, size or experiment.
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
    ) -> None:
        if size not in SIZE_WORDS or seeds < 1:
            raise PlywiseError(
                f"A size is full, small or digits and seeds are at least 1, not {size!r} and {seeds}.",
                see="error-bench",
            )
        self.paper, self.size, self.seeds, self.folder, self.device = paper, size, seeds, folder, device
        self._found = find_paper(paper)
        whole = [one for one in self._found.experiments if size in one.sizes or size != DIGITS]
        self.experiments = [self._found.find(name) for name in only] or whole
        if not self.experiments:
            raise PlywiseError(
                f"No experiment of {self._found.name} is made for the digits; proxprop has one.",
                see="error-bench",
            )
        if lacking := next((one for one in self.experiments if size not in one.sizes), None):
            raise PlywiseError(
                f"{lacking.name} has no {size} size; it has: {', '.join(lacking.sizes)}.", see="error-bench"
            )
        self.ledger = Ledger(folder / "runs.jsonl")
        self._costs: dict[tuple[str, str], float] = {}
        self._refuse_others()

    @property
    def total(self) -> int:
        """Runs of the whole plan."""
        return sum(
            self.seeds + (len(arm.rates) if len(arm.rates) > 1 else 0)
            for experiment in self.experiments
            for arm in experiment.arms_at(self.size)
        )

    @property
    def done(self) -> int:
        """Those that have been run."""
        wanted = {self._workload(experiment) for experiment in self.experiments}
        return sum(key.workload in wanted and self._counts(key) for key in self.ledger.lines)

    def measure(self, crew: ProcessExecutor) -> float:
        """Seconds that what is left may take, by a few steps of each method that has runs left.

        Sets the crew's patience by the dearest.
        """
        with Scratch(self.folder) as scratch:
            folder = str(scratch.path)
            for experiment in self.experiments:
                arms = [arm for arm in experiment.arms_at(self.size) if self._left_of(experiment, arm)]
                places = [
                    self._place(folder, experiment, arm) for arm in {a.method: a for a in arms}.values()
                ]
                for probe, line in crew.run(Probe(place) for place in places):
                    if line["failure"]:
                        raise PlywiseError(f"{probe.place.arm} failed: {line['failure']}.", see="error-bench")
                    self._costs[experiment.name, probe.place.found()[0].method] = line["seconds"]
        crew.patience = max(PATIENCE, MARGIN * max(self._costs.values(), default=0.0))
        return self._left(crew.count)

    def perform(self, crew: ProcessExecutor) -> Generator[ReproductionProgress, None, None]:
        """Run what the ledger does not hold yet; each run is kept when it ends."""
        with self.ledger.writing(), Scratch(self.folder) as scratch:
            folder = str(scratch.path)
            for experiment in self.experiments:
                yield from self._perform(crew, folder, experiment, self._tuning_runs(experiment))
                if all(key in self.ledger for key in self._tuning_runs(experiment)):
                    yield from self._perform(crew, folder, experiment, self._final_runs(experiment))

    def finish(self) -> dict[str, Any]:
        """Sum up what there is; writes it as JSON and Markdown."""
        about = {
            "paper": self._found.title,
            "name": self._found.name,
            "size": self.size,
            "seeds": self.seeds,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "environment": environment(),
            "device": self.device,
            "unfinished": self.total - self.done,
            "experiments": [self._summed(experiment) for experiment in self.experiments],
        }
        text = json.dumps(rounded_deep(about), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.folder / "reproduce.json", text + "\n")
        write_whole(self.folder / "reproduce.md", tables.markdown(about))
        return about

    # ---- runs --------------------------------------------------------------------------------------

    def _tuning_runs(self, experiment: Experiment) -> dict[Key, Arm]:
        """One for each rate, of arms that have a choice."""
        return {
            self._key(experiment, arm, TUNING, number, TUNING_SEED): arm
            for arm in experiment.arms_at(self.size)
            for number in range(len(arm.rates))
            if len(arm.rates) > 1
        }

    def _final_runs(self, experiment: Experiment) -> dict[Key, Arm]:
        """All arms with a seed, then with the next, so that a part is fair, too."""
        return {
            self._key(experiment, arm, FINAL, self._chosen(experiment, arm), seed): arm
            for seed in range(self.seeds)
            for arm in experiment.arms_at(self.size)
        }

    def _perform(
        self, crew: ProcessExecutor, folder: str, experiment: Experiment, wanted: dict[Key, Arm]
    ) -> Iterator[ReproductionProgress]:
        left = {key: arm for key, arm in wanted.items() if key not in self.ledger}
        runs = (ReproductionRun(self._place(folder, experiment, arm), key) for key, arm in left.items())
        for run, line in crew.run(runs):
            _refuse_mistakes(line)
            if line["wall"]:
                self._costs[experiment.name, left[run.key].method] = line["wall"][-1] + line["measuring"]
            self.ledger.add(line)
            yield ReproductionProgress(
                self.done, self.total, self.ledger.lines[run.key], self._left(crew.count)
            )

    def _place(self, folder: str, experiment: Experiment, arm: Arm) -> ExperimentKey:
        """Where a run of an arm belongs; its experiment's data are in a file, until another one asks."""
        file = Path(folder) / f"{experiment.name}.pt"
        if not file.exists():
            for other in file.parent.iterdir():
                other.unlink()
            experiment.sizes[self.size].data().save(file)
        return ExperimentKey(self.paper, experiment.name, arm.name, self.size, str(file), self.device)

    def _refuse_others(self) -> None:
        """Runs of the same names with other settings are no part of this."""
        for experiment in self.experiments:
            for arm in experiment.arms_at(self.size):
                for number, rate in enumerate(arm.rates):
                    expected = settings(experiment.sizes[self.size], rate)
                    for key, line in self._lines(experiment, arm):
                        if key.trial == number and any(line[k] != expected[k] for k in ("rate", "setting")):
                            raise StateError(
                                f"{self.folder} holds runs of {experiment.name}, {arm.name}, with other "
                                f"settings: rate {line['rate']:g} and {line['setting']}, not "
                                f"{expected['rate']:g} and {expected['setting']}. Use another --out.",
                                see="state-bench",
                            )

    def _chosen(self, experiment: Experiment, arm: Arm) -> int:
        """Which of an arm's rates was best in tuning; the only one if there is one."""
        if len(arm.rates) == 1:
            return 0

        def loss(number: int) -> float:
            line = self.ledger.lines[self._key(experiment, arm, TUNING, number, TUNING_SEED)]
            return math.inf if line["failure"] else experiment.measure.tuned_by(line)

        return min(range(len(arm.rates)), key=loss)

    def _left(self, workers: int) -> float:
        """Seconds of what is left; methods that are not measured yet count as the mean of the others."""
        usual = sum(self._costs.values()) / max(1, len(self._costs))
        seconds = sum(
            self._costs.get((experiment.name, arm.method), usual) * self._left_of(experiment, arm)
            for experiment in self.experiments
            for arm in experiment.arms_at(self.size)
        )
        return seconds / workers

    def _left_of(self, experiment: Experiment, arm: Arm) -> int:
        """Runs of an arm that are left."""
        expected = self.seeds + (len(arm.rates) if len(arm.rates) > 1 else 0)
        return expected - sum(self._counts(key) for key, _ in self._lines(experiment, arm))

    # ---- what the ledger holds ---------------------------------------------------------------------

    def _workload(self, experiment: Experiment) -> str:
        return f"{self._found.name}/{experiment.name}/{self.size}"

    def _key(self, experiment: Experiment, arm: Arm, purpose: str, number: int, seed: int) -> Key:
        return Key(self._workload(experiment), arm.name, purpose, TUNED, number, seed)

    def _counts(self, key: Key) -> bool:
        """Whether a run is one of this plan's: another may have had more seeds."""
        return key.purpose == TUNING or key.seed < self.seeds

    def _lines(self, experiment: Experiment, arm: Arm) -> list[tuple[Key, Line]]:
        """Runs of an arm by rate and seed, in whatever order they ended."""
        which = self._workload(experiment), arm.name
        return sorted(((k, line) for k, line in self.ledger.lines.items() if k[:2] == which), key=_first)

    def _finals(self, experiment: Experiment, arm: Arm) -> dict[int, Line]:
        lines = self._lines(experiment, arm)
        return {key.seed: line for key, line in lines if key.purpose == FINAL and self._counts(key)}

    def _summed(self, experiment: Experiment) -> dict[str, Any]:
        finals = {arm.name: self._finals(experiment, arm) for arm in experiment.arms_at(self.size)}
        arms = [
            asdict(outcome(experiment, self.size, arm, finals[arm.name], self._tuning(experiment, arm)))
            for arm in experiment.arms_at(self.size)
            if finals[arm.name]
        ]
        claims = [
            asdict(ruling(experiment.measure, claim, finals[claim.better], finals[claim.worse]))
            for claim in experiment.claims_at(self.size)
            if finals[claim.better] and finals[claim.worse]
        ]
        size = experiment.sizes[self.size]
        return {
            **{name: getattr(experiment, name) for name in ("name", "about", "where", "differences")},
            **{"measure": experiment.measure.name, "unit": experiment.measure.unit},
            **{"size": size.about, "steps": size.steps, "arms": arms, "claims": claims},
            "seconds": sum(line["measuring"] + line["wall"][-1] for line in self._all(experiment)),
        }

    def _tuning(self, experiment: Experiment, arm: Arm) -> list[Line]:
        return [line for key, line in self._lines(experiment, arm) if key.purpose == TUNING]

    def _all(self, experiment: Experiment) -> list[Line]:
        arms = experiment.arms_at(self.size)
        return [line for arm in arms for _, line in self._lines(experiment, arm) if line["wall"]]


def _first(pair: tuple[Key, Line]) -> Key:
    return pair[0]


def _refuse_mistakes(line: Line) -> None:
    """Divergence is an outcome; anything else is a mistake, or a machine that is too small."""
    why = line["failure"]
    if why and not why.startswith(("diverged", "NonFiniteError")):
        raise PlywiseError(
            f"{line['method']} failed: {why}. This run is not counted; those that ended before are kept, and "
            "the same command goes on.",
            see="error-bench",
        )


def rounded_deep(value: Any) -> Any:
    """Six significant digits everywhere; what is not finite is written as a word."""
    if isinstance(value, dict):
        return {str(key): rounded_deep(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded_deep(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "diverged"
    return rounded(value)
