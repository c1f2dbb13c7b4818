"""plywise: train PyTorch networks layer by layer.

Every layer solves its own local problem instead of taking backpropagation's one explicit step::

    import plywise as pw

    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9)
    rule = pw.ProxProp(tau=1.0).attach(model, optimizer)   # the one line
    print(rule.explain())

Names are loaded on first use, so that the command line answers ``--help`` without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plywise import layers
    from plywise.errors import AttachError, NonFiniteError, PlywiseError, UncapturedLayerError
    from plywise.layers import LayerType, register_layer
    from plywise.ply import Move, Ply
    from plywise.rule import Rule, Size
    from plywise.rules.back_matching import BackMatching
    from plywise.rules.backprop import Backprop
    from plywise.rules.consequentialism import Consequentialism
    from plywise.rules.nlms import NLMS
    from plywise.rules.proxprop import ProxProp

__version__ = "0.1.0"

_HOMES = {
    "AttachError": "errors",
    "BackMatching": "rules.back_matching",
    "Backprop": "rules.backprop",
    "Consequentialism": "rules.consequentialism",
    "LayerType": "layers",
    "Move": "ply",
    "NLMS": "rules.nlms",
    "NonFiniteError": "errors",
    "Ply": "ply",
    "PlywiseError": "errors",
    "ProxProp": "rules.proxprop",
    "Rule": "rule",
    "Size": "rule",
    "UncapturedLayerError": "errors",
    "register_layer": "layers",
}

__all__ = [
    "NLMS",
    "AttachError",
    "BackMatching",
    "Backprop",
    "Consequentialism",
    "LayerType",
    "Move",
    "NonFiniteError",
    "Ply",
    "PlywiseError",
    "ProxProp",
    "Rule",
    "Size",
    "UncapturedLayerError",
    "__version__",
    "layers",
    "register_layer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"plywise.{_HOMES[name]}"), name)
    elif name == "layers":
        value = import_module("plywise.layers")
    else:
        raise AttributeError(f"module 'plywise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
