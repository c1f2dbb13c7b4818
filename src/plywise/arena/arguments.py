"""Refuses arguments of a wrong kind to `bench`, `diagnose` and `load`, by name."""

import inspect
import math
import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from plywise._util.checks import describe_kind, is_list, is_number
from plywise.errors import BenchError

P = ParamSpec("P")
R = TypeVar("R")

_LARGEST = 2**63
"""Above all whole numbers that torch takes as a seed or a size."""


def _is_whole(least: int) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST

    return check


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _is_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(map(_is(str), value)))


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and is_number(value) and 0 < value < math.inf


_FROM_0, _FROM_1 = (f"a whole number of at least {least}" for least in (0, 1))
_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("out", "folder"), ("a path", _is(str, os.PathLike))),
    "workload": ("the name of a workload", _is(str)),
    "workloads": ("names of workloads, in a list or in one string", _is_names),
    "methods": (
        "a list of names, classes and Method objects, or names in one string",
        lambda value: is_list(value) or isinstance(value, str),
    ),
    "search": ("the name of a search", _is(str)),
    "read": ("a string", _is(str)),
    "progress": ("True or False", _is(bool)),
    "timeout_s": ("a finite number of seconds above 0", _is_duration),
    **dict.fromkeys(("hidden_seed", "seed", "trials", "blocks"), (_FROM_0, _is_whole(0))),
    **dict.fromkeys(
        ("seeds", "steps", "batch_size", "batches", "keep_batches", "threads", "workers"),
        (_FROM_1, _is_whole(1)),
    ),
}
"""What an argument must be, in words, and its test. Functions of the user are tested where they are used."""


def refuse_wrong_kinds(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse arguments that are not what `_KINDS` says of their names.

    An argument whose default is None may also be None.

    Example:
        >>> refuse_wrong_kinds(lambda out: out)(3)
        Traceback (most recent call last):
        plywise.errors.BenchError: <lambda>: out must be a path, not 3.
        More: plywise help bench-error
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # a name that there is not: Python's own words name the function
            return function(*args, **kwargs)
        for name, value in given.items():
            noun, is_right = _KINDS.get(name, ("", None))
            is_default = value is None and signature.parameters[name].default is None
            if is_right is not None and not is_default and not is_right(value):
                raise BenchError(f"{function.__name__}: {name} must be {noun}, not {_describe(value)}.")
        return function(*args, **kwargs)

    return call


def _describe(value: object) -> str:
    return repr(value) if value is None or isinstance(value, int | float | str) else describe_kind(value)
