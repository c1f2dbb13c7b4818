"""State dicts of plywise 0.1, which kept statistics under a mark, by the names of layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plywise.engine.contract import State
from plywise.engine.selection import strip_wrappers
from plywise.engine.statistics.refresh_cycle import choose_phases
from plywise.engine.statistics.saved_names import MARK, make_number
from plywise.engine.statistics.saved_state import SavedState
from plywise.engine.statistics.state_shapes import check_shapes
from plywise.errors import StateError


def convert_old_state(
    saved: SavedState, state: dict[str, Any], indices: Mapping[Tensor, Any]
) -> dict[str, Any]:
    """Return a state dict of plywise 0.1 with a rule's statistics where they are today.

    Args:
        saved: the rule's statistics.
        state: the optimizer's state dict.
        indices: what stands for each parameter in it.

    Raises:
        StateError: it has statistics of layers that the model does not have.
    """
    entries = [e for e in state[MARK] if e["rule"] == saved.rule_name]
    named = [(e, {_strip(name): tensors for name, tensors in e["layers"].items()}) for e in entries]
    match = next(((e, layers) for e, layers in named if layers.keys() <= saved.layers.keys()), None)
    if match is None:
        if entries:
            raise StateError(_explain_layers(saved, list(named[0][1])), see="state-memory")
        return state
    entry, layers = match
    states = dict(state["state"])
    costs = {n: saved.rule.refresh_cost(saved.layers[n].shape) for n in layers}
    phases = choose_phases(costs, {}, saved.rule.refresh_every)
    for name, tensors in layers.items():
        parameter = saved.layers[name].entry.parameter()
        assert parameter is not None
        if tensors:
            check_shapes(saved.rule, saved.layers[name], tensors)
            made = _convert_layer(saved, name, tensors, entry["step"], phases[name])
            states[indices[parameter]] = {**(states.get(indices[parameter]) or {}), **made}
    return {**state, "state": states}


def _convert_layer(saved: SavedState, name: str, tensors: State, step: int, phase: int) -> dict[str, Any]:
    prefix = saved.make_prefix(name)
    acts = saved.rule.in_backward(tensors, saved.layers[name].shape)
    made: dict[str, Any] = {prefix + key: value for key, value in tensors.items()}
    number = make_number(saved.layers[name].entry.name)
    made |= {saved.step_key: step, saved.name_key: number}
    return made | {prefix + "phase": phase, prefix + "in_backward": int(acts)}


def _strip(name: str) -> str:
    """Return a layer's name without wrappers: plywise 0.1 had some in its names."""
    return strip_wrappers(name).removeprefix("module.")


def _explain_layers(saved: SavedState, theirs: list[str]) -> str:
    extra = [name for name in theirs if name not in saved.layers]
    names = f"{', '.join(map(repr, extra[:4]))}{' ...' if len(extra) > 4 else ''}"
    return f"The saved memory of {saved.rule_name} is of another model: it also has {names}."
