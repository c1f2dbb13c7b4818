"""plywise: train PyTorch networks layer by layer.

Every layer solves its own local problem instead of taking backpropagation's one explicit step::

    import plywise as pw

    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9)
    rule = pw.ProxProp(tau=1.0).attach(model, optimizer)   # the one line
    print(rule.explain())

Names are loaded on first use, so that the command line answers ``--help`` without importing torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from plywise._util.version import __version__

if TYPE_CHECKING:
    from plywise import init, layers, losses, nn, optim
    from plywise.engine.call import LinearCall, Update
    from plywise.engine.contract import LayerShape
    from plywise.engine.maps.base import LinearMap
    from plywise.engine.maps.registered import LayerType, register_layer, register_map
    from plywise.engine.rule import Rule, Size, StatefulRule
    from plywise.errors import (
        AttachError,
        BlockError,
        NonFiniteError,
        PlywiseError,
        StateError,
        UncapturedLayerError,
    )
    from plywise.local.activation_relaxation import ActivationRelaxation
    from plywise.local.associated_learning import AssociatedLearning
    from plywise.local.blocks import Blocks
    from plywise.local.cascaded_forward import CascadedForward
    from plywise.local.forward_gradient import LocalForwardGradient
    from plywise.local.interlocking import Interlocking
    from plywise.local.learner import Learner
    from plywise.local.local_loss import LocalLoss
    from plywise.local.split import split
    from plywise.rules.adabk import AdaBK
    from plywise.rules.back_matching import BackMatching
    from plywise.rules.backprop import Backprop
    from plywise.rules.consequentialism import Consequentialism
    from plywise.rules.feature_whitening import FeatureWhitening
    from plywise.rules.foof import Foof
    from plywise.rules.gradient_amplification import GradientAmplification
    from plywise.rules.kfac import KFAC
    from plywise.rules.nlms import NLMS
    from plywise.rules.precondition import Precondition
    from plywise.rules.proxprop import ProxProp
    from plywise.rules.rls import RLS
    from plywise.schedules.layer_freezing import LayerFreezing

_ROOMS = ("init", "layers", "losses", "nn", "optim")

_HOMES = {
    "ActivationRelaxation": "local.activation_relaxation",
    "AdaBK": "rules.adabk",
    "AssociatedLearning": "local.associated_learning",
    "AttachError": "errors",
    "BackMatching": "rules.back_matching",
    "Backprop": "rules.backprop",
    "BlockError": "errors",
    "Blocks": "local.blocks",
    "CascadedForward": "local.cascaded_forward",
    "Consequentialism": "rules.consequentialism",
    "FeatureWhitening": "rules.feature_whitening",
    "Foof": "rules.foof",
    "GradientAmplification": "rules.gradient_amplification",
    "Interlocking": "local.interlocking",
    "KFAC": "rules.kfac",
    "LayerFreezing": "schedules.layer_freezing",
    "Learner": "local.learner",
    "LayerShape": "engine.contract",
    "LayerType": "engine.maps.registered",
    "LocalForwardGradient": "local.forward_gradient",
    "LocalLoss": "local.local_loss",
    "LinearCall": "engine.call",
    "LinearMap": "engine.maps.base",
    "NLMS": "rules.nlms",
    "NonFiniteError": "errors",
    "PlywiseError": "errors",
    "Precondition": "rules.precondition",
    "ProxProp": "rules.proxprop",
    "RLS": "rules.rls",
    "Rule": "engine.rule",
    "Size": "engine.rule",
    "StateError": "errors",
    "StatefulRule": "engine.rule",
    "UncapturedLayerError": "errors",
    "Update": "engine.call",
    "register_layer": "engine.maps.registered",
    "register_map": "engine.maps.registered",
    "split": "local.split",
}

__all__ = [
    "KFAC",
    "NLMS",
    "RLS",
    "ActivationRelaxation",
    "AdaBK",
    "AssociatedLearning",
    "AttachError",
    "BackMatching",
    "Backprop",
    "BlockError",
    "Blocks",
    "CascadedForward",
    "Consequentialism",
    "FeatureWhitening",
    "Foof",
    "GradientAmplification",
    "Interlocking",
    "LayerFreezing",
    "LayerShape",
    "LayerType",
    "Learner",
    "LinearCall",
    "LinearMap",
    "LocalForwardGradient",
    "LocalLoss",
    "NonFiniteError",
    "PlywiseError",
    "Precondition",
    "ProxProp",
    "Rule",
    "Size",
    "StateError",
    "StatefulRule",
    "UncapturedLayerError",
    "Update",
    "__version__",
    "init",
    "layers",
    "losses",
    "nn",
    "optim",
    "register_layer",
    "register_map",
    "split",
]


_RENAMED = {"MemoryRule": "StatefulRule", "Move": "Update", "Ply": "LinearCall"}
"""Names of plywise 0.1, and what they are called now."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(
            f"plywise.{name} is called plywise.{_RENAMED[name]} since 0.2: rename it.",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__(_RENAMED[name])
    if name in _HOMES:
        value = getattr(import_module(f"plywise.{_HOMES[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"plywise.{name}")
    else:
        raise AttributeError(f"module 'plywise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
