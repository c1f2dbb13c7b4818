"""The local learners that plywise ships, by name, and what can be set about them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import plywise
from plywise.addresses import load
from plywise.catalogue import LEARNERS, suggestion
from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from plywise.local.learner import Learner

READERS = ("AssociatedLearning", "CascadedForward")
"""Learners that read the classes off what the blocks hand on; for the others the last block's output is
the prediction."""

_TRAINING = ("optimizer", "scheduler", "rule", "callbacks", "seed")


def find_learner(name: str) -> type[Learner]:
    """The learner called ``name``, whatever its letters' case.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_learner("localloss").__name__
        'LocalLoss'
    """
    known = {learner.lower(): learner for learner in LEARNERS}
    if name.lower() not in known:
        hint = suggestion(name, LEARNERS)
        raise PlywiseError(f"No learner is called {name!r}. {hint}There are: {', '.join(LEARNERS)}.")
    learner: type[Learner] = getattr(plywise, known[name.lower()])
    return learner


def learner_settings(learner: type[Learner], given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as a learner takes them: where it wants a function, ``module:name`` is loaded.

    Raises:
        PlywiseError: the learner has no such hyper-parameter, or the address of a function is wrong.

    Example:
        >>> import plywise as pw
        >>> learner_settings(pw.AssociatedLearning, {"code": 64})
        {'code': 64}
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(learner).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _TRAINING
    }
    check_settings(learner.__name__, given, known)
    return {
        name: load(str(value), f"{name} of {learner.__name__}") if callable(known[name]) else value
        for name, value in given.items()
    }


def check_settings(owner: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise PlywiseError for the first hyper-parameter that ``owner`` does not have."""
    names = tuple(known)
    for name in given:
        if name not in names:
            hint = f"{suggestion(name, names)}It has: {', '.join(names) or 'none at all'}."
            raise PlywiseError(f"{owner} has no hyper-parameter {name!r}. {hint}")
