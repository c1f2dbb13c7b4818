"""Everything that plywise ships, by name: the one list for command line, documentation and tests."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import plywise
from plywise._util.suggest import suggestion
from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from plywise.engine.rule import Rule
    from plywise.local.learner import Learner

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


TITLES = {
    "rules": "Rules: attach one to your model and your optimizer",
    "local": "Local learners: blocks with losses of their own",
    "schedules": "Schedules",
    "optim": "Optimizers, in plywise.optim",
    "nn": "Modules, in plywise.nn",
    "losses": "Losses and penalties, in plywise.losses",
    "init": "Initial weights, in plywise.init",
}
"""What each room is called where its methods are listed."""


def find(name: str) -> Callable[..., Any]:
    """The class or function of the method called ``name``, whatever its letters' case.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find("associatedlearning").__name__
        'AssociatedLearning'
    """
    rooms = {method: room for room, methods in ROOMS.items() for method in methods}
    method = named(name, tuple(rooms), "method")
    home = plywise if rooms[method] in OUTSIDE else import_module(f"plywise.{rooms[method]}")
    found: Callable[..., Any] = getattr(home, method)
    return found


def find_rule(name: str) -> type[Rule]:
    """The rule called ``name``, as `find`.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_rule("proxprop").__name__
        'ProxProp'
    """
    rule: type[Rule] = getattr(plywise, named(name, RULES, "rule"))
    return rule


def find_learner(name: str) -> type[Learner]:
    """The local learner called ``name``, as `find`.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_learner("localloss").__name__
        'LocalLoss'
    """
    learner: type[Learner] = getattr(plywise, named(name, LEARNERS, "learner"))
    return learner


def named(name: str, names: tuple[str, ...], kind: str) -> str:
    """``name`` as it is written in ``names``, whatever its letters' case.

    Raises:
        PlywiseError: it is none of them; the message suggests the nearest.
    """
    known = {one.lower(): one for one in names}
    if name.lower() not in known:
        raise PlywiseError(
            f"No {kind} is called {name!r}. {suggestion(name, names)}`plywise methods` lists all of them.",
            see="error-command",
        )
    return known[name.lower()]
