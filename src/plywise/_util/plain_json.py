"""Nested values as JSON can hold them: dicts, lists, and numbers that are finite or rounded."""

import math
from collections.abc import Callable
from typing import Any


def map_floats(value: Any, change: Callable[[float], Any]) -> Any:
    """Return dicts, lists and tuples, nested in any way, as dicts and lists with each float changed.

    Example:
        >>> map_floats({"a": (1.0, [2.5, 3])}, round)
        {'a': [1, [2, 3]]}
    """
    if isinstance(value, dict):
        return {key: map_floats(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_floats(item, change) for item in value]
    return change(value) if isinstance(value, float) else value


def drop_infinite(value: float) -> float | None:
    """Return None for what JSON has no number for: NaN and the infinities.

    Example:
        >>> drop_infinite(0.5), drop_infinite(math.inf)
        (0.5, None)
    """
    return value if math.isfinite(value) else None


def round_digits(value: float) -> float:
    """Round to six significant digits, which are enough of everything measured.

    Example:
        >>> round_digits(0.123456789)
        0.123457
    """
    return float(f"{value:.6g}")
