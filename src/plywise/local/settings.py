"""The hyper-parameters of local learners by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from plywise._util.import_path import load
from plywise._util.suggest import suggestion
from plywise.errors import CommandError

if TYPE_CHECKING:
    from plywise.local.learner import Learner

READERS = ("AssociatedLearning", "CascadedForward", "ForwardForward", "MonoForward")
"""Learners whose heads predict from the blocks' outputs; for the others the last block's output is the
prediction."""

_TRAINING = ("optimizer", "scheduler", "rule", "callbacks", "seed")


def learner_settings(learner: type[Learner], given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert hyper-parameters for a learner: where it takes a function, load ``module:name``.

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
            raise CommandError(f"{owner} has no hyper-parameter {name!r}. {hint}")
