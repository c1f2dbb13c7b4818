"""The experiments of the papers that plywise's rules and learners come from, run again.

Each paper is a file with its experiments. It holds the place in the paper, the paper's numbers and claims,
networks and settings at full size and at a small size for two cores, and why our numbers may differ. `runner`
runs them, `summary` compares the paper's numbers with ours, `tables` writes them. Listing names does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from plywise._util.import_path import load
from plywise._util.suggest import suggestion
from plywise.errors import AddressError, BenchError

if TYPE_CHECKING:
    from plywise.arena.reproductions.experiment import Paper

PAPERS = ("proxprop", "associated-learning", "back-matching", "consequentialism")
"""Names of the papers."""


def find_paper(name: str) -> Paper:
    """The paper called ``name``, in letters of any case; or a user's own, by ``module:name`` of a `Paper`.

    Raises:
        PlywiseError: there is none; the message suggests the nearest.

    Example:
        >>> [experiment.name for experiment in find_paper("proxprop").experiments]
        ['table-1', 'mlp', 'convnet']
    """
    if ":" in name:
        return _load_own(name)
    key = name.lower().replace("_", "-")
    if key not in PAPERS:
        raise BenchError(
            f"No paper is called {name!r}. {suggestion(name, PAPERS)}There are: {', '.join(PAPERS)}; "
            "`plywise reproduce` lists their experiments."
        )
    return importlib.import_module(f"{__name__}.{key.replace('-', '_')}").PAPER


def _load_own(address: str) -> Paper:
    from plywise.arena.reproductions.experiment import Paper

    own = load(address, "your paper")
    if not isinstance(own, Paper):
        raise AddressError(
            f"{address} is a {type(own).__name__}, not a plywise.arena.reproductions.experiment.Paper."
        )
    return own
