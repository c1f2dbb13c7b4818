"""Checks of hyper-parameters, for constructors."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


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


def describe_kind(value: object) -> str:
    """Return how a message names an argument of a wrong kind: a class by its name, an object by its type's.

    Example:
        >>> describe_kind(0.1), describe_kind(dict)
        ('float', 'the class dict')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def list_functions(owner: object, name: str, given: Iterable[F]) -> list[F]:
    """Return a list of functions, or raise TypeError for anything else, such as a single function."""
    who = f"{type(owner).__name__}: {name} must be a list of functions"
    if callable(given) or isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{who}, not {'a function' if callable(given) else describe_kind(given)}.")
    functions = list(given)
    for function in functions:
        if not callable(function):
            raise TypeError(f"{who}, and {function!r} in it is none.")
    return functions
