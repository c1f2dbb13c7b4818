"""The workloads that ship with the arena, by name; a name costs no import of torch.

Targets are not in the code: ``targets.json`` holds them, made from tuned baselines, each entry
``{"target": ..., "loose": ..., "trials": ..., "commit": ..., "made_by": ...}`` with the number of tuning
trials that it is made of, and the commit and the command that made it.
"""

from __future__ import annotations

import importlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from plywise._util.suggest import suggestion
from plywise._util.words import split_words
from plywise.errors import BenchError, CommandError
from plywise.registry.names import WORKLOAD_MODULES

if TYPE_CHECKING:
    from plywise.arena.workload import Workload

WORKLOADS = tuple(WORKLOAD_MODULES)
"""Names of all workloads."""
QUICK = ("quadratic", "digits-mlp", "digits-conv", "digits-autoencoder")
"""Workloads that need no file and take a second or two for a run."""
RELATED = tuple(name for name, home in WORKLOAD_MODULES.items() if home == "arena.workloads.related")
"""Workloads for losses and modules of the related papers; they need no file."""
HIDDEN = ("teacher", "regression", "classes", "groups", "pairs")
"""Kinds of workloads that are made by a seed, as ``hidden-teacher-7``. No default may be tuned on them."""
STANDARD = tuple(name for name in WORKLOADS if name not in RELATED)
"""All others; most need files (see `plywise.data.store`)."""

SETS = {"quick": QUICK, "standard": STANDARD, "related": RELATED}
"""Names that stand for several workloads; `hidden` stands for those that a seed makes."""


def list_workloads(words: str | Sequence[str], hidden_seed: int | None = None) -> list[str]:
    """Return the names of workloads that a user asks for.

    Args:
        words: ``quick``, ``standard``, ``related`` or ``hidden``; or names, or one text of names with commas.
        hidden_seed: of the hidden workloads. None: drawn, so that nobody has seen these.

    Raises:
        PlywiseError: the seed is below 0, or belongs to nothing.

    Example:
        >>> list_workloads("hidden", 7)[:2], list_workloads("quadratic, digits-mlp")
        (['hidden-teacher-7', 'hidden-regression-7'], ['quadratic', 'digits-mlp'])
    """
    if words == "hidden":
        seed = secrets.randbelow(1_000_000) if hidden_seed is None else hidden_seed
        if seed < 0:
            raise BenchError(f"A seed of hidden workloads is 0 or more, not {seed}.")
        return [f"hidden-{kind}-{seed}" for kind in HIDDEN]
    if hidden_seed is not None:
        raise CommandError("A hidden seed belongs to the workloads called hidden.")
    if not isinstance(words, str):
        return list(words)
    return list(SETS.get(words) or split_words(words))


def find_workload(name: str) -> Workload:
    """Return the workload called ``name``, whatever its letters' case, with its target if it has one.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> find_workload("digits-mlp").task.metric_name
        'error rate'
    """
    key = name.lower()
    if made := re.fullmatch(rf"hidden-({'|'.join(HIDDEN)})-(\d+)", key):
        from plywise.arena.workloads.hidden import make_workload

        return make_workload(made[1], int(made[2]))
    if key not in WORKLOAD_MODULES:
        raise BenchError(
            f"No workload is called {name!r}. {suggestion(name, (*WORKLOADS, *SETS, 'hidden'))}There are: "
            f"{', '.join(WORKLOADS)}; hidden-{HIDDEN[0]}-7 and others that a seed makes; or point at your "
            "own model and data by module:name."
        )
    home = importlib.import_module(f"plywise.{WORKLOAD_MODULES[key]}")
    found: Workload = next(one for one in home.WORKLOADS if one.name == key)
    return replace(found, target=targets().get(key, {}).get("target"))


def targets() -> dict[str, dict[str, Any]]:
    """Return what ``targets.json`` holds, by workload.

    Example:
        >>> set(targets()) <= set(WORKLOADS)
        True
    """
    return json.loads((files(__name__) / "targets.json").read_text("utf-8"))
