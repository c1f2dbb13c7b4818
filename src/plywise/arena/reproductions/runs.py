"""One run of a reproduction, in words that travel to another process, and what comes of it there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plywise._util.import_path import user_line
from plywise.arena.reproductions import find_paper
from plywise.arena.reproductions.experiment import Arm, ExperimentSize, Start
from plywise.arena.run.job import on, rounded
from plywise.arena.run.trial import TrialResult, run_trial
from plywise.arena.scoring.records import FINAL, Key
from plywise.arena.task import CLASSIFICATION
from plywise.data.batches import endless_batches
from plywise.data.parts import Data

MEASUREMENTS = 2
"""Measurements in a run, besides the one before its first step."""


@dataclass(frozen=True)
class ExperimentKey:
    """Where a run belongs.

    Attributes:
        paper: its name, or ``module:name`` of a user's own.
        experiment: its name.
        arm: its name.
        size: `FULL` or `SMALL`.
        data: file that `Data.save` wrote.
        device: where it runs.
    """

    paper: str
    experiment: str
    arm: str
    size: str
    data: str
    device: str

    def found(self) -> tuple[Arm, ExperimentSize]:
        """The arm and the size that are meant."""
        experiment = find_paper(self.paper).find(self.experiment)
        return next(arm for arm in experiment.arms if arm.name == self.arm), experiment.sizes[self.size]

    def read(self) -> Data:
        """The data, on the device."""
        return on(self.device, Data.load(Path(self.data)))

    def start(self, size: ExperimentSize, data: Data, rate: float) -> Start:
        """What an arm begins with."""
        return Start(size, rate * size.faster, data.train.x[:2].cpu(), self.device)


@dataclass(frozen=True)
class ReproductionRun:
    """A run.

    Attributes:
        place: where it belongs.
        key: which one it is; its trial is the number of the rate.
    """

    place: ExperimentKey
    key: Key

    def perform(self) -> dict[str, Any]:
        """Run it; the line for the ledger."""
        arm, size = self.place.found()
        data = self.place.read()
        record = run_trial(
            lambda: arm.begin(self.place.start(size, data, arm.rates[self.key.trial])),
            data,
            CLASSIFICATION,
            seed=self.key.seed,
            steps=size.steps,
            batch_size=size.batch,
            measure_every=max(1, size.steps // MEASUREMENTS),
            test=self.key.purpose == FINAL,
            look=size.images,
        )
        return self._line(record)

    def failed(self, why: str) -> dict[str, Any]:
        """The line if its process did not live to tell."""
        return self._line(TrialResult(self.key.seed, failure=why))

    def _line(self, record: TrialResult) -> dict[str, Any]:
        arm, size = self.place.found()
        outcome = {key: rounded(value) for key, value in record.as_dict().items() if key != "seed"}
        finished = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        made_with = settings(size, arm.rates[self.key.trial])
        return {**self.key._asdict(), **made_with, "finished": finished, **outcome}


@dataclass(frozen=True)
class Probe:
    """What a run takes, by its second step.

    Attributes:
        place: where it belongs.
    """

    place: ExperimentKey

    def perform(self) -> dict[str, Any]:
        """``seconds`` of a run, or ``failure``."""
        try:
            return {"seconds": self._seconds(), "failure": None}
        except Exception as error:
            return self.failed(f"{type(error).__name__}: {error}{user_line(error)}")

    def failed(self, why: str) -> dict[str, Any]:
        """The line if its process did not live to tell."""
        return {"seconds": None, "failure": why}

    def _seconds(self) -> float:
        arm, size = self.place.found()
        data = self.place.read()
        batches = endless_batches(data.train, size.batch, 0)
        torch.manual_seed(0)
        begun = time.perf_counter()
        trainer = arm.begin(self.place.start(size, data, min(arm.rates)))
        trainer.step(*next(batches))
        again = time.perf_counter()
        trainer.step(*next(batches))
        step = time.perf_counter() - again
        # a measurement is a forward pass, a third of a step, over the training and the validation set
        looked = (MEASUREMENTS + 1) * (size.images + size.validation) / size.batch / 3
        return again - begun + step * (size.steps + looked)


def settings(size: ExperimentSize, rate: float) -> dict[str, Any]:
    """What a run is made with, as the ledger keeps it."""
    names = ("widths", "batch", "epochs", "images", "validation", "test")
    setting = {name: getattr(size, name) for name in names}
    return {"rate": rounded(rate * size.faster), "setting": {**setting, "widths": list(size.widths)}}
