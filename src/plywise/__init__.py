"""plywise: train PyTorch networks layer by layer.

Every layer solves its own local problem instead of taking backpropagation's one explicit step::

    import plywise as pw

    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9)
    rule = pw.ProxProp(tau=1.0).attach(model, optimizer)   # the one line
    print(rule.explain())

The names are those of the table `plywise.registry.names`. They are loaded on first use, so that the
command line answers ``--help`` without importing torch.
"""

import warnings
from importlib import import_module
from typing import Any

from plywise._util.version import __version__
from plywise.registry.names import RENAMED, ROOMS, list_top_names

__all__ = ["__version__", *ROOMS, *list_top_names()]


def __getattr__(name: str) -> Any:
    homes = list_top_names()
    if name in RENAMED:
        warnings.warn(
            f"plywise.{name} is called plywise.{RENAMED[name]} since 0.2: rename it.",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__(RENAMED[name])
    if name in homes:
        value = getattr(import_module(f"plywise.{homes[name]}"), name)
    elif name in ROOMS:
        value = import_module(f"plywise.{name}")
    else:
        raise AttributeError(f"module 'plywise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
