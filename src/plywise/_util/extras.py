"""Packages that plywise brings only as extras."""

from importlib import import_module
from typing import Any

from plywise.errors import MissingPackageError

TENSORBOARD = "--tensorboard needs TensorBoard: pip install 'plywise[tensorboard]'."
PANDAS = "to_dataframe needs pandas: pip install pandas. Without it, rows() has the same as dicts."


def import_extra(module: str, need: str) -> Any:
    """Import a module of a package that may be missing.

    Args:
        module: its name.
        need: says what needs the package, and how to install it.

    Raises:
        PlywiseError: the package is missing, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" It cannot be imported: {error}."
        raise MissingPackageError(f"{need}{why}") from error
