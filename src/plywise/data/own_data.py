"""The one reader of a user's data: from wherever they are, checked, and cut into three parts if need be."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from plywise._util.suggest import suggestion
from plywise.data.arrays import made_by
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data, draw_parts, tenths
from plywise.data.readers import read_npz
from plywise.data.reading import Reader, ReadOptions
from plywise.data.tables import read_table, take_column
from plywise.errors import PlywiseError
from plywise.registry.names import WORKLOAD_MODULES

FEWEST = 10
"""Samples without which there are no parts to speak of."""
_GUESS = ReadOptions()
_ROWS = 4096  # compared at once
RETURNS = (
    "(x, y), (x, y, x_test, y_test) or three pairs (x, y) for training, validation and test; a torch Dataset "
    "may stand for each (x, y)"
)


class Parts(dict[str, Split]):
    """The parts that a user has, by name: ``train``, and perhaps ``validation`` and ``test``.

    Attributes:
        guesses: what was guessed about them, a sentence each, with the flag that overrules it.
    """

    guesses: tuple[str, ...] = ()


class OwnData(NamedTuple):
    """Data, how they were cut, and what was guessed about them."""

    data: Data
    cut: str
    guesses: tuple[str, ...] = ()


def read_parts(address: str, options: ReadOptions = _GUESS) -> Parts:
    """Read the data of a user: the one reader of all commands.

    Inputs become float32: bytes (images) are divided by 255; other integers stay as they are, for embeddings.
    Whole-number targets are classes or tokens, others float32; see `plywise.data.reading`.

    Args:
        address: ``module:name`` of a function that returns `RETURNS`, called with random numbers of a fixed
            seed; or a ``.npz`` file with ``x_train`` and ``y_train``, perhaps ``x_validation`` and
            ``y_validation``, perhaps ``x_test`` and ``y_test``; or a ``.csv`` file whose last column is the
            target; or ``digits``.
        options: what is not to be guessed.

    Raises:
        PlywiseError: there are no such data, they hold NaN or infinity, or parts do not fit one another.

    Example:
        >>> {name: len(part.y) for name, part in read_parts("digits").items()}
        {'train': 1100, 'validation': 297, 'test': 400}
    """
    if address == "digits":
        return Parts(zip(("train", "validation", "test"), load_digits(), strict=True))
    reader = Reader(options)
    if address.endswith(".npz"):
        parts = _of_npz(Path(address), reader)
    elif address.endswith((".csv", ".csv.gz")):
        parts = Parts(train=_of_table(Path(address), reader))
    elif ":" in address:
        parts = _of_function(address, made_by(address), reader)
    else:
        choices = ("digits", *WORKLOAD_MODULES)
        raise PlywiseError(
            "Data are module:name of a function that makes them, a .npz or .csv file, digits, or the name of "
            f"a workload, not {address!r}. {suggestion(address, choices)}".rstrip(),
            see="error-data",
        )
    for name, part in parts.items():
        _check_alike(address, name, part, parts["train"])
    parts.guesses = tuple(reader.guesses)
    return parts


def _of_npz(path: Path, reader: Reader) -> Parts:
    arrays = read_npz(path)
    parts = [part for part in ("train", "validation", "test") if {f"x_{part}", f"y_{part}"} & arrays.keys()]
    wanted = [f"{what}_{part}" for part in parts or ["train"] for what in "xy"]
    lacking = [name for name in wanted if name not in arrays]
    if lacking or "train" not in parts:
        names = " and no ".join(lacking or ["x_train"])
        raise PlywiseError(
            f"{path} has no {names}; it has: {', '.join(arrays) or 'nothing'}.", see="error-data"
        )
    pairs = ((part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in parts)
    return Parts((part, _read_split(reader, x, y, f"{path}, {part}")) for part, x, y in pairs)


def _of_table(path: Path, reader: Reader) -> Split:
    header, wanted = reader.options.header, reader.options.target
    table = read_table(path, header == "yes" if header else None, np.float32)
    names = table.names
    if len(names) < 2:
        raise PlywiseError(
            f"{path} has one column: the target is the last one, and inputs come before it.", see="error-data"
        )
    reader.say(table.guess)
    if wanted and names.count(wanted) != 1:
        count = names.count(wanted) or "no"
        hint = suggestion(wanted, tuple(names)) or f"It has: {', '.join(names[:10])}."
        raise PlywiseError(f"{path} has {count} columns {wanted!r}. {hint}".rstrip(), see="error-data")
    place = names.index(wanted) if wanted else len(names) - 1
    inputs, target = map(torch.from_numpy, take_column(table.numbers, place))
    x, y = reader.inputs(inputs, str(path)), reader.column(target, names[place], str(path))
    return _checked_split(x, y, str(path))


def _of_function(address: str, made: Any, reader: Reader) -> Parts:
    if isinstance(made, Dataset):
        made = (made,)
    things = list(made) if isinstance(made, tuple | list) else []
    if things and all(isinstance(thing, Dataset) for thing in things) and len(things) <= 3:
        pairs = [_stacked(thing, address) for thing in things]
    elif len(things) in (2, 4) and not any(isinstance(thing, Dataset) for thing in things):
        pairs = [(things[i], things[i + 1]) for i in range(0, len(things), 2)]
    elif len(things) == 3 and all(_is_pair(thing) for thing in things):
        pairs = [
            _stacked(thing, address) if isinstance(thing, Dataset) else (thing[0], thing[1])
            for thing in things
        ]
    else:
        found = f"{len(things)} things" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
        raise PlywiseError(f"{address} returned {found}; it must return {RETURNS}.", see="error-data")
    names = {1: ("train",), 2: ("train", "test"), 3: ("train", "validation", "test")}[len(pairs)]
    read = (
        _read_split(reader, x, y, f"{address}, {name}") for name, (x, y) in zip(names, pairs, strict=True)
    )
    return Parts(zip(names, read, strict=True))


def _is_pair(thing: Any) -> bool:
    return isinstance(thing, Dataset) or (isinstance(thing, tuple | list) and len(thing) == 2)


def _stacked(dataset: Dataset[Any], what: str) -> tuple[Any, Any]:
    """All samples of a dataset, as two arrays."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    if not isinstance(dataset, Sized):
        raise PlywiseError(
            f"{what}: a {type(dataset).__name__} has no length; give a Dataset that has one.",
            see="error-data",
        )
    pairs = [dataset[index] for index in range(len(dataset))]
    if not pairs or any(not _is_pair(pair) for pair in pairs):
        raise PlywiseError(
            f"{what}: a {type(dataset).__name__} must hold samples, each a pair (x, y).", see="error-data"
        )
    return [x for x, _ in pairs], [y for _, y in pairs]


def cut_parts(address: str, parts: Parts) -> OwnData:
    """Cut data into training, validation and test parts, where they are not cut already.

    Args:
        address: what they are called in errors.
        parts: what `read_parts` has read.

    Raises:
        PlywiseError: there are fewer than 10 training samples.
    """
    train = parts["train"]
    count = len(train.y)
    if count < FEWEST:
        raise PlywiseError(
            f"{address} has {count} training samples; a comparison needs {FEWEST} at least.", see="error-data"
        )
    twins = ""
    if "test" not in parts and "validation" not in parts:
        own, twins = _apart(train, _in_tenths)
        data, how = Data(*own), f"{count:,} samples cut at random, by a fixed seed"
    elif "validation" not in parts:
        (rest, validation), twins = _apart(train, _less_a_ninth)
        data = Data(rest, validation, parts["test"])
        how = "your test samples, validation a ninth of your training samples, drawn by a fixed seed"
    elif "test" not in parts:
        (rest, test), twins = _apart(train, _less_a_ninth)
        data = Data(rest, parts["validation"], test)
        how = "your validation samples, test a ninth of your training samples, drawn by a fixed seed"
    else:
        data, how = Data(train, parts["validation"], parts["test"]), "your own three parts"
    sizes = [len(part.y) for part in (data.train, data.validation, data.test)]
    cut = f"{how}{twins}: {sizes[0]:,} to train, {sizes[1]:,} to validate, {sizes[2]:,} to test"
    return OwnData(data, cut, parts.guesses)


def _in_tenths(x: Tensor, y: Tensor) -> list[Split]:
    return list(vars(tenths(x, y)).values())


def _less_a_ninth(x: Tensor, y: Tensor) -> list[Split]:
    held = max(1, len(y) // 9)
    return draw_parts(x, y, [len(y) - held, held])


def _apart(whole: Split, cut: Callable[[Tensor, Tensor], Sequence[Split]]) -> tuple[Sequence[Split], str]:
    """Samples as ``cut`` cuts them, but those of a table with the same inputs in one part; and how many are.

    A model that has seen a sample's inputs knows much of its target, so that twins in two parts would make
    the test easier than new samples are.
    """
    kind, kinds = _kinds(whole.x)
    twins = len(kind) - kinds
    if not twins:
        return cut(whole.x, whole.y), ""
    if kinds < FEWEST:
        return cut(whole.x, whole.y), f", with only {kinds} different inputs, the same ones in several parts"
    numbers = torch.arange(kinds)
    parts = [part.y for part in cut(numbers, numbers)]
    place = torch.cat(parts).argsort()
    rows = place[kind].argsort(stable=True)  # kind by kind, as these were drawn
    counts = kind.bincount()
    samples = rows.split([int(counts[part].sum()) for part in parts])
    told = f", {twins:,} with the inputs of another kept beside it"
    return [Split(whole.x[own], whole.y[own]) for own in samples], told


def _kinds(x: Tensor) -> tuple[Tensor, int]:
    """Numbers for the rows of a table, the same for the same inputs, and how many there are.

    Rows are compared by their bytes: of a million rows of 20 numbers that takes 2 s, and `torch.unique` 8 s.
    What is no table has a number for each sample.
    """
    if x.dim() != 2 or not x.numel():
        return torch.arange(len(x)), len(x)
    if x.is_floating_point() and bool((x.signbit() & (x == 0)).any()):
        x = x.add(0)  # -0 becomes 0
    rows = np.ascontiguousarray(x.numpy())
    whole = rows.view(np.dtype((np.void, rows.strides[0])))[:, 0]
    order = whole.argsort(kind="stable")  # no row is moved: of a large table there are no copies
    new = np.ones(len(order), bool)
    for start in range(1, len(order), _ROWS):
        here = order[start : start + _ROWS]
        new[start : start + _ROWS] = whole[here] != whole[order[start - 1 : start - 1 + len(here)]]
    kind = np.empty(len(order), np.int64)
    kind[order] = new.cumsum() - 1
    return torch.from_numpy(kind), int(new.sum())


def _check_alike(address: str, name: str, part: Split, train: Split) -> None:
    for what, one, other in (("input", train.x, part.x), ("target", train.y, part.y)):
        if (one.shape[1:], one.dtype) != (other.shape[1:], other.dtype):
            raise PlywiseError(
                f"{address}: a training {what} is {_kind(one)}, and a {name} {what} {_kind(other)}.",
                see="error-data",
            )


def _kind(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape[1:])}"


def _read_split(reader: Reader, x: Any, y: Any, what: str) -> Split:
    return _checked_split(reader.inputs(x, what), reader.targets(y, what), what)


def _checked_split(inputs: Tensor, targets: Tensor, what: str) -> Split:
    if len(inputs) != len(targets):
        raise PlywiseError(
            f"{what}: there are {len(inputs)} inputs and {len(targets)} targets.", see="error-data"
        )
    if len(inputs) == 0:
        raise PlywiseError(f"{what}: there is no sample.", see="error-data")
    return Split(inputs, targets)
