"""Finds everything that ships with plywise by name, for command line, documentation and tests."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from plywise._util.suggest import suggestion
from plywise.errors import CommandError
from plywise.registry.names import LEARNER, NAMES, PART, RULE, list_names

if TYPE_CHECKING:
    from plywise.engine.rule import Rule
    from plywise.local.learner import Learner

RULES = list_names(RULE)
"""Names of the rules, each an attribute of `plywise`; listing them does not import torch."""

LEARNERS = list_names(LEARNER)
"""Names of the local learners, each an attribute of `plywise`."""

TITLES = {
    "rules": "Rules: attach one to your model and your optimizer",
    "local": "Local learners: blocks with losses of their own",
    "schedules": "Schedules",
    "optim": "Optimizers, in plywise.optim",
    "nn": "Modules, in plywise.nn",
    "losses": "Losses and penalties, in plywise.losses",
    "init": "Initial weights, in plywise.init",
}
"""Headings of the folders in lists of methods."""

ROOMS: dict[str, tuple[str, ...]] = {
    room: tuple(entry.name for entry in NAMES if entry.room == room and entry.kind != PART) for room in TITLES
}
"""Names of all methods, by the folder in which they are."""


_MODULES = {entry.name: entry.module for entry in NAMES if entry.kind != PART}


def find(name: str) -> Callable[..., Any]:
    """Find the class or function of the method called ``name``, in upper or lower case.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find("associatedlearning").__name__
        'AssociatedLearning'
    """
    return _load(find_name(name, tuple(_MODULES), "method"))


def find_rule(name: str) -> type[Rule]:
    """Find the rule called ``name``, as `find` does.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_rule("proxprop").__name__
        'ProxProp'
    """
    return _load(find_name(name, RULES, "rule"))


def find_learner(name: str) -> type[Learner]:
    """Find the local learner called ``name``, as `find` does.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_learner("localloss").__name__
        'LocalLoss'
    """
    return _load(find_name(name, LEARNERS, "learner"))


def find_name(name: str, names: tuple[str, ...], kind: str) -> str:
    """Find ``name`` in ``names``, in upper or lower case, and return it as it is written there.

    Raises:
        PlywiseError: it is not among them; the message suggests the nearest.
    """
    known = {one.lower(): one for one in names}
    if name.lower() not in known:
        raise CommandError(
            f"No {kind} is called {name!r}. {suggestion(name, names)}`plywise methods` lists all of them."
        )
    return known[name.lower()]


def _load(name: str) -> Any:
    return getattr(import_module(f"plywise.{_MODULES[name]}"), name)
