"""Loads what a user names by ``module:name``, with errors that say what went wrong in it."""

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from typing import Any

from plywise._util.suggest import suggestion
from plywise.errors import AddressError

INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in (
        os.path.dirname(os.path.dirname(__file__)),
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)
"""Folders whose code is not the user's."""


def load(address: str, what: str) -> Any:
    """Load ``module:name``. Modules in the current directory are found, after all installed ones.

    A user's file with the name of a package that plywise needs, such as ``jinja2.py``, does not replace it.

    Args:
        address: the module, a colon, the name.
        what: what it is for, for the error: "your model".

    Raises:
        PlywiseError: it is not an address, or there is nothing there, or importing it fails.

    Example:
        >>> load("math:tau", "the circle")
        6.283185307179586
    """
    module_name, colon, name = address.partition(":")
    if not (colon and module_name and name):
        raise AddressError(
            f"Say where {what} is as module:name, as in my_project.things:make, not {address!r}."
        )
    if module_name.endswith(".py") or os.sep in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace(os.sep, ".")
        raise AddressError(f"Write a module, not a file: {dotted}:{name}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module = _import_module(module_name)
    _refuse_hidden(module_name.partition(".")[0])
    if not hasattr(module, name):
        public = tuple(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise AddressError(f"Module {module_name!r} has no {name!r}. {suggestion(name, public)}".rstrip())
    return getattr(module, name)


def call_factory(address: str, what: str) -> Any:
    """Call the function at ``module:name`` and return its result.

    Raises:
        PlywiseError: see `load`; or it is not a function without arguments, or it raises.

    Example:
        >>> call_factory("builtins:dict", "the dictionary")
        {}
    """
    factory = load(address, what)
    is_network = hasattr(factory, "parameters") and not isinstance(factory, type)  # callable, too
    if is_network or not callable(factory):
        kind = type(factory).__name__
        raise AddressError(f"{address} is of type {kind}, not a function that makes one.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise AddressError(
            f"{address} must be callable without arguments ({error}). Wrap it in a function."
        ) from error
    except ValueError:
        pass  # a builtin without a signature: calling it will tell
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise AddressError(f"{address} raised {format_raised(error)}.") from error


def _refuse_hidden(package: str) -> None:
    """Raise PlywiseError if what was imported hides a module of the same name in the current directory."""
    beside = (os.path.join(package, "__init__.py"), f"{package}.py")
    hidden = [file for file in beside if os.path.isfile(file)]
    taken = getattr(sys.modules[package], "__file__", None) or ""
    if not hidden or (taken and any(os.path.samefile(taken, file) for file in hidden)):
        return
    raise AddressError(
        f"{hidden[0]} has the name of an installed module, {taken or 'which is built in'}, and that one is "
        "imported: give yours another name."
    )


def refuse_while_importing(call: str) -> None:
    """Raise PlywiseError if a call that loads addresses is made by a module that `load` is importing.

    A script that names itself in an address would otherwise run again from its beginning, within itself.

    Args:
        call: its name.
    """
    if _importing:
        raise AddressError(
            f"{call} is called while {_importing[-1]!r} is imported to find what an address names. Put the "
            'call below `if __name__ == "__main__":`, or give functions in place of their addresses'
        )


_importing: list[str] = []


def _import_module(name: str) -> Any:
    _importing.append(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise AddressError(
                f"There is no module {error.name!r}, neither installed nor in the current directory."
            ) from error
        raise AddressError(f"Module {name!r} needs {error.name!r}, which is not installed.") from error
    except (Exception, SystemExit) as error:
        is_script = isinstance(error, SystemExit)
        hint = ' What a script does stands below `if __name__ == "__main__":`.' if is_script else ""
        raise AddressError(f"Importing {name!r} failed: {format_raised(error)}.{hint}") from error
    finally:
        _importing.pop()


def user_line(error: BaseException) -> str:
    """Return where in the user's code an exception was raised, as " (line 3 of mine.py)"; else ""."""
    return format_line(traceback.extract_tb(error.__traceback__))


def format_line(frames: traceback.StackSummary) -> str:
    """Return the innermost line of the user's code in a stack, as " (line 3 of mine.py)"; else ""."""
    own = [frame for frame in frames if not frame.filename.startswith((*INSTALLED, "<"))]
    return f" (line {own[-1].lineno} of {os.path.basename(own[-1].filename)})" if own else ""


def format_raised(error: BaseException) -> str:
    """Return an exception and the user's line that raised it."""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{user_line(error)}"
