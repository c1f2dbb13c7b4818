"""Batches of tensors in any nesting, and the parts of a data set from which they are drawn.

Bench, diagnose, train, pipeline and the learners all use these batches. A batch is a pair of inputs and
targets. Each of them is a tensor, or tensors in tuples, lists, dicts and dataclasses, nested in any way; the
first dimension of each tensor counts samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Batch = Any
"""Tensors in any nesting of tuples, lists, mappings and dataclasses."""

TARGETS = ("labels", "label", "targets", "target", "y")
"""Names of entries of a batch that are its targets."""

_TYPE = "plywise type"
"""The key under which a packed batch names a dataclass or a named tuple."""


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Apply ``function`` to each tensor of a nesting; other values do not change.

    Example:
        >>> map_tensors(len, {"x": torch.zeros(3, 2), "more": (torch.zeros(3), "name")})
        {'x': 3, 'more': (3, 'name')}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_tensors(function, value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if _is_dataclass(batch):
        made = {f.name: map_tensors(function, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
        return type(batch)(**made)
    return batch


def list_tensors(batch: Batch) -> list[Tensor]:
    """List all tensors of a batch, in its order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def count_samples(batch: Batch) -> int:
    """Count the samples of a batch: the size of the first dimension of its first tensor; 1 for a scalar.

    Example:
        >>> count_samples({"ids": torch.zeros(5, 7), "mask": torch.ones(5, 7)})
        5
    """
    tensors = list_tensors(batch)
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 1


def take_samples(batch: Batch, rows: Tensor | slice) -> Batch:
    """Take some samples of a batch: rows of each tensor that has as many rows as the first one."""
    samples = count_samples(batch)
    return map_tensors(lambda t: t[rows] if t.dim() and len(t) == samples else t, batch)


def clone_batch(batch: Batch) -> Batch:
    """Copy a batch, so that a model may write into it."""
    return map_tensors(torch.clone, batch)


def move_batch(batch: Batch, device: str | torch.device) -> Batch:
    """Return the batch on a device."""
    return map_tensors(lambda t: t.to(device), batch)


def split_target(batch: Batch) -> tuple[Batch, Batch | None]:
    """Split what a user's loader returns into inputs and targets; None if there is no target.

    The last entry of a tuple or list is the target. In a mapping or a dataclass it is the entry called
    labels, label, targets, target or y; the inputs are then the whole batch, from which `call_model` takes
    the arguments of the model.

    Example:
        >>> split_target((1, 2, 3)), split_target({"ids": 1, "labels": 2})
        (((1, 2), 3), ({'ids': 1, 'labels': 2}, 2))
    """
    if isinstance(batch, Mapping):
        return dict(batch), next((batch[name] for name in TARGETS if name in batch), None)
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        if len(batch) < 2:
            return (batch[0] if batch else batch), None
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    return batch, next((getattr(batch, name) for name in TARGETS if hasattr(batch, name)), None)


def join_target(x: Batch, y: Batch) -> Batch:
    """Join inputs and targets again: the inverse of `split_target`."""
    if isinstance(x, Mapping) or _is_dataclass(x) or hasattr(x, "_fields"):
        return x
    return (*x, y) if isinstance(x, tuple) else (x, y)


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


# ---- writing and reading -------------------------------------------------------------------------


def pack(batch: Batch) -> Any:
    """Convert a batch to dicts, tuples, lists and tensors, which `torch.load` reads without running code."""
    if isinstance(batch, Mapping):
        return {key: pack(value) for key, value in batch.items()}
    if _is_dataclass(batch) or hasattr(batch, "_fields"):
        names = batch._fields if hasattr(batch, "_fields") else [f.name for f in dataclasses.fields(batch)]
        home = f"{type(batch).__module__}:{type(batch).__qualname__}"
        return {_TYPE: home, **{name: pack(getattr(batch, name)) for name in names}}
    return type(batch)(map(pack, batch)) if isinstance(batch, tuple | list) else batch


def unpack(packed: Any) -> Batch:
    """Invert `pack`."""
    if isinstance(packed, Mapping):
        values = {key: unpack(value) for key, value in packed.items() if key != _TYPE}
        if _TYPE not in packed:
            return values
        module, _, name = packed[_TYPE].partition(":")
        return operator.attrgetter(name)(importlib.import_module(module))(**values)
    return type(packed)(map(unpack, packed)) if isinstance(packed, tuple | list) else packed


def update_digest(digest: Any, *batches: Batch) -> None:
    """Feed all values of some batches to a digest of `hashlib`."""
    for tensor in list_tensors(batches):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).reshape(-1).view(np.uint8))


# ---- parts ---------------------------------------------------------------------------------------


class Part(Protocol):
    """A data set for training, validation or test, from which batches are drawn."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def count_batches(self, size: int) -> int:
        """Count the batches in an epoch, the last one perhaps smaller."""

    def batch(self, place: int, size: int, order: Tensor | None = None) -> tuple[Batch, Batch]:
        """Return a batch of an epoch, in an order of samples (or of whole batches, if these are stored)."""

    def count_places(self) -> int:
        """Return the length of an ``order``."""

    def epoch(self, size: int, order: Tensor) -> Iterator[tuple[Batch, Batch]]:
        """Yield whole batches in an order."""

    def chunks(self, size: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield all samples once, at most ``size`` at a time (or stored batch by stored batch)."""

    def head(self, count: int) -> Part:
        """Return about the first ``count`` samples."""

    def to(self, device: str) -> Part:
        """Return the part on a device."""

    def update_digest(self, digest: Any) -> None:
        """Feed every value to a digest of `hashlib`."""

    def pack(self) -> dict[str, Any]:
        """Return the part in a form for `torch.save`, which `unpack_part` reads."""


@dataclass(frozen=True)
class Split:
    """Samples in memory: inputs and targets, with a row for each sample.

    Attributes:
        x: inputs, a tensor (N, ...) or such tensors in any nesting.
        y: targets, alike.
    """

    x: Batch
    y: Batch

    def __len__(self) -> int:
        return count_samples(self.x)

    def take(self, rows: Tensor | slice) -> Split:
        """Take some of the samples."""
        return Split(take_samples(self.x, rows), take_samples(self.y, rows))

    def count_places(self) -> int:
        """Count the samples."""
        return len(self)

    def count_batches(self, size: int) -> int:
        """Count the batches in an epoch, the last one perhaps smaller."""
        return -(-len(self) // size)

    def batch(self, place: int, size: int, order: Tensor | None = None) -> tuple[Batch, Batch]:
        """Return a batch of an epoch."""
        rows: Any = slice(place * size, (place + 1) * size)
        part = self.take(rows if order is None else order[rows])
        return part.x, part.y

    def epoch(self, size: int, order: Tensor) -> Iterator[tuple[Batch, Batch]]:
        """Yield whole batches in an order of samples; fewer samples than ``size`` make one batch."""
        size = min(size, len(order))
        for place in range(len(order) // size):
            yield self.batch(place, size, order)

    def chunks(self, size: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield all samples once, at most ``size`` at a time."""
        for place in range(self.count_batches(size)):
            yield self.batch(place, size)

    def head(self, count: int) -> Split:
        """Return the first samples."""
        return self.take(slice(count))

    def to(self, device: str) -> Split:
        """Return the samples on a device."""
        return Split(move_batch(self.x, device), move_batch(self.y, device))

    def update_digest(self, digest: Any) -> None:
        """Feed every value to a digest of `hashlib`."""
        update_digest(digest, self.x, self.y)

    def pack(self) -> dict[str, Any]:
        """Return inputs and targets."""
        return {"x": pack(self.x), "y": pack(self.y)}


@dataclass(frozen=True)
class StoredBatches:
    """Batches of a user's loader, each in a file, for streams and for data larger than memory.

    Attributes:
        files: a file for each batch.
        sizes: the number of samples of each.
        values: a digest of the values of each.
        device: the device to which batches are read.
        folder: keeps the files until it is deleted; None if another object keeps them.
    """

    files: Sequence[str]
    sizes: Sequence[int]
    values: Sequence[str]
    device: str = "cpu"
    folder: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(self.sizes)

    def pick(self, places: Sequence[int]) -> StoredBatches:
        """Pick some of the batches."""
        return dataclasses.replace(
            self,
            files=[self.files[i] for i in places],
            sizes=[self.sizes[i] for i in places],
            values=[self.values[i] for i in places],
        )

    def count_places(self) -> int:
        """Count the batches."""
        return len(self.files)

    def count_batches(self, size: int) -> int:
        """Count the batches."""
        return len(self.files)

    def batch(self, place: int, size: int, order: Tensor | None = None) -> tuple[Batch, Batch]:
        """Return a stored batch."""
        file = self.files[place if order is None else int(order[place])]
        x, y = torch.load(file, weights_only=True, mmap=True)
        return move_batch(unpack(x), self.device), move_batch(unpack(y), self.device)

    def epoch(self, size: int, order: Tensor) -> Iterator[tuple[Batch, Batch]]:
        """Yield the batches in an order."""
        for place in range(len(order)):
            yield self.batch(place, size, order)

    def chunks(self, size: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield the batches, one after another."""
        for place in range(len(self.files)):
            yield self.batch(place, size)

    def head(self, count: int) -> StoredBatches:
        """Return as many batches as hold ``count`` samples."""
        places, samples = 0, 0
        while samples < count and places < len(self.files):
            samples, places = samples + self.sizes[places], places + 1
        return self.pick(range(places))

    def to(self, device: str) -> StoredBatches:
        """Return the same batches, read to a device."""
        return dataclasses.replace(self, device=device)

    def update_digest(self, digest: Any) -> None:
        """Feed the batches' digests to a digest of `hashlib`."""
        digest.update(" ".join(self.values).encode())

    def pack(self) -> dict[str, Any]:
        """Return where the batches are."""
        return {"files": list(self.files), "sizes": list(self.sizes), "values": list(self.values)}


def list_targets(part: Part) -> Iterator[Tensor]:
    """Yield the targets of a part: all at once if they are in memory, else batch by batch."""
    return iter([part.y]) if isinstance(part, Split) else (y for _, y in part.chunks(1))


def unpack_part(packed: Mapping[str, Any]) -> Split | StoredBatches:
    """Invert ``pack`` of `Split` and `StoredBatches`."""
    if "files" in packed:
        return StoredBatches(packed["files"], packed["sizes"], packed["values"])
    return Split(unpack(packed["x"]), unpack(packed["y"]))


class BatchWriter:
    """Writes batches to files one by one, so that only one is in memory.

    Args:
        folder: the folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[str] = []
        self._sizes: list[int] = []
        self._values: list[str] = []

    def __len__(self) -> int:
        return len(self._files)

    def write(self, x: Batch, y: Batch) -> None:
        """Write a batch."""
        file = str(self._folder / f"{len(self._files)}.pt")
        # a view of a larger tensor would be written with the whole tensor
        x, y = (map_tensors(lambda t: t.detach().cpu().contiguous().clone(), part) for part in (x, y))
        torch.save((pack(x), pack(y)), file)
        digest = hashlib.blake2b(digest_size=16)
        update_digest(digest, x, y)
        self._files.append(file)
        self._sizes.append(count_samples(x))
        self._values.append(digest.hexdigest())

    def finish(self, folder: Any = None) -> StoredBatches:
        """Return the batches; ``folder`` is kept as long as they are."""
        return StoredBatches(self._files, self._sizes, self._values, folder=folder)


def endless_batches(part: Part, batch_size: int, seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Yield batches without end, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from part.epoch(batch_size, torch.randperm(part.count_places(), generator=generator))
