"""Checks of hyper-parameters, for constructors."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])
M = TypeVar("M")


def is_number(value: object) -> bool:
    """Return whether a value is a plain number: no bool, tensor or text."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_positive(owner: object, **values: float) -> None:
    """Raise ValueError for any value of an object, or of a function by name, but finite numbers above 0."""
    for name, value in values.items():
        if not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{_name(owner)}: {name} must be a finite number above 0, not {value!r}.")


def require_from_zero(owner: object, **values: float) -> None:
    """Raise ValueError for any value but finite numbers from 0 on."""
    for name, value in values.items():
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{_name(owner)}: {name} must be a finite number from 0 on, not {value!r}.")


def require_whole(owner: object, **values: int) -> None:
    """Raise ValueError for any value that is not a whole number above zero."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{_name(owner)}: {name} must be a whole number above 0, not {value!r}.")


def require_choice(owner: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{_name(owner)}: {name} must be one of {', '.join(map(repr, choices))}, not {value!r}."
        )


def require_kind(owner: object, name: str, value: object, kind: type, noun: str) -> None:
    """Raise TypeError for a value that is not an instance of a class, which the message calls ``noun``."""
    if not isinstance(value, kind):
        raise TypeError(f"{_name(owner)}: {name} must be {noun}, not {describe_kind(value)}.")


def _name(owner: object) -> str:
    """Return how messages name a function (by its name) or an object (by its class)."""
    return owner if isinstance(owner, str) else type(owner).__name__


def is_list(value: object) -> bool:
    """Return whether a value can be read as a list: no text and no tensor, which can be iterated, too.

    Example:
        >>> is_list([1]), is_list("ab"), is_list(range(3))
        (True, False, True)
    """
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and not hasattr(value, "dim")


def make_part(name: str, make: Callable[..., object], *args: object, kind: type[M]) -> M:
    """Call a user's function that makes a module, and return the module.

    Args:
        name: what the message calls the function.
        make: the function; a class will do, but not a module, because each block needs one of its own.
        args: its arguments.
        kind: the class that its result must have.

    Raises:
        TypeError: it is no such function, or makes something else.
    """
    if not callable(make) or (hasattr(make, "forward") and not isinstance(make, type)):
        given = f"a {type(make).__name__}" if callable(make) else repr(make)
        raise TypeError(f"{name} must be a function that makes a {kind.__name__}, not {given}.")
    made = make(*args)
    if not isinstance(made, kind):
        raise TypeError(f"{name} must return a {kind.__name__}, not {describe_kind(made)}.")
    return made


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
    if callable(given) or not is_list(given):
        raise TypeError(f"{who}, not {'a function' if callable(given) else describe_kind(given)}.")
    functions = list(given)
    for function in functions:
        if not callable(function):
            raise TypeError(f"{who}, and {function!r} in it is none.")
    return functions
