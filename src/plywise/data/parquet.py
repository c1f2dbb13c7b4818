"""Reads tables in Parquet files."""

from pathlib import Path
from typing import Any

import numpy as np

from plywise._util.extras import import_extra
from plywise._util.file_errors import describe_failure, require_file
from plywise._util.memory import free_memory
from plywise.data.tables import Table
from plywise.data.unpacking import check_size
from plywise.errors import DataError, PlywiseError

_BYTES = 12
"""Memory that a number takes while it is read: pyarrow's, and ours."""


def read_parquet(path: Path, target: str | None = None) -> Table:
    """The numbers of a Parquet file, a row for each sample, and the names of the columns.

    Args:
        path: the file.
        target: name of the column that may hold words, or ``""`` for the last one. They become numbers in the
            order of the alphabet, NaN where one is missing. None: no column.

    Raises:
        PlywiseError: pyarrow is not installed, the file cannot be read, does not fit the checksums in it, or
            a column holds no numbers.
    """
    need = f"{path} is a Parquet file, and pyarrow, which reads it, is not installed: pip install pyarrow."
    try:
        with require_file(path).open("rb") as file:  # of a folder pyarrow would read all files
            opened = import_extra("pyarrow.parquet", need).ParquetFile(file, page_checksum_verification=True)
            rows, columns = opened.metadata.num_rows, opened.metadata.num_columns
            check_size(path, rows * columns * _BYTES, free_memory())
            table = opened.read()
    except PlywiseError:
        raise
    except Exception as error:  # pyarrow has its own errors, some of which are OSErrors without a number
        why = describe_failure(error, path)
        if not getattr(error, "errno", None):
            why = f"{path} cannot be read as Parquet, it may be damaged: {why}"
        raise DataError(f"{why}.") from error
    names, words = list(table.column_names), list[str]()
    place = names.index(target) if target in names else len(names) - 1
    values = np.empty((len(table), len(names)), np.float32)
    for number, (name, column) in enumerate(zip(names, table.columns, strict=True)):
        if number == place and target is not None and _holds_words(column):
            words, values[:, number] = _number_words(column)
        else:
            values[:, number] = _read_numbers(path, name, column)
    return Table(values, names, words=words)


def _holds_words(column: Any) -> bool:
    """Whether a column holds text, perhaps as places in a dictionary."""
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _number_words(column: Any) -> tuple[list[str], Any]:
    rows = [None if word is None else word.strip() or None for word in column.to_pylist()]
    words = sorted({word for word in rows if word is not None})
    numbers: dict[str | None, float] = {word: number for number, word in enumerate(words)}
    return words, [numbers.get(word, np.nan) for word in rows]


def _read_numbers(path: Path, name: str, column: Any) -> Any:
    from pyarrow import types

    kind = column.type
    are_numbers = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
    if not any(is_such(kind) for is_such in are_numbers):
        raise DataError(f"{path}: column {name!r} holds no numbers, but {kind}. Encode it, or leave it out.")
    with np.errstate(all="ignore"):  # infinite and missing numbers are refused later, by name
        return column.to_numpy().astype(np.float32)
