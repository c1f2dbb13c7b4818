"""An experiment of a paper as a workload of the arena, and its arms as methods."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from plywise._util.plain_json import round_digits
from plywise.arena.method import Method, Numbers, Trainer, TrialContext
from plywise.arena.reproductions import find_paper
from plywise.arena.reproductions.experiment import Arm, Experiment, ExperimentSize, Start
from plywise.arena.run.config import ResolvedWorkload
from plywise.arena.task import CLASSIFICATION
from plywise.arena.workload import Workload
from plywise.data.parts import Data

MEASUREMENTS = 2
"""Measurements in a run, besides the one before its first step."""


@dataclass(frozen=True)
class ExperimentSource:
    """Gives the trials of an experiment their workload and their methods, in any process.

    Attributes:
        paper: its name, or ``module:name`` of a user's own.
        experiment: its name.
        size: `FULL`, `MIDDLE`, `SMALL` or `DIGITS`.
    """

    paper: str
    experiment: str
    size: str

    @property
    def name(self) -> str:
        """The workload's name in the ledger."""
        return f"{find_paper(self.paper).name}/{self.experiment}/{self.size}"

    def load(self, data: Data | None = None) -> Workload:
        """Return the workload; its arms make the network themselves."""
        size = self._find()[1]
        return Workload(
            self.name,
            size.about,
            nn.Module,
            size.data,
            CLASSIFICATION,
            size.batch,
            size.steps,
            measure_every=max(1, size.steps // MEASUREMENTS),
            train_eval_size=size.images,
        )

    def find_method(self, name: str) -> Method:
        """Return the arm called ``name`` as a method; its rates are the points that it is tuned by."""
        experiment, size = self._find()
        return _make_method(next(arm for arm in experiment.arms if arm.name == name), size)

    def require(self) -> None:
        """See that the paper can be imported here."""
        self._find()

    def describe(self, numbers: Numbers) -> dict[str, Any]:
        """Return what a run is made with, as the ledger keeps it."""
        size = self._find()[1]
        names = ("widths", "batch", "epochs", "images", "validation", "test")
        setting = {name: getattr(size, name) for name in names}
        return {"rate": round_digits(numbers["rate"]), "setting": {**setting, "widths": list(size.widths)}}

    def resolve(self) -> ResolvedWorkload:
        """Return the workload; its data are in no file yet."""
        size = self._find()[1]
        sizes = {"train": size.images, "validation": size.validation, "test": size.test}
        return ResolvedWorkload(self, self.load(), Path(), sizes)

    def _find(self) -> tuple[Experiment, ExperimentSize]:
        experiment = find_paper(self.paper).find(self.experiment)
        return experiment, experiment.sizes[self.size]


def _make_method(arm: Arm, size: ExperimentSize) -> Method:
    def make(context: TrialContext) -> Trainer:
        example = context.example[:2].cpu()
        return arm.begin(Start(size, context.numbers["rate"], example, context.device))

    return Method(arm.name, "", {}, make, grid=tuple({"rate": rate * size.faster} for rate in arm.rates))
