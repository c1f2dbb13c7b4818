"""Checks of hyper-parameters, for constructors."""

import math
from numbers import Integral


def require_positive(owner: object, **values: float) -> None:
    """Raise ValueError for any value of an object, or of a function by name, but finite numbers above 0."""
    for name, value in values.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
            who = owner if isinstance(owner, str) else type(owner).__name__
            raise ValueError(f"{who}: {name} must be a finite number above 0, not {value!r}.")


def require_whole(owner: object, **values: int) -> None:
    """Raise ValueError for any value that is not a whole number above zero."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be a whole number above 0, not {value!r}.")


def require_choice(owner: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be one of {', '.join(map(repr, choices))}, not {value!r}."
        )
