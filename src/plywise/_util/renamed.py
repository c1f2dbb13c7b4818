"""Old names of public objects and arguments, which work for one release and warn."""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def serve_old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module that finds objects by their old names, with a warning.

    Args:
        module: the module's ``__name__``.
        names: the new name of each old one.

    Example:
        >>> import math
        >>> with warnings.catch_warnings(action="ignore"):
        ...     print(serve_old_names("math", {"circle": "tau"})("circle") == math.tau)
        True
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is called {names[name]} since 0.2: rename it.", DeprecationWarning, stacklevel=2
        )
        return getattr(sys.modules[module], names[name])

    return find


def serve_old_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: the function also takes arguments by their old names, with a warning each.

    Args:
        names: the new name of each old one.

    Example:
        >>> wait = serve_old_arguments(patience="timeout_s")(lambda timeout_s=1.0: timeout_s)
        >>> with warnings.catch_warnings(action="ignore"):
        ...     print(wait(patience=2.0), wait())
        2.0 1.0
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs and new not in kwargs:
                    warnings.warn(
                        f"The argument {old} is called {new} since 0.2: rename it.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
