"""Cuts samples into disjoint parts for training, validation and test, always in the same way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plywise._util.files import written_whole
from plywise.data.batches import (
    Batch,
    Part,
    Split,
    StoredBatches,
    count_samples,
    list_tensors,
    take_samples,
    unpack_part,
)
from plywise.errors import BenchError


@dataclass(frozen=True)
class Data:
    """Three sets that should share no sample, each a `plywise.data.batches.Part`.

    Attributes:
        train: the training set.
        validation: the set for choosing settings and for measuring the time to the target.
        test: the test set, read once at the end of final runs.
    """

    train: Any
    validation: Any
    test: Any

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """The three sets."""
        return self.train, self.validation, self.test

    def to(self, device: str) -> Data:
        """Return the data on a device."""
        return Data(*(part.to(device) for part in self.parts))

    def save(self, path: Path) -> None:
        """Write the tensors, or the paths of stored batches, for `load` in other processes.

        Raises:
            PlywiseError: there is no space on the disk.
        """
        parts = {name: part.pack() for name, part in vars(self).items()}
        size = sum(each.numel() * each.element_size() for each in list_tensors(parts))
        try:
            with written_whole(path) as file:
                torch.save(parts, file)
        except (OSError, RuntimeError) as error:  # torch has an error of its own for a full disk
            cause = error if isinstance(error, OSError) else error.__context__
            why = cause.strerror if isinstance(cause, OSError) else "no room for more"
            size = math.ceil(size / 2**20)
            raise BenchError(
                f"The data could not be written to {path}: {why}. They take {size} MiB: make room there, or "
                "name another --out."
            ) from error

    def count_repeated(self) -> dict[str, int]:
        """Count the samples of the other two parts that have the same inputs as a training sample."""
        keys = {name: np.fromiter(_hash_inputs(part), np.int64) for name, part in vars(self).items()}
        seen = keys.pop("train")  # as integers of 8 bytes: a set of them would be larger than a table
        return {name: int(np.isin(part, seen).sum()) for name, part in keys.items()}

    def fingerprint(self) -> str:
        """Compute a digest of all values."""
        return compute_digest(self.parts)

    @staticmethod
    def load(path: Path) -> Data:
        """Load what `save` wrote, as a memory map that all processes share."""
        parts = torch.load(path, weights_only=True, mmap=True)
        return Data(**{name: unpack_part(parts[name]) for name in ("train", "validation", "test")})


def compute_digest(parts: Iterable[Part]) -> str:
    """Compute a digest of every value of some parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part.update_digest(digest)
    return digest.hexdigest()


SEED = 0
"""The seed of all cuts: the samples of a workload are the same in every trial."""


def draw_parts(x: Batch, y: Batch, sizes: Sequence[int]) -> list[Split]:
    """Draw disjoint parts of given sizes by the fixed seed; the other samples are not used.

    Example:
        >>> parts = draw_parts(torch.arange(10.0), torch.arange(10), [6, 2])
        >>> [len(part.y) for part in parts], bool(torch.isin(parts[0].y, parts[1].y).any())
        ([6, 2], False)
    """
    order = draw_order(count_samples(x), sizes)
    return [Split(take_samples(x, rows), take_samples(y, rows)) for rows in order.split(list(sizes))]


def draw_order(count: int, sizes: Sequence[int]) -> Tensor:
    """Draw as many of ``count`` indices as the sum of ``sizes``, by the fixed seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))[: sum(sizes)]


def cut_tenths(x: Batch, y: Batch) -> Data:
    """Cut samples into 8, 1 and 1 tenth, drawn by the fixed seed, with at least one sample in each.

    Example:
        >>> data = cut_tenths(torch.arange(100.0), torch.arange(100))
        >>> len(data.train.y), len(data.validation.y), len(data.test.y)
        (80, 10, 10)
    """
    count = count_samples(x)
    held = max(1, count // 10)
    return Data(*draw_parts(x, y, [count - 2 * held, held, held]))


def cut_tenths_of_kinds(x: Tensor, y: Tensor) -> Data:
    """Cut as `cut_tenths` does, but keep samples with equal inputs in one part.

    A model that was trained on the inputs of a sample knows much about its target, so equal inputs in two
    parts would make the test easier than new samples.

    Example:
        >>> twins = torch.arange(50.0).repeat(2).unsqueeze(1)
        >>> data = cut_tenths_of_kinds(twins, torch.zeros(100))
        >>> len(data.train.y), bool(torch.isin(data.test.x, data.train.x).any())
        (80, False)
    """
    kinds, kind = torch.unique(x.nan_to_num(torch.finfo(x.dtype).max), dim=0, return_inverse=True)
    numbers = torch.arange(len(kinds))
    parts = vars(cut_tenths(numbers, numbers)).values()
    chosen = [torch.isin(kind, part.y) for part in parts]
    return Data(*(Split(x[rows], y[rows]) for rows in chosen))


def _hash_inputs(part: Any) -> Iterator[int]:
    """Hash each sample's inputs to a number; different inputs collide with a probability of 2^-64.

    Rows of tables are sorted, but images are too large for that. A stored batch whose tensors differ in
    length, such as nodes and edges of graphs, is hashed as a whole, because its rows are not samples.
    """
    for x, _ in part.chunks(4096):
        count, tensors = count_samples(x), [t.add(0) for t in list_tensors(x) if t.dim()]  # -0 becomes 0
        if isinstance(part, StoredBatches) and any(len(t) != count for t in tensors):
            whole = hash(tuple(t.numpy().tobytes() for t in tensors))
            yield from [whole] * count
            continue
        rows = [t.reshape(count, -1).numpy() for t in tensors if len(t) == count]
        for row in zip(*rows, strict=True):
            yield hash(row[0].tobytes() if len(row) == 1 else tuple(one.tobytes() for one in row))
