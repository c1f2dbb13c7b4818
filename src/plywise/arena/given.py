"""Gives addresses to Python objects of the user, as the command line uses for things that can be imported.

A bench names everything by address, so that its folder records what was compared and other processes can find
it. An object gets an address in a module that exists in this process only.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from plywise.errors import PlywiseError

MODULE = "given_objects"
"""Name of the module that holds what was given."""


def is_given(address: str) -> bool:
    """Whether an address is that of an object in this process only: one that was given, or of the script."""
    return any(part.startswith((f"{MODULE}:", "__main__:")) for part in address.split("+"))


def shorten(text: str) -> str:
    """Return a text without the module's name before those of objects.

    Example:
        >>> shorten("given_objects:MyRule beats sgd")
        'MyRule beats sgd'
    """
    return text.replace(f"{MODULE}:", "")


def shorten_names(
    bench: dict[str, Any], lines: Iterable[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a bench and its trials with objects named as the user knows them, without the module's name.

    Args:
        bench: what bench.json holds.
        lines: the trials of the ledger.

    Example:
        >>> shorten_names({"methods": ["given_objects:Mine"]}, [{"method": "given_objects:Mine", "seed": 1}])
        ({'methods': ['Mine']}, [{'method': 'Mine', 'seed': 1}])
    """
    text, names = json.dumps(bench), list(bench.get("methods", ()))
    if f"{MODULE}:" not in text or len(set(map(shorten, names))) < len(names):  # one is called as one of ours
        return bench, list(lines)
    return json.loads(shorten(text)), [
        {key: shorten(value) if isinstance(value, str) else value for key, value in line.items()}
        for line in lines
    ]


@contextmanager
def shorten_errors() -> Iterator[None]:
    """Leave the module's name out of errors that leave the block: the user never wrote it.

    Example:
        >>> with shorten_errors():
        ...     raise PlywiseError("given_objects:model is a network.")
        Traceback (most recent call last):
        plywise.errors.PlywiseError: model is a network.
        More: plywise help plywise-error
    """
    try:
        yield
    except PlywiseError as error:
        error.args = tuple(shorten(part) if isinstance(part, str) else part for part in error.args)
        raise


def name_object(value: Any, role: str) -> str:
    """Return the address of an object, or an address unchanged.

    Args:
        value: the object, or an address.
        role: what it is called if it has no name of its own.

    Example:
        >>> name_object("my.module:make", "model"), name_object(len, "loss")
        ('my.module:make', 'given_objects:len')
    """
    if isinstance(value, str):
        return value
    name = str(getattr(value, "__name__", "")) or str(getattr(value, "name", ""))
    name = re.sub(r"\W+", "_", name).strip("_")
    name = role if not name or name == "lambda" else name
    module = sys.modules.setdefault(MODULE, ModuleType(MODULE, __doc__))
    setattr(module, name, value)
    return f"{MODULE}:{name}"


def name_data(value: Any) -> str:
    """Return the address of data: of a function that makes them, or of the data themselves.

    Example:
        >>> name_data("digits"), name_data(([[0.0]], [1]))
        ('digits', 'given_objects:data')
    """
    return name_object(value if isinstance(value, str) or callable(value) else lambda: value, "data")
