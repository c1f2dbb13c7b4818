"""Workloads and their data, made once, for the processes that run the trials."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plywise._util.scratch import Scratch
from plywise.arena.run.job import WorkloadSpec
from plywise.arena.workload import Workload
from plywise.errors import PlywiseError


class BenchData:
    """Workloads by name, their data in files that other processes map into memory.

    Args:
        entries: the workloads.
        folder: where the files are made, in a folder of their own that is swept by the next one if this
            process is killed. Default: the folder for temporary files.

    Attributes:
        workloads: by name.
        files: where the data of each are; gone after `close`.
        sizes: samples of each part.
        prints: a digest of all values.

    Raises:
        PlywiseError: a workload cannot be made: a file is missing, a factory raises, shapes do not fit.
    """

    def __init__(self, entries: Iterable[WorkloadSpec], folder: Path | None = None) -> None:
        self._scratch = Scratch(folder)
        self.workloads: dict[str, Workload] = {}
        self.files: dict[str, Path] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.prints: dict[str, str] = {}
        try:
            for number, entry in enumerate(entries):
                self._make(entry, self._scratch.path / f"{number}.pt")
        except BaseException:
            self.close()
            raise

    def _make(self, entry: WorkloadSpec, file: Path) -> None:
        self.workloads[entry.name] = entry.workload()
        data = self.workloads[entry.name].make_data()
        size, found = self.workloads[entry.name].batch_size, len(data.train.y)
        if size > found:
            raise PlywiseError(
                f"{entry.name} has {found} training samples, less than a batch of {size}.", see="error-data"
            )
        data.save(file)
        self.files[entry.name] = file
        self.sizes[entry.name] = {part: len(split.x) for part, split in vars(data).items()}
        self.prints[entry.name] = data.fingerprint()

    def close(self) -> None:
        """Remove the files."""
        self._scratch.close()
