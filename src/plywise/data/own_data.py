"""Reads a user's data for all commands, checks them, and cuts them into three parts if necessary."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plywise._util.suggest import suggestion
from plywise.data.arrays import call_user_function
from plywise.data.batches import Batch, Part, Split, StoredBatches, count_samples, join_target, list_tensors
from plywise.data.digits import load_digits
from plywise.data.image_folders import read_image_folder
from plywise.data.parquet import read_parquet
from plywise.data.parts import Data, draw_order
from plywise.data.readers import read_npz
from plywise.data.reading import Reader
from plywise.data.sources import Reading, name_parts, read_made
from plywise.data.tables import Table, find_doubts, name_incomplete, read_table, reorder_rows, take_column
from plywise.errors import DataError, PlywiseError
from plywise.registry.names import WORKLOAD_MODULES

AS_EVER = Reading()
FEWEST = 10
"""The fewest samples, or batches, that can be cut into parts."""
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".7z")
_UNPACK = "Unpack the archive, and give the folder that comes out."
_ROWS = 4096  # samples that are checked or compared at once


class Parts(dict[str, Any]):
    """The parts of a user's data by name: ``train``, and perhaps ``validation`` and ``test``.

    Attributes:
        guesses: sentences on what was guessed about the data, each with the flag that overrules it.
        are_from_files: whether nothing else uses these tensors, so that they may be overwritten.
    """

    guesses: tuple[str, ...] = ()
    are_from_files: bool = False


class OwnData(NamedTuple):
    """A user's data, with sentences on how they were cut and what was guessed about them."""

    data: Data
    cut: str
    guesses: tuple[str, ...] = ()


def read_parts(address: str, reading: Reading = AS_EVER) -> Parts:
    """Read the data of a user: the one reader of all commands.

    Inputs become float32, and bytes (images) are divided by 255; other integers do not change, for
    embeddings. Whole-number targets are classes or tokens, others become float32. Batches for a step function
    do not change.

    Args:
        address: ``module:name`` of a function that returns `plywise.data.sources.RETURNS`, called after
            random numbers were seeded; or a ``.npz`` file with ``x_train`` and ``y_train``, perhaps
            ``x_validation`` and ``y_validation``, perhaps ``x_test`` and ``y_test``; or a ``.csv`` or
            ``.parquet`` file whose last column is the target (classes if it holds just the numbers 0, 1, ...,
            k); or a folder that has a folder of images for each class; or ``digits``.
        reading: how to read them.

    Raises:
        PlywiseError: there are no such data, they hold NaN or infinity, or parts do not fit one another.

    Example:
        >>> {name: len(part) for name, part in read_parts("digits").items()}
        {'train': 1100, 'validation': 297, 'test': 400}
    """
    reader = Reader(reading.options)
    if ":" in address and not Path(address).exists():
        parts = Parts(read_made(address, call_user_function(address), reading, reader))
    else:
        parts = _read_files(address, reader)
        parts.are_from_files = True
        if reading.whole:
            parts = Parts({name: Split(join_target(one.x, one.y), one.y) for name, one in parts.items()})
    if "train" not in parts:
        raise DataError(f"{address} has no part called train.")
    for name, part in parts.items():
        _check_alike(address, name, part, parts["train"])
    if isinstance(parts["train"], Split):
        reader.look_for_gaps(parts["train"].y)
    parts.guesses = tuple(reader.guesses)
    return parts


@contextmanager
def explaining(guesses: Iterable[str]) -> Iterator[None]:
    """Add what was guessed about data to an error: a model may not fit them since a guess is wrong."""
    try:
        yield
    except PlywiseError as error:
        for guess in guesses:
            error.add_note(guess)
        raise


def _read_files(address: str, reader: Reader) -> Parts:
    if address == "digits":
        return Parts(zip(("train", "validation", "test"), load_digits(), strict=True))
    path, kind = Path(address), address.lower()
    if kind.endswith(".npz"):
        return _read_npz_parts(path, reader)
    if kind.endswith((".csv", ".csv.gz")):
        header, target = reader.options.header, reader.options.target
        words = None if reader.options.targets == "numbers" else target
        table = read_table(path, header == "yes" if header else None, np.float32, words)
        return Parts(train=_split_table(path, table, reader))
    if kind.endswith(".parquet"):
        words = None if reader.options.targets == "numbers" else reader.options.target
        return Parts(train=_split_table(path, read_parquet(path, words), reader))
    if address and path.is_dir():
        return Parts(read_image_folder(path, reader.note))
    choices = ("digits", *WORKLOAD_MODULES)
    raise DataError(
        "Data are module:name of a function that makes them, a .npz, .csv or .parquet file, a folder of "
        f"images, digits, or the name of a workload, not {address!r}. "
        f"{_UNPACK if kind.endswith(_ARCHIVES) else suggestion(address, choices)}".rstrip()
    )


def _read_npz_parts(path: Path, reader: Reader) -> Parts:
    arrays = read_npz(path)
    keys = [key for key in arrays if key.startswith(("x_", "y_"))]
    parts, _ = name_parts(str(path), {key[2:]: key[2:] for key in keys})
    wanted = [f"{what}_{key}" for key in list(parts.values()) or ["train"] for what in "xy"]
    if others := [key for key in arrays if key not in wanted]:
        reader.note(f"{path}: the arrays {', '.join(others)} were left out.")
    lacking = [name for name in wanted if name not in arrays]
    if lacking or "train" not in parts:
        names = " and no ".join(lacking or ["x_train"])
        raise DataError(f"{path} has no {names}; it has: {', '.join(arrays) or 'nothing'}.")
    pairs = ((part, arrays[f"x_{key}"], arrays[f"y_{key}"]) for part, key in parts.items())
    return Parts((part, _read_split(reader, x, y, f"{path}, {part}")) for part, x, y in pairs)


def _split_table(path: Path, table: Table, reader: Reader) -> Split:
    names = table.names
    if len(names) < 2:
        raise DataError(f"{path} has one column: the target is the last one, and inputs come before it.")
    if not len(table.numbers):
        raise DataError(f"{path} has no rows.")
    reader.note(table.guess)
    place = _find_target(path, names, reader)
    where = f"{path}{name_incomplete(table)}"
    for doubt in find_doubts(path, table, place):
        reader.note(doubt)
    inputs, target = map(torch.from_numpy, take_column(table.numbers, place))
    x = reader.read_inputs(inputs, where)
    if table.words:
        y = reader.read_words(target, table.words, names[place], where)
    else:
        y = reader.read_column(target, names[place], where)
    return _make_checked_split(x, y, str(path))


def _find_target(path: Path, names: list[str], reader: Reader) -> int:
    """Find the index of the column of the targets: the one of the user's name, or the last one."""
    wanted = reader.options.target
    if wanted and wanted not in names:
        hint = suggestion(wanted, tuple(names)) or f"It has: {', '.join(names[:10])}."
        raise DataError(f"{path} has no column {wanted!r}. {hint}")
    count = names.count(wanted or names[-1])
    if wanted and count > 1:
        raise DataError(f"{path} has {count} columns {wanted!r}: give the target a name of its own.")
    if count > 1:
        reader.note(
            f"{path} has {count} columns {names[-1]!r}: the last one was taken as the target, the others as "
            "inputs. Remove them if they hold the target, too."
        )
    return names.index(wanted) if wanted else len(names) - 1


def cut_parts(address: str, parts: Parts) -> OwnData:
    """Cut data into training, validation and test parts, unless they are cut already.

    Args:
        address: their name in errors.
        parts: the result of `read_parts`. A table from a file is overwritten, to save memory.

    Raises:
        PlywiseError: there are fewer than 10 training samples.
    """
    train = parts["train"]
    count, what = train.count_places(), "batches" if isinstance(train, StoredBatches) else "samples"
    if count < FEWEST:
        raise DataError(f"{address} has {count} training {what}; a comparison needs {FEWEST} at least.")
    twins = ""
    if "test" not in parts and "validation" not in parts:
        own, twins = _cut_apart(train, _count_tenths, parts.are_from_files)
        data, how = Data(*own), f"{count:,} {what} cut at random, by a fixed seed"
    elif "validation" not in parts:
        (rest, validation), twins = _cut_apart(train, _count_less_a_ninth, parts.are_from_files)
        data = Data(rest, validation, parts["test"])
        how = f"your test samples, validation a ninth of your training {what}, drawn by a fixed seed"
    elif "test" not in parts:
        (rest, test), twins = _cut_apart(train, _count_less_a_ninth, parts.are_from_files)
        data = Data(rest, parts["validation"], test)
        how = f"your validation samples, test a ninth of your training {what}, drawn by a fixed seed"
    else:
        data, how = Data(train, parts["validation"], parts["test"]), "your own three parts"
    sizes = [len(part) for part in data.parts]
    how = f"{how}{twins}: {sizes[0]:,} to train, {sizes[1]:,} to validate, {sizes[2]:,} to test"
    return OwnData(data, how + _describe_streams(parts), parts.guesses)


def _describe_streams(parts: Parts) -> str:
    stored = {name: part for name, part in parts.items() if isinstance(part, StoredBatches)}
    counts = ", ".join(f"{part.count_places():,} ({name})" for name, part in stored.items())
    return f"; batches are kept as they came in one pass, augmented once: {counts}" if stored else ""


def _count_tenths(count: int) -> list[int]:
    held = max(1, count // 10)
    return [count - 2 * held, held, held]


def _count_less_a_ninth(count: int) -> list[int]:
    held = max(1, count // 9)
    return [count - held, held]


def _cut_apart(
    whole: Part, sizes: Callable[[int], list[int]], may_overwrite: bool
) -> tuple[Sequence[Part], str]:
    """Cut parts of given sizes, with equal inputs in one part; return the number of such samples, too.

    Samples with equal inputs in training and test would make the test easier than new samples.
    """
    if isinstance(whole, StoredBatches):
        cut = sizes(whole.count_places())
        return [whole.pick(places.tolist()) for places in draw_order(sum(cut), cut).split(cut)], ""
    assert isinstance(whole, Split)
    kind, kinds = _number_kinds(whole.x, may_overwrite)
    twins = len(kind) - kinds
    if twins and kinds >= FEWEST:
        order, cut = _order_kinds(kind, kinds, sizes(kinds))
        note = f", {twins:,} with the inputs of another kept beside it"
    else:
        cut = sizes(len(whole))
        order = draw_order(len(whole), cut)
        note = f", with only {kinds} different inputs, the same ones in several parts" if twins else ""
    del kind
    if may_overwrite and isinstance(whole.x, Tensor):
        xs = reorder_rows(whole.x, order).split(cut)
        return [Split(x, y) for x, y in zip(xs, whole.y[order].split(cut), strict=True)], note
    return [whole.take(rows) for rows in order.split(cut)], note


def _order_kinds(kind: Tensor, kinds: int, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """Order the samples by kind, kinds in random order; return the number of samples in each part, too."""
    drawn = draw_order(kinds, sizes)
    counts = kind.bincount(minlength=kinds)
    place = drawn.argsort().to(kind.dtype)[kind]
    order = torch.from_numpy(place.numpy().argsort(kind="stable"))  # takes less memory than that of torch
    return order, [int(counts[part].sum()) for part in drawn.split(sizes)]


def _number_kinds(x: Batch, may_overwrite: bool) -> tuple[Tensor, int]:
    """Number the rows of a table, equal inputs alike; return the number of different rows, too.

    Rows are compared by their bytes, which takes 2 s for a million rows of 20 numbers (`torch.unique` takes 8
    s). In data that are not a table each sample gets its own number.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.numel():
        return torch.arange(count_samples(x)), count_samples(x)
    if x.is_floating_point() and any(_has_minus_zero(piece) for piece in x.split(_ROWS)):
        x = x.add_(0) if may_overwrite else x.add(0)  # -0 becomes 0
    rows = np.ascontiguousarray(x.numpy())
    whole = rows.view(np.dtype((np.void, rows.strides[0])))[:, 0]
    order = whole.argsort(kind="stable")  # rows are not moved, so a large table is not copied
    new = np.ones(len(order), bool)
    for start in range(1, len(order), _ROWS):
        here = order[start : start + _ROWS]
        new[start : start + _ROWS] = whole[here] != whole[order[start - 1 : start - 1 + len(here)]]
    numbers = new.cumsum(dtype=_choose_int(len(new)))
    numbers -= 1
    kind = np.empty_like(numbers)
    kind[order] = numbers
    return torch.from_numpy(kind), int(numbers[-1]) + 1


def _choose_int(count: int) -> type[np.signedinteger[Any]]:
    """Return the smallest integer type for sample numbers, which may need as much memory as a table."""
    return np.int32 if count < 2**31 else np.int64


def _has_minus_zero(x: Tensor) -> bool:
    return bool((x.signbit() & (x == 0)).any())


def _check_alike(address: str, name: str, part: Part, train: Part) -> None:
    first, second = (next(iter(one.chunks(2))) for one in (train, part))
    are_stored = isinstance(part, StoredBatches) or isinstance(train, StoredBatches)
    for what, one, other in zip(("input", "target"), first, second, strict=True):
        kinds = [[_describe_kind(t, are_stored) for t in list_tensors(batch)] for batch in (one, other)]
        if kinds[0] != kinds[1]:
            mine, theirs = (", ".join(kind) for kind in kinds)
            raise DataError(f"{address}: a training {what} is {mine}, and a {name} {what} {theirs}.")


def _describe_kind(values: Tensor, is_stored: bool) -> str:
    """Describe a sample of a tensor; samples of stored batches may have any length."""
    shape = f"{values.dim() - 1} dimensions" if is_stored else f"shape {tuple(values.shape[1:])}"
    return f"{str(values.dtype).removeprefix('torch.')} of {shape}"


def _read_split(reader: Reader, x: Any, y: Any, what: str) -> Split:
    return _make_checked_split(reader.read_inputs(x, what), reader.read_targets(y, what), what)


def _make_checked_split(inputs: Tensor, targets: Tensor, what: str) -> Split:
    if len(inputs) != len(targets):
        raise DataError(f"{what}: there are {len(inputs)} inputs and {len(targets)} targets.")
    if len(inputs) == 0:
        raise DataError(f"{what}: there is no sample.")
    return Split(inputs, targets)
