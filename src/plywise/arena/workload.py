"""A workload of the arena: a model, data, a task, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from plywise.arena.task import Task
from plywise.data.arrays import digest_of
from plywise.data.digits import Split
from plywise.errors import PlywiseError
from plywise.files import written_whole


@dataclass(frozen=True)
class Data:
    """Three sets that should share no sample.

    Attributes:
        train: what is trained on.
        validation: what settings are chosen by, and time to target is measured on.
        test: read once, at the end of final runs.
    """

    train: Split
    validation: Split
    test: Split

    def save(self, path: Path) -> None:
        """Write the tensors, for `load` in other processes.

        Raises:
            PlywiseError: there is no room.
        """
        parts = {name: (split.x, split.y) for name, split in vars(self).items()}
        size = sum(each.numel() * each.element_size() for part in parts.values() for each in part)
        try:
            with written_whole(path) as file:
                torch.save(parts, file)
        except (OSError, RuntimeError) as error:  # torch has words of its own for a disk that is full
            raise PlywiseError(
                f"The data could not be written to {path}: {error.__context__ or error}. They take "
                f"{size / 2**20:.0f} MiB; TMPDIR may name a folder with more room.",
                see="error-bench",
            ) from error

    def repeated(self) -> dict[str, int]:
        """How many samples of the other two parts have the inputs of a training sample."""
        seen = set(_keys(self.train.x))
        others = {"validation": self.validation, "test": self.test}
        return {name: sum(key in seen for key in _keys(part.x)) for name, part in others.items()}

    def fingerprint(self) -> str:
        """A digest of every value: other data have another one."""
        return digest_of((self.train, self.validation, self.test))

    @staticmethod
    def load(path: Path) -> Data:
        """What `save` wrote; the pages of the file are shared by all processes that read it."""
        parts = torch.load(path, weights_only=True, mmap=True)
        return Data(**{name: Split(*parts[name]) for name in ("train", "validation", "test")})


@dataclass(frozen=True)
class Workload:
    """What methods compete on.

    Attributes:
        name: its name.
        about: one line on what it is and why it is there.
        make_model: makes the network; called with the trial's seed set.
        make_data: reads the data. Raises PlywiseError where a file is missing.
        task: loss and metric.
        batch_size: samples a batch.
        steps: steps of a run.
        target: the metric on the validation set that counts as done; None: taken from the baselines of the
            same bench.
        blocks: how many blocks local learners cut the network into; 0: it cannot be cut.
        classes: number of classes, for local learners; 0 for other tasks.
    """

    name: str
    about: str
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], Data]
    task: Task
    batch_size: int = 128
    steps: int = 500
    target: float | None = None
    blocks: int = 0
    classes: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.steps < 1:
            raise PlywiseError(
                f"Workload {self.name}: batches and runs hold at least 1, not {self.batch_size} samples and "
                f"{self.steps} steps.",
                see="error-bench",
            )


def _keys(x: Tensor) -> Iterator[int]:
    """A number for each sample, the same for the same inputs and for no others, but by a chance of 2^-64.

    Images are too large to be sorted, as the rows of a table are where they are cut into parts.
    """
    for some in x.split(4096):
        for row in some.add(0).reshape(len(some), -1).numpy():  # -0 becomes 0
            yield hash(row.tobytes())
