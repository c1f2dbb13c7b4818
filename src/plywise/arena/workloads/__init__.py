"""The workloads that ship with the arena, by name; a name costs no import of torch.

What a run should reach is not in the code: ``targets.json`` has it, made from tuned baselines, each entry
``{"target": ..., "loose": ..., "trials": ..., "commit": ..., "made_by": ...}`` with the number of tuning
trials that it is made of, and the commit and the command that made it.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from plywise._util.suggest import suggestion
from plywise.errors import PlywiseError
from plywise.registry.names import WORKLOAD_MODULES

if TYPE_CHECKING:
    from plywise.arena.workload import Workload

WORKLOADS = tuple(WORKLOAD_MODULES)
"""Names of all workloads."""
QUICK = ("quadratic", "digits-mlp", "digits-conv", "digits-autoencoder")
"""Those that need no file and take a second or two a run."""
RELATED = tuple(name for name, home in WORKLOAD_MODULES.items() if home == "arena.workloads.related")
"""What losses and modules of the related papers are for; they need no file either."""
STANDARD = tuple(name for name in WORKLOADS if name not in RELATED)
"""All others; most need files (see `plywise.data.store`)."""


def find_workload(name: str) -> Workload:
    """The workload called ``name``, whatever its letters' case, with its target if it has one.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_workload("digits-mlp").task.metric_name
        'error rate'
    """
    key = name.lower()
    if key not in WORKLOAD_MODULES:
        raise PlywiseError(
            f"No workload is called {name!r}. {suggestion(name, WORKLOADS)}There are: "
            f"{', '.join(WORKLOADS)}; or point at your own model and data by module:name.",
            see="error-bench",
        )
    found: Workload = importlib.import_module(f"plywise.{WORKLOAD_MODULES[key]}").WORKLOADS[key]
    return replace(found, target=targets().get(key, {}).get("target"))


def targets() -> dict[str, dict[str, Any]]:
    """What ``targets.json`` holds, by workload.

    Example:
        >>> set(targets()) <= set(WORKLOADS)
        True
    """
    entries: dict[str, dict[str, Any]] = json.loads((files(__name__) / "targets.json").read_text("utf-8"))
    return entries
