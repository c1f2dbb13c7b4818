"""Marks a state dict with the names of parameters, and refuses one that has them in another order.

torch knows a state's parameters by their numbers alone. If the optimizer that loads has its parameters in
another order, each gets the momentum and the statistics of another, and where shapes agree nothing shows it.
Of a state that is loaded before a rule is attached, torch keeps only what belongs to the parameters. So the
statistics of each parameter also carry a number that is made from its name.
"""

import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from plywise._util.optimizers import list_parameters
from plywise.engine.sites import ParameterEntry
from plywise.errors import StateError

MARK = "plywise"
"""Key of an optimizer's state dict that names the rules whose statistics are in it."""

NUMBERS = ("step", "phase", "in_backward", "name")
"""What is kept beside a rule's own tensors: whole numbers."""

Indices = Mapping[Tensor, Any]
"""What stands for each parameter in a state dict."""


def find_indices(optimizer: Optimizer, state: dict[str, Any]) -> dict[Tensor, Any]:
    """Return what stands for each parameter in a state dict: a number, or a name."""
    saved = chain.from_iterable(group["params"] for group in state["param_groups"])
    return dict(zip(list_parameters(optimizer), saved, strict=False))


def find_mark(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state dict's mark has in the right form; nothing if something else is in its place."""
    mark = state.get(MARK)
    wanted = {"format": int, "rules": list, "names": dict, "state": dict}
    found = mark if isinstance(mark, dict) else {}
    return {key: value for key, value in found.items() if isinstance(value, wanted.get(key, object))}


def add_names(state: dict[str, Any], indices: Indices, entries: Iterable[ParameterEntry]) -> None:
    """Add the names of the model's parameters to a state dict's mark."""
    state[MARK] = {**find_mark(state), "names": _find_names(indices, entries)}


def check_names(state: Mapping[str, Any], indices: Indices, entries: Iterable[ParameterEntry]) -> None:
    """Raise StateError if the same parameters as in the optimizer were saved in another order.

    Other names say nothing: the model may be inside of another one now.
    """
    saved, here = find_mark(state).get("names", {}), _find_names(indices, entries)
    if saved == here or {*saved.values()} != {*here.values()}:
        return
    index, name = next((index, name) for index, name in here.items() if saved.get(index) != name)
    raise StateError(_explain_order(name, saved.get(index)), see="state-memory")


def check_name_numbers(
    state: Mapping[Tensor, Any], own: Iterable[tuple[Tensor, ParameterEntry]], key: str
) -> None:
    """Raise StateError if statistics that were loaded before attach are those of other parameters here.

    Other names say nothing, as in `check_names`.

    Args:
        state: the optimizer's state.
        own: the rule's parameters.
        key: where the number made from the name is in the state of each.
    """
    states = [(state.get(parameter), entry.name) for parameter, entry in own]
    saved = {n: kept[key] for kept, n in states if isinstance(kept, dict) and isinstance(kept.get(key), int)}
    names = {make_number(name): name for name in saved}
    if names.keys() != {*saved.values()}:
        return
    for name, number in saved.items():
        if names[number] != name:
            raise StateError(_explain_order(name, names[number]), see="state-memory")


def make_number(name: str) -> int:
    """Make a number from a parameter's name, for its state: torch's flattened states take no words."""
    return zlib.crc32(name.encode())


def _explain_order(name: str, saved: str | None) -> str:
    return (
        "The optimizer state to load was saved with its parameters in another order: in the place of "
        f"{name!r} was {saved!r}. torch loads states by their places, so each parameter would get the "
        "momentum and the statistics of another. Make the optimizer from the parameters in the order in "
        "which they were saved, or load by names, with torch.distributed.checkpoint.state_dict."
    )


def _find_names(indices: Indices, entries: Iterable[ParameterEntry]) -> dict[Any, str]:
    parameters = ((entry.parameter(), entry.name) for entry in entries)
    return {indices[p]: name for p, name in parameters if p is not None and p in indices}


def check_keys(parameter: Tensor, name: str, keys: Mapping[str, Any]) -> None:
    """Raise StateError if a parameter's statistics are not numbers."""
    for key, value in keys.items():
        if key.rpartition(".")[2] in NUMBERS:
            check_number(name, key, value)
        elif isinstance(value, Tensor) and value.is_meta and not parameter.is_meta:
            raise StateError(
                f"The statistics of {name!r} are on the meta device, where tensors have no numbers. Load the "
                'file with torch.load(..., map_location="cpu").',
                see="state-memory",
            )


def check_number(name: str, key: str, value: object) -> None:
    """Raise StateError if what should be a whole number is something else."""
    if not isinstance(value, int):
        raise StateError(
            f"The saved memory of {name!r} is damaged: its {key!r} is {type(value).__name__}, and should be "
            "a whole number. Something has changed the state dict between saving and loading; save and load "
            "it as torch made it.",
            see="state-memory",
        )
