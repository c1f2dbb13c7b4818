"""Everything that plywise ships, by name: the one list for command line, documentation and tests."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import plywise
from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from plywise.rule import Rule

RULES = (
    *("Backprop", "ProxProp", "BackMatching", "NLMS", "Consequentialism"),
    *("RLS", "FeatureWhitening", "AdaBK", "KFAC", "Foof", "Precondition"),
    "GradientAmplification",
)
"""Names of the rules, each an attribute of `plywise`; a name costs no import of torch."""

LEARNERS = (
    *("AssociatedLearning", "LocalLoss", "Interlocking", "CascadedForward"),
    *("LocalForwardGradient", "ActivationRelaxation"),
)
"""Names of the local learners, each an attribute of `plywise`."""

ROOMS: dict[str, tuple[str, ...]] = {
    "rules": RULES,
    "local": LEARNERS,
    "schedules": ("LayerFreezing",),
    "optim": ("LRSGDR", "LRSGDC", "YamAdam", "SalpSGD", "ASkewSGD", "ProximalAnchor"),
    "nn": (
        *("AdaptiveActivation", "UnfoldedDenoiser", "Threshold", "ThresholdNetwork", "VSML"),
        *("DecisionStage", "ConvLSTM"),
    ),
    "losses": (
        *("AUCMargin", "CoDA", "SPAUC", "slope_recovery", "input_gradient_penalty"),
        "wasserstein_proximal",
    ),
    "init": ("fuse_layers",),
}
"""Names of all methods, by the room that they are in."""

OUTSIDE = ("rules", "local", "schedules")
"""Rooms whose methods are attributes of `plywise` itself; the others keep theirs, as `plywise.optim` does."""


def find(name: str) -> Callable[..., Any]:
    """The class or function of the method called ``name``, whatever its letters' case.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find("associatedlearning").__name__
        'AssociatedLearning'
    """
    known = {method.lower(): (room, method) for room, methods in ROOMS.items() for method in methods}
    if name.lower() not in known:
        names = tuple(method for _, method in known.values())
        raise PlywiseError(
            f"No method is called {name!r}. {suggestion(name, names)}`plywise methods` lists all of them."
        )
    room, method = known[name.lower()]
    home = plywise if room in OUTSIDE else import_module(f"plywise.{room}")
    found: Callable[..., Any] = getattr(home, method)
    return found


def find_rule(name: str) -> type[Rule]:
    """The rule called ``name``, whatever its letters' case.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_rule("proxprop").__name__
        'ProxProp'
    """
    known = {rule.lower(): rule for rule in RULES}
    if name.lower() not in known:
        raise PlywiseError(
            f"No rule is called {name!r}. {suggestion(name, RULES)}`plywise methods` lists all of them."
        )
    rule: type[Rule] = getattr(plywise, known[name.lower()])
    return rule


def suggestion(word: str, choices: tuple[str, ...]) -> str:
    """``"Did you mean …? "`` for the choices nearest to ``word``, or nothing if none is near."""
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(lowered[match] for match in near)}? " if near else ""
