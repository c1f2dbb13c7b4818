"""Tables in Parquet files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plywise.data.tables import Table
from plywise.errors import PlywiseError


def read_parquet(path: Path) -> Table:
    """The numbers of a Parquet file, a row for each sample, and the names of the columns.

    Raises:
        PlywiseError: pyarrow is not installed, the file cannot be read, or a column holds no numbers.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise PlywiseError(
            f"{path} is a Parquet file, and pyarrow, which reads it, is not installed: pip install pyarrow.",
            see="error-extra",
        ) from error
    if not path.exists():
        raise PlywiseError(f"There is no file {path}.", see="error-data")
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has errors of its own
        raise PlywiseError(f"{path} cannot be read as Parquet: {error}.", see="error-data") from error
    columns = []
    for name in table.column_names:
        try:
            columns.append(table.column(name).to_numpy().astype(np.float32))
        except (ValueError, TypeError) as error:
            raise PlywiseError(
                f"{path}: column {name!r} holds no numbers ({error}). Encode it, or leave it out.",
                see="error-data",
            ) from error
    values = np.stack(columns, 1) if columns else np.zeros((0, 0))
    return Table(values, list(table.column_names))
