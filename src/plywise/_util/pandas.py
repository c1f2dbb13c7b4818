"""pandas, which is optional."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from plywise.errors import PlywiseError


def make_dataframe(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Rows as a pandas DataFrame.

    Raises:
        PlywiseError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise PlywiseError(
            "to_dataframe needs pandas: pip install pandas. Without it, rows() has the same as dicts.",
            see="error-extra",
        ) from error
    return pandas.DataFrame(list(rows))
