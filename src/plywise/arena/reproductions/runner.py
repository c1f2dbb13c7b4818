"""Runs a paper's experiments, each run kept as it ends, and sums up what came of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from plywise.arena.job import on, rounded
from plywise.arena.ledger import FINAL, TUNED, TUNING, Key, Ledger
from plywise.arena.reproductions import tables
from plywise.arena.reproductions.experiment import FULL, SMALL, Arm, Experiment, Line, Paper, Start
from plywise.arena.reproductions.summary import outcome, ruling
from plywise.arena.task import CLASSIFICATION
from plywise.arena.tournament import TUNING_SEED
from plywise.arena.trial import Record, endless_batches, run_trial
from plywise.arena.workload import Data
from plywise.environment import environment
from plywise.errors import PlywiseError, StateError
from plywise.files import write_whole

MEASUREMENTS = 2
"""Measurements in a run, besides the one before its first step."""


@dataclass(frozen=True)
class Progress:
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
        paper: the paper.
        size: `FULL` or `SMALL`.
        seeds: final runs of each arm, with seeds from 0.
        folder: where it is kept.
        only: names of experiments; all of them if empty.
        device: where training runs.

    Raises:
        PlywiseError: there is no such size or experiment.
        StateError: the folder holds runs with other settings.
    """

    def __init__(
        self,
        paper: Paper,
        size: str,
        seeds: int,
        folder: Path,
        only: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        if size not in (FULL, SMALL) or seeds < 1:
            raise PlywiseError(
                f"A size is full or small and seeds are at least 1, not {size!r} and {seeds}.",
                see="error-bench",
            )
        self.paper, self.size, self.seeds, self.folder, self.device = paper, size, seeds, folder, device
        self.experiments = [paper.find(name) for name in only] or list(paper.experiments)
        self.ledger = Ledger(folder / "runs.jsonl")
        self._data: tuple[str, Data] | None = None
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

    def measure(self) -> float:
        """Seconds that what is left may take, by a few steps of each method that has runs left."""
        for experiment in self.experiments:
            for arm in experiment.arms_at(self.size):
                if (experiment.name, arm.method) not in self._costs and self._left_of(experiment, arm):
                    self._costs[experiment.name, arm.method] = self._cost(experiment, arm)
        return self._left()

    def perform(self) -> Iterator[Progress]:
        """Run what the ledger does not hold yet; each run is kept when it ends."""
        with self.ledger.writing():
            yield from self._perform()

    def _perform(self) -> Iterator[Progress]:
        for experiment in self.experiments:
            arms = experiment.arms_at(self.size)
            for arm in arms:
                if len(arm.rates) > 1:
                    for number, rate in enumerate(arm.rates):
                        yield from self._run(experiment, arm, TUNING, number, rate, TUNING_SEED)
            for seed in range(self.seeds):
                for arm in arms:
                    number = self._chosen(experiment, arm)
                    yield from self._run(experiment, arm, FINAL, number, arm.rates[number], seed)
            self._data = None

    def finish(self) -> dict[str, Any]:
        """Sum up what there is; writes it as JSON and Markdown."""
        about = {
            "paper": self.paper.title,
            "name": self.paper.name,
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

    def _run(
        self, experiment: Experiment, arm: Arm, purpose: str, number: int, rate: float, seed: int
    ) -> Iterator[Progress]:
        key = self._key(experiment, arm, purpose, number, seed)
        if key in self.ledger:
            return
        size, data = experiment.sizes[self.size], self._read(experiment)
        start = time.perf_counter()
        record = run_trial(
            lambda: arm.begin(self._start(experiment, data, rate)),
            data,
            CLASSIFICATION,
            seed=seed,
            steps=size.steps,
            batch_size=size.batch,
            measure_every=max(1, size.steps // MEASUREMENTS),
            test=purpose == FINAL,
            look=size.images,
        )
        _refuse_mistakes(record, arm)
        self._costs[experiment.name, arm.method] = time.perf_counter() - start
        self.ledger.add({**key._asdict(), **self._told(experiment, rate), **_outcome(record)})
        yield Progress(self.done, self.total, self.ledger.lines[key], self._left())

    def _start(self, experiment: Experiment, data: Data, rate: float) -> Start:
        size = experiment.sizes[self.size]
        return Start(size, rate * size.faster, data.train.x[:2].cpu(), self.device)

    def _told(self, experiment: Experiment, rate: float) -> dict[str, Any]:
        """What a run was made with."""
        size = experiment.sizes[self.size]
        settings = {
            name: getattr(size, name)
            for name in ("widths", "batch", "epochs", "images", "validation", "test")
        }
        return {
            "rate": rounded(rate * size.faster),
            "setting": json.loads(json.dumps(settings)),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        }

    def _refuse_others(self) -> None:
        """Runs of the same names with other settings are no part of this."""
        for experiment in self.experiments:
            for arm in experiment.arms_at(self.size):
                for number, rate in enumerate(arm.rates):
                    expected = self._told(experiment, rate)
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

    def _cost(self, experiment: Experiment, arm: Arm) -> float:
        """Seconds of a run, by its second step."""
        size, data = experiment.sizes[self.size], self._read(experiment)
        batches = endless_batches(data.train, size.batch, 0)
        with torch.random.fork_rng(devices=[]):
            start = time.perf_counter()
            trainer = arm.begin(self._start(experiment, data, min(arm.rates)))
            trainer.step(*next(batches))
            first = time.perf_counter() - start
            start = time.perf_counter()
            trainer.step(*next(batches))
            step = time.perf_counter() - start
        # a measurement is a forward pass, a third of a step, over the training and the validation set
        looked = (MEASUREMENTS + 1) * (size.images + size.validation) / size.batch / 3
        return first + step * (size.steps + looked)

    def _left(self) -> float:
        """Seconds of what is left; methods that are not measured yet count as the mean of the others."""
        usual = sum(self._costs.values()) / max(1, len(self._costs))
        return sum(
            self._costs.get((experiment.name, arm.method), usual) * self._left_of(experiment, arm)
            for experiment in self.experiments
            for arm in experiment.arms_at(self.size)
        )

    def _left_of(self, experiment: Experiment, arm: Arm) -> int:
        """Runs of an arm that are left."""
        expected = self.seeds + (len(arm.rates) if len(arm.rates) > 1 else 0)
        return expected - sum(self._counts(key) for key, _ in self._lines(experiment, arm))

    def _read(self, experiment: Experiment) -> Data:
        """The experiment's data, kept until another one asks."""
        if self._data is None or self._data[0] != experiment.name:
            self._data = None  # gone before the next is read
            self._data = experiment.name, on(self.device, experiment.sizes[self.size].data())
        return self._data[1]

    # ---- what the ledger holds ---------------------------------------------------------------------

    def _workload(self, experiment: Experiment) -> str:
        return f"{self.paper.name}/{experiment.name}/{self.size}"

    def _key(self, experiment: Experiment, arm: Arm, purpose: str, number: int, seed: int) -> Key:
        return Key(self._workload(experiment), arm.name, purpose, TUNED, number, seed)

    def _counts(self, key: Key) -> bool:
        """Whether a run is one of this plan's: another may have had more seeds."""
        return key.purpose == TUNING or key.seed < self.seeds

    def _lines(self, experiment: Experiment, arm: Arm) -> list[tuple[Key, Line]]:
        which = self._workload(experiment), arm.name
        return [(key, line) for key, line in self.ledger.lines.items() if key[:2] == which]

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


def _outcome(record: Record) -> dict[str, Any]:
    return {key: rounded(value) for key, value in record.as_dict().items() if key != "seed"}


def _refuse_mistakes(record: Record, arm: Arm) -> None:
    """Divergence is an outcome; anything else is a mistake, or a machine that is too small."""
    if record.failure and not record.failure.startswith(("diverged", "NonFiniteError")):
        raise PlywiseError(
            f"{arm.name} failed: {record.failure}. Nothing of this run was kept.", see="error-bench"
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
