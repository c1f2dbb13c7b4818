"""Old names in modules that users import from: they work for one release, and warn."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def serve_old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module: its old names give what they are called now, with a warning.

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
