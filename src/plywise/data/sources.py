"""Reads the data that a user's function returns: arrays, Datasets, loaders and streams become parts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from plywise._util.file_errors import describe_failure
from plywise._util.import_path import format_raised
from plywise._util.scratch import Scratch
from plywise.data.arrays import read_nested
from plywise.data.batches import (
    Batch,
    BatchWriter,
    Part,
    Split,
    StoredBatches,
    count_samples,
    join_target,
    list_tensors,
    split_target,
)
from plywise.data.reading import Reader, ReadOptions
from plywise.errors import CommandError, DataError

T = TypeVar("T")

MOST_BATCHES = 1000
"""The default number of batches that are kept from a stream."""
BATCH_SIZE = 128
"""The default number of samples in a batch of a stream of samples."""
NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""Keys of a dict of parts."""
RETURNS = (
    "(x, y), (x, y, x_test, y_test) or three pairs (x, y) for training, validation and test; a torch or "
    "Hugging Face Dataset, a DataLoader, or an iterable of batches may stand for each (x, y), and a dict may "
    "name the parts train, validation and test"
)


@dataclass(frozen=True)
class Reading:
    """Options for reading data.

    Attributes:
        options: the user's options. What they leave open is guessed.
        whole: whether a step function takes whole batches as they are.
        batch_size: samples in a batch of a stream of samples; None for 128.
        most: batches that are kept from a stream, at least 1; None for 1000.
        folder: where the batches of a stream are kept, in a folder of their own that the next one removes if
            this process is killed; None for the folder for temporary files.
    """

    options: ReadOptions = field(default_factory=ReadOptions)
    whole: bool = False
    batch_size: int | None = None
    most: int | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise CommandError(f"--keep-batches must be at least 1, not {self.most}.")


def read_made(address: str, made: Any, reading: Reading, reader: Reader) -> dict[str, Part]:
    """Read the parts from the result of a user's function.

    Raises:
        PlywiseError: the result has none of the forms of `RETURNS`, or its values are not numbers.
    """
    if isinstance(made, Mapping):
        named, others = name_parts(address, made)
        if named and not others:
            return {
                name: _read_one(f"{address}, {name}", thing, reading, reader) for name, thing in named.items()
            }
        return {"train": _read_one(address, made, reading, reader)}
    if is_source(made):
        return {"train": _read_one(f"{address}, train", made, reading, reader)}
    things = list(made) if isinstance(made, tuple | list) else []
    sources = [is_source(thing) for thing in things]
    if things and all(sources) and len(things) <= 3:
        pairs = things
    elif len(things) in (2, 4) and not any(sources):
        pairs = [(things[i], things[i + 1]) for i in range(0, len(things), 2)]
    elif len(things) == 3 and all(is_source(thing) or _is_pair(thing) for thing in things):
        pairs = things
    else:
        found = f"{len(things)} things" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
        raise DataError(f"{address} returned {found}; it must return {RETURNS}.")
    names = {1: ("train",), 2: ("train", "test"), 3: ("train", "validation", "test")}[len(pairs)]
    return {
        name: _read_one(f"{address}, {name}", pair, reading, reader)
        for name, pair in zip(names, pairs, strict=True)
    }


def name_parts(where: str, things: Mapping[Any, T]) -> tuple[dict[str, T], list[Any]]:
    """Sort out what is called as parts are, each under its usual name; return the other keys, too.

    Raises:
        PlywiseError: two things stand for one part.

    Example:
        >>> name_parts("data", {"train": 1, "val": 2, "x": 3})
        ({'train': 1, 'validation': 2}, ['x'])
    """
    keys = [key for key in things if isinstance(key, str) and key.lower() in NAMES]
    parts = {NAMES[key.lower()]: things[key] for key in keys}
    others = [key for key in things if key not in keys]
    if len(parts) < len(keys):
        raise DataError(
            f"{where} has {', '.join(map(str, keys))}, of which two stand for one part: leave one out."
        )
    return parts, others


def is_source(thing: Any) -> bool:
    """Tell whether an object holds samples or yields batches, and is not an array or a model."""
    if isinstance(thing, nn.Module):
        return False
    if isinstance(thing, Dataset | DataLoader):
        return True
    arrays = isinstance(thing, Tensor | list | tuple | Mapping | str | bytes) or hasattr(thing, "__array__")
    return isinstance(thing, Iterable) and not arrays


def _is_pair(thing: Any) -> bool:
    return isinstance(thing, tuple | list) and len(thing) == 2


def _read_one(what: str, thing: Any, reading: Reading, reader: Reader) -> Part:
    if isinstance(thing, Mapping):
        return _make_split(*split_target(thing), what, reading, reader)
    if not is_source(thing):
        return _make_split(thing[0], thing[1], what, reading, reader)
    if hasattr(thing, "with_format") and hasattr(thing, "features"):  # of Hugging Face's datasets
        thing = thing.with_format("torch")
        if hasattr(thing, "column_names") and hasattr(thing, "__len__"):
            return _make_split(*split_target(_find_columns(thing, what)), what, reading, reader)
    if isinstance(thing, DataLoader) or not isinstance(thing, Dataset):
        return _store(thing, what, reading, reader)
    if isinstance(thing, IterableDataset):
        return _store(DataLoader(thing, reading.batch_size or BATCH_SIZE), what, reading, reader)
    if isinstance(thing, TensorDataset) and len(thing.tensors) == 2:
        return _make_split(*thing.tensors, what, reading, reader)
    return _make_split(*split_target(_stack(thing, what)), what, reading, reader)


def _find_columns(dataset: Any, what: str) -> dict[str, Any]:
    """Find the columns of a Hugging Face Dataset that hold numbers."""
    kept: dict[str, Any] = {}
    for name, values in dataset[:].items():
        if isinstance(values, Tensor):
            kept[name] = values
        elif isinstance(values, list) and values and isinstance(values[0], Tensor):
            raise DataError(
                f"{what}: the samples of column {name!r} have different lengths. Pad them, or give a "
                "DataLoader with a collate_fn that does."
            )
    return kept


def _stack(dataset: Any, what: str) -> Batch:
    """Stack all samples of a Dataset to one batch."""
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{what}: a {type(dataset).__name__} has no length; give a Dataset that has one.")
    samples = list(_read_each((dataset[index] for index in range(len(dataset))), f"{what}: sample"))
    if not samples or isinstance(samples[0], Tensor) or split_target(samples[0])[1] is None:
        raise DataError(
            f"{what}: a {type(dataset).__name__} must hold samples, each a pair (x, y), or a dict with "
            "labels."
        )
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"{what}: the samples of a {type(dataset).__name__} cannot be stacked ({error}). If they differ "
            "in length, give a DataLoader with a collate_fn that pads them."
        ) from error


# ---- streams -------------------------------------------------------------------------------------


def _store(batches: Iterable[Any], what: str, reading: Reading, reader: Reader) -> StoredBatches:
    """Write the batches of a stream to files, one at a time."""
    folder = Scratch(reading.folder)
    writer, most = BatchWriter(folder.path), reading.most or MOST_BATCHES
    stream = _read_each(batches, f"{what}: batch")
    left_out: set[str] = set()
    try:
        for number, batch in enumerate(islice(stream, most), 1):
            writer.write(*_read_batch(batch, f"{what}, batch {number}", reading, reader, left_out))
    except OSError as error:
        place = "--out" if reading.folder else "TMPDIR"
        raise DataError(
            f"{what}: after {len(writer)} batches nothing more can be kept in {folder.path}: "
            f"{describe_failure(error)}. {place} may name a folder with more room."
        ) from error
    kind = type(getattr(batches, "dataset", batches)).__name__
    if not len(writer):
        raise DataError(f"{what}: a {kind} gave no batch.")
    if len(writer) == most > 1 and next(stream, None) is not None:  # one batch is asked for as an example
        reader.note(
            f"{what}: the first {most:,} batches of a longer stream were kept; --keep-batches says how many."
        )
    if left_out:
        reader.note(f"{what}: {', '.join(sorted(left_out))}: no numbers, and left out.")
    return writer.finish(folder)


def _read_each(items: Iterable[Any], what: str) -> Iterator[Any]:
    """Yield what the user's code gives; what it raises becomes an error that names the item."""
    read = 0
    try:
        for item in items:
            yield item
            read += 1
    except (Exception, SystemExit) as error:
        raise DataError(f"{what} {read + 1} could not be read: {format_raised(error)}.") from error


def _read_batch(
    batch: Any, what: str, reading: Reading, reader: Reader, left_out: set[str]
) -> tuple[Batch, Batch]:
    if isinstance(batch, Mapping) and not reading.whole:
        left_out |= {key for key, value in batch.items() if _is_text(value)}
        batch = {key: value for key, value in batch.items() if key not in left_out}
    x, y = (batch, None) if isinstance(batch, Tensor) else split_target(batch)
    part = _make_split(x, y, what, reading, reader)
    return part.x, part.y


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and any(isinstance(v, str) for v in value)
    )


# ---- values --------------------------------------------------------------------------------------


def _make_split(x: Any, y: Any, what: str, reading: Reading, reader: Reader) -> Split:
    """Make checked inputs and targets of one part or one batch."""
    if reading.whole:
        return _make_whole(join_target(x, y) if y is not None else x, what)
    if y is None:
        raise DataError(
            f"{what}: there is no target. A batch is (x, y), or a dict with labels; for anything else give "
            "--step."
        )
    inputs, targets = read_nested(x, what, reader.read_inputs), reader.read_targets(y, what)
    if isinstance(x, Mapping):  # the model may need the targets with the inputs
        inputs |= {key: targets for key, value in x.items() if value is y}
    if count_samples(inputs) != count_samples(targets):
        raise DataError(
            f"{what}: there are {count_samples(inputs)} inputs and {count_samples(targets)} targets."
        )
    if count_samples(inputs) == 0:
        raise DataError(f"{what}: there is no sample.")
    return Split(inputs, targets)


def _make_whole(batch: Any, what: str) -> Split:
    """Make a batch for a step function, in which only arrays become tensors."""
    whole = read_nested(batch, what, None)
    tensors = list_tensors(whole)
    if not tensors:
        raise DataError(f"{what}: a {type(batch).__name__} holds no tensor.")
    return Split(whole, torch.zeros(count_samples(whole)))
