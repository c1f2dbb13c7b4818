"""Finds the weights that Muon is made for: those of hidden linear maps."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from plywise._util.modes import evaluating
from plywise.engine.selection import is_in_out

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # those whose weights may have several dimensions


def find_hidden_weights(model: nn.Module, run: Callable[[], object] | None = None) -> list[nn.Parameter]:
    """Find the weights of linear maps, except those of the map that gives the output.

    A linear map is a module with a matrix (or a kernel) that has "weight" in its name, torch's or another
    library's. Embeddings and weights tied to them, norms, biases, bare parameters, what is frozen, and what
    holds several matrices (experts, grouped convolutions) are left out.

    Args:
        model: the model. It stays as it is.
        run: runs it on a few inputs, in evaluation mode: the map that runs last gives the output. Default:
            the map that comes last among the modules does.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> [tuple(weight.shape) for weight in find_hidden_weights(model)]
        [(8, 4)]
    """
    maps = [module for module in model.modules() if _own_matrices(module)]
    order = maps if run is None else _list_runs(model, maps, run)
    tables = [module for module in model.modules() if isinstance(module, _TABLES)]
    apart = {id(p) for module in (*tables, *order[-1:]) for p in module.parameters()}
    found = {id(p): p for module in maps for p in _own_matrices(module) if id(p) not in apart}
    return [p for p in found.values() if p.requires_grad]


def _own_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of a linear map, frozen or not; none of other modules, nor of several maps in one."""
    if isinstance(module, (*_TABLES, *_NORMS)) or getattr(module, "groups", 1) != 1:
        return []
    most = math.inf if hasattr(module, "kernel_size") else 2
    own = module.named_parameters(recurse=False)
    return [p for name, p in own if "weight" in name and 2 <= p.dim() <= most]


def _list_runs(model: nn.Module, maps: list[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """The maps in the order in which they run."""
    order: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda module, *_: order.append(module)) for module in maps]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return order


def group_for_muon(model: nn.Module, hidden: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: hidden weights by Muon, all others that train by AdamW.

    Hidden weights that are stored as (in, out) are a group of their own.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = group_for_muon(model, find_hidden_weights(model))
        >>> [(group["use_muon"], len(group["params"])) for group in groups]
        [(True, 1), (False, 3)]
    """
    turned = {id(p) for module in model.modules() if _is_transposed(module) for p in _own_matrices(module)}
    known = {id(p) for p in hidden}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in hidden if id(p) not in turned], "use_muon": True},
        {"params": [p for p in hidden if id(p) in turned], "use_muon": True, "transposed": True},
        {
            "params": [p for p in model.parameters() if p.requires_grad and id(p) not in known],
            "use_muon": False,
        },
    ]
    return [group for group in groups if group["params"]]


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its matrix as (in, out)."""
    return bool(getattr(module, "transposed", False)) or is_in_out(type(module))
