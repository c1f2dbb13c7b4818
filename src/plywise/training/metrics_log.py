"""The log of a run: a line of JSON for each step, and the same for TensorBoard."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plywise._util.extras import TENSORBOARD, import_extra
from plywise._util.file_errors import explaining_files
from plywise._util.files import naming
from plywise._util.sealed import seal


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step in the log.

    Attributes:
        step: number of steps done.
        epoch: the epoch of this step, from 1.
        losses: the losses before the step, by component.
        seconds: that the run has taken so far, checkpoints and evaluations included.
        accuracy: share of the test data that is predicted right; None except after an epoch's last step.
        error: the metric in place of accuracy, the lower the better: the mean squared error of numbers, or
            the metric of a step function.
    """

    step: int
    epoch: int
    losses: Mapping[int, float]
    seconds: float
    accuracy: float | None = None
    error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the line of the log."""
        losses = {str(component): loss for component, loss in self.losses.items()}
        found = {"accuracy": self.accuracy, "error": self.error}
        judged = {name: value for name, value in found.items() if value is not None}
        place = {"step": self.step, "epoch": self.epoch}
        return {**place, "losses": losses, **judged, "seconds": round(self.seconds, 3)}


class MetricsLog:
    """Writes each line at once: a killed process loses none, a power cut none before the last `sync`.

    Each line has a check at its end (`plywise._util.sealed`). Use as a context manager.

    Args:
        path: the log; new lines are appended.
        step: number of steps done so far.
        tensorboard: whether to write for TensorBoard, too, into a folder beside the log.

    Raises:
        PlywiseError: TensorBoard is not installed.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool = False) -> None:
        self._board = _board(path.parent / "tensorboard" / path.stem, step) if tensorboard else None
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, line: StepMetrics) -> None:
        """Log a step."""
        with explaining_files(), naming(self._path):
            self._file.write(seal(json.dumps(line.as_json(), allow_nan=False)) + "\n")
        if self._board is not None:
            for component, loss in line.losses.items():
                self._board.add_scalar(f"loss/component {component}", loss, line.step)
            for name, value in (("accuracy", line.accuracy), ("error", line.error)):
                if value is not None:
                    self._board.add_scalar(f"{name}/test", value, line.step)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with explaining_files(), naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _board(folder: Path, step: int) -> Any:
    return import_extra("torch.utils.tensorboard", TENSORBOARD).SummaryWriter(folder, purge_step=step + 1)
