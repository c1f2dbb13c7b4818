"""Reads ``.csv`` files line by line, so that a table needs only the memory of its numbers."""

import csv
import io
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from plywise.data.unpacking import open_unpacked
from plywise.errors import DataError

_ROWS = 1024  # rows that are moved at once
_FEWEST_STEPS = 4096  # of float32, in the range of a column
_WHOLE = 2**24  # up to here float32 holds each whole number
_SHOWN = 5  # names of columns in a message
_WRITTEN_NUMBER = re.compile(r"[-+]?[$€£]?\s?\d{1,3}(([,.' ]\d{3})+|\d*)([.,]\d+)?\s?[%$€£]?")  # as people do
_PIECES = 16  # in which a table is put into another order


class Table(NamedTuple):
    """A table of numbers.

    Attributes:
        numbers: (rows, columns), with NaN where a cell is empty or ``nan``.
        names: the names of the columns; ``column 1``, ``column 2``, ... where the file has none.
        guess: a sentence on what was guessed about the first line; empty if it was clear.
        words: the words that the numbers 0, 1, 2, ... stand for, if the target column holds words.
    """

    numbers: NDArray[Any]
    names: list[str]
    guess: str = ""
    words: Sequence[str] = ()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Yield the rows of a ``.csv`` file as mappings by the names in the first line; a cell may hold any text.

    Raises:
        PlywiseError: it cannot be read, two columns have the same name, or a row has more or fewer cells than
            the first line.
    """
    lines = _read_cells(path)
    names = next(lines, [])
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path} has two columns {twice!r}: name each otherwise.")
    rows = [dict(zip(names, row, strict=True)) for row in lines]
    if not rows:
        raise DataError(f"{path} has no rows under its first line.")
    return rows


def read_table(
    path: Path, header: bool | None = None, dtype: type[Any] = np.float64, target: str | None = None
) -> Table:
    r"""Read a ``.csv`` file of numbers, usually below a line of names.

    It is read line by line, and only the numbers are kept in memory.

    Args:
        path: the file; it may be compressed by gzip.
        header: whether the first line holds names. None: it does, unless its cells are numbers, or numbers
            and empty cells. Numbers that count 0, 1, 2, ... are taken as names too, because pandas writes
            them for columns without names.
        dtype: the dtype of the numbers, ``np.float64`` or ``np.float32``.
        target: name of the column that may hold words, or ``""`` for the last one. They become numbers in
            alphabetical order. None: no column may hold words.

    Raises:
        PlywiseError: it cannot be read, its rows differ in length, its cells are not separated by commas, or
            a cell is not a number.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = path.write_text("size,price\n1,2.5\n3,\n")
        >>> read_table(path).numbers
        array([[1. , 2.5],
               [3. , nan]])
    """
    rows = _read_cells(path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} has no rows.")
    if len(first) == 1 and (mark := next((mark for mark in ";\t|" if mark in first[0]), None)):
        raise DataError(
            f"{path} has one column, with {mark!r} in it: a .csv file has commas between its cells, and "
            "points in its numbers. Write it so."
        )
    has_names, guess = (header, "") if header is not None else _guess_header(path, first)
    names = first if has_names else [f"column {number}" for number in range(1, len(first) + 1)]
    column = _Words(names.index(target) if target in names else len(names) - 1, target is not None)
    # grows in place: nothing is copied where memory can be remapped
    values = array("f" if dtype is np.float32 else "d")
    count = 0
    for count, row in enumerate(rows if has_names else chain([first], rows), 1):
        column.replace(row, is_first=count == 1)
        try:
            if "_" in "".join(row):  # Python reads 1_2 as 12
                raise ValueError
            values.extend([float(cell) for cell in row])
        except ValueError:
            values.extend(_parse_numbers(path, count, names, row))
    if not count:
        raise DataError(f"{path} has no rows under its first line.")
    numbers = np.frombuffer(values, dtype).reshape(count, len(names))
    return Table(numbers, names, guess, column.sort(numbers))


class _Words:
    """Replaces the words of a column by numbers, if its first cell is a word.

    Args:
        place: the index of the column.
        are_expected: whether there may be words.
    """

    def __init__(self, place: int, are_expected: bool) -> None:
        self._place, self._are_there = place, are_expected
        self._numbers: dict[str, int] = {}

    def replace(self, row: list[str], is_first: bool) -> None:
        """Replace the word in a row by its number; an empty cell stays empty."""
        if not self._are_there:
            return
        cell = row[self._place].strip()
        if is_first:
            self._are_there = not (_is_blank(cell) or _is_number(cell) or _WRITTEN_NUMBER.fullmatch(cell))
        if self._are_there and cell:
            row[self._place] = str(self._numbers.setdefault(cell, len(self._numbers)))

    def sort(self, numbers: NDArray[Any]) -> list[str]:
        """Sort the words alphabetically, and renumber the column of a table accordingly."""
        if not self._numbers:
            return []
        words = sorted(self._numbers)
        order = np.empty(len(words) + 1, numbers.dtype)
        order[[self._numbers[word] for word in words]] = np.arange(len(words))
        order[-1] = np.nan
        column = numbers[:, self._place]
        column[:] = order[np.nan_to_num(column, nan=-1).astype(np.int64)]
        return words


def find_doubts(path: Path, table: Table, target: int) -> Iterator[str]:
    """Find what a user may not have meant, in sentences: an index as input, numbers that float32 rounds.

    Args:
        path: the file.
        table: its content.
        target: the index of the target column.
    """
    numbers, names = table.numbers, table.names
    first = numbers[:, 0]
    if target and len(first) > 1 and first[0] in (0, 1) and bool((np.diff(first) == 1).all()):
        yield (
            f"The first column of {path} ({names[0]!r}) counts the rows and was taken as an input; if it is "
            "an index, write the file without it (in pandas: to_csv(index=False))."
        )
    low, high = numbers.min(0), numbers.max(0)
    largest = np.maximum(abs(low), abs(high))
    few = high - low < largest * np.finfo(np.float32).eps * _FEWEST_STEPS
    rounded = [repr(names[place]) for place in np.flatnonzero((largest >= _WHOLE) & few)]
    if rounded:
        yield (
            f"{path}: the numbers in {', '.join(rounded[:_SHOWN])} are large and differ by little: float32 "
            "rounds the differences. Subtract an offset before."
        )


def name_incomplete(table: Table) -> str:
    """Name the columns that hold NaN or infinity, for an error; empty if there are none."""
    with np.errstate(all="ignore"):
        ends = table.numbers.min(0, initial=0) + table.numbers.max(0, initial=0)
    names = [repr(table.names[place]) for place in np.flatnonzero(~np.isfinite(ends))]
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f", {'column' if len(names) == 1 else 'columns'} {', '.join(names[:_SHOWN])}{more}"


def take_column(numbers: NDArray[Any], place: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Split a column off a table, in place, without a copy; return the rest and the column.

    Example:
        >>> rest, column = take_column(np.arange(6.0).reshape(2, 3), 1)
        >>> rest.tolist(), column.tolist()
        ([[0.0, 2.0], [3.0, 5.0]], [1.0, 4.0])
    """
    rows, columns = numbers.shape
    column = numbers[:, place].copy()
    rest = numbers.reshape(-1)[: rows * (columns - 1)].reshape(rows, columns - 1)
    keep = [number for number in range(columns) if number != place]
    for start in range(0, rows, _ROWS):  # rows move to the front, so none is overwritten before it was read
        rest[start : start + _ROWS] = numbers[start : start + _ROWS][:, keep]
    return rest, column


def reorder_rows(values: Tensor, order: Tensor) -> Tensor:
    """Reorder rows in place, some columns at a time, without a copy of the whole tensor.

    Example:
        >>> import torch
        >>> reorder_rows(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 1])).tolist()
        [[5, 6], [1, 2], [3, 4]]
    """
    values = (
        values.contiguous()
    )  # images come in the order of Pillow, and Fortran's arrays in that of columns
    flat = values.view(len(values), -1)
    for columns in flat.split(max(1, flat.shape[1] // _PIECES), 1):
        columns.copy_(columns[order])
    return values


def _read_cells(path: Path) -> Iterator[list[str]]:
    """Yield the cells of each line of a file; skip empty lines, and refuse lines of different lengths."""
    with open_unpacked(path) as file:
        # utf-8-sig: spreadsheets begin their files with a byte order mark
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        columns = 0
        try:
            for row in reader:
                columns = columns or len(row)
                if row and len(row) != columns:
                    raise DataError(
                        f"{path}, line {reader.line_num}: it has {len(row)} cells, the first line "
                        f"{columns}. A cell with a comma or a quote in it needs quotes around it."
                    )
                if row:
                    yield row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not text in UTF-8: {error}. Save it in this encoding.") from error


def _guess_header(path: Path, first: list[str]) -> tuple[bool, str]:
    """Guess whether the first line holds names; return a sentence, too, if that is not certain."""
    numbers = [cell for cell in first if _is_number(cell)]
    blank = [cell for cell in first if _is_blank(cell)]
    if not numbers:
        return True, ""
    if len(numbers) + len(blank) < len(first):
        return True, (
            f"The first line of {path} holds text and numbers and was taken as the names of the columns; "
            "--read header=no takes it as a sample."
        )
    counted = first[1:] if _is_blank(first[0]) else first  # pandas writes no name for its index
    if counted == [str(number) for number in range(len(counted))]:
        return True, (
            f"The first line of {path} counts 0, 1, 2, ... and was taken as the names of the columns; "
            "--read header=no takes it as a sample."
        )
    return False, (
        f"The first line of {path} holds numbers and was taken as a sample; --read header=yes takes it as "
        "the names of the columns."
    )


def _is_blank(cell: str) -> bool:
    return not cell.strip() or cell.strip().lower() in ("nan", "na", "null")


def _is_number(cell: str) -> bool:
    try:
        return not math.isnan(float(cell)) and "_" not in cell
    except ValueError:
        return False


def _parse_numbers(path: Path, row: int, names: list[str], cells: list[str]) -> Iterator[float]:
    """Parse the numbers of a row in which some cells are not numbers."""
    for name, cell in zip(names, cells, strict=True):
        try:
            if "_" in cell:
                raise ValueError
            yield float(cell) if cell.strip() else math.nan
        except ValueError:
            raise DataError(
                f"{path}, row {row}, column {name!r}: {cell!r} is not a number. Write numbers without "
                "separators and signs of units, classes as numbers, or as columns of 0 and 1."
            ) from None
