"""Descriptions of the rules and learners that the contract checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plywise._util.import_path import load
from plywise.engine.answers import read_settings
from plywise.engine.rule import Rule
from plywise.errors import TestingError
from plywise.local.blocks import Blocks
from plywise.local.learner import Learner
from plywise.testing.contract.learners import CLASSES, make_adam, make_halving, make_modules


@dataclass(frozen=True)
class Case:
    """A rule, and the facts about it that the contract needs.

    Attributes:
        name: test id.
        make: makes a new, unattached rule.
        rates: learning rates, with at least one of which plain SGD trains a small, well-scaled network.
        adaptive_rates: the same for RMSprop and Adam.
        not_homogeneous: why a loss times c does not give updates times c; "" if it does.
        not_linear: why the update of a sum of losses is not the sum of the updates; "" if it is.
        is_backprop: whether its gradients are autograd's own.
        refuses_reentrant: whether it raises PlywiseError in a reentrant checkpoint, which hides the graph.
        remembers_scales: why a loss scale that changes between steps changes the updates; "" if it does not.
        remembers_rows: whether its running state of a layer is made from the rows of the layer, and has its
            sizes.
        family: rules of one family run the same code with other settings; "" if there is no other rule.
    """

    name: str
    make: Callable[[], Rule]
    rates: tuple[float, ...] = (0.1, 1.0, 0.01)
    adaptive_rates: tuple[float, ...] = (0.01, 0.001)
    not_homogeneous: str = ""
    not_linear: str = ""
    is_backprop: bool = False
    refuses_reentrant: bool = False
    remembers_scales: str = ""
    remembers_rows: bool = True
    family: str = ""


@dataclass(frozen=True)
class LearnerCase:
    """A learner, and the facts about it that the contract needs.

    Attributes:
        name: test id.
        kind: makes the learner: ``kind(blocks, num_classes, **training)``, as the learners of plywise do.
            ``training`` holds ``optimizer``, ``scheduler``, ``callbacks`` and ``seed``.
        raises: whether it refuses a batch that is not finite; other learners skip the step.
        optimizes: whether it takes an ``optimizer`` and a ``scheduler``; False if it learns in closed form.
        draws_nothing: why other seeds give the same numbers, though a block has dropout; "" if they do not.
        takes_any_targets: why it checks no targets (its loss does); "" if it checks them.
        keeps_activations: why the activations of a block may still exist when the next one runs; "" if not.
    """

    name: str
    kind: Callable[..., Learner]
    raises: bool = False
    optimizes: bool = True
    draws_nothing: str = ""
    takes_any_targets: str = ""
    keeps_activations: str = ""

    def make(self, seed: int = 1, **training: Any) -> Learner:
        """Make the learner on three blocks, whose parameters are drawn by ``seed``."""
        if self.optimizes:
            training = {"optimizer": make_adam, "scheduler": make_halving, **training}
        return self.kind(Blocks(make_modules(seed), torch.zeros(4, 6)), CLASSES, **training)


def make_case(factory: Callable[[], Rule] | Case | str) -> Case:
    """Make the case of a factory (such as a rule's class) or of ``module:name``, or return a case.

    Raises:
        PlywiseError: it makes no rule.

    Example:
        >>> import plywise as pw
        >>> make_case(pw.NLMS).name, make_case("plywise:NLMS").make()
        ('NLMS', NLMS(eps=0.1, reduction='mean'))
    """
    name = getattr(factory, "__name__", str(factory))
    if isinstance(factory, str):
        factory = load(factory, "your rule")
    if isinstance(factory, Case):
        return factory
    assert not isinstance(factory, str)
    try:
        made = factory() if callable(factory) else None
        makes_rule, why = isinstance(made, Rule), ""
    except TypeError as error:  # it needs arguments
        makes_rule, why = False, f" ({error})"
    if not makes_rule:
        raise TestingError(
            f"{name} must be a plywise.testing.Case, or make a plywise.Rule when it is called without "
            f"arguments{why}."
        )
    read_settings(made)  # a class that is no dataclass would break every promise
    return Case(name, factory)


def select_family(case: Case, cases: Sequence[Case], turn: int) -> bool:
    """Tell whether ``case`` is the one of its family that is tested."""
    family = [other.name for other in cases if case.family and other.family == case.family]
    return not family or family[turn % len(family)] == case.name


def find_why_stuck(made: object) -> str:
    """Find why other processes cannot import the class of an object; "" if they can."""
    kind = type(made)
    if kind.__module__ == "__main__":
        return f"{kind.__name__} is in __main__, where no other process finds it: put it in a module"
    if "<locals>" in kind.__qualname__:
        return f"{kind.__name__} is defined in a function, where no other process finds it"
    return ""
