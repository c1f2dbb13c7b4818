"""Saves and loads running statistics with an optimizer's state dict.

torch saves ``optimizer.state`` as it is, and casts what it loads to the parameters' dtype. These hooks add
to that

- templates for layers that have learned nothing yet, so that savers which load in place find the same keys;
- a mark, ``state_dict()["plywise"]``, with the names of the rules;
- the refusal of statistics that are of another rule or model, before anything is changed;
- the saved tensors in the place of the cast ones;
- state dicts of plywise 0.1 (`plywise.engine.statistics.old_states`).

`ZeroRedundancyOptimizer` has the state of each process's own parameters in an optimizer inside, and throws
away that of the others. Statistics are the same on all processes, so they also travel under the mark.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from plywise.engine.sites import ParameterEntry
from plywise.engine.statistics.old_states import convert_old_state
from plywise.engine.statistics.saved_keys import PREFIX, find_rule, find_tensors, is_of_rule
from plywise.engine.statistics.saved_names import (
    MARK,
    add_names,
    check_keys,
    check_name_numbers,
    check_names,
    find_indices,
    find_mark,
)
from plywise.engine.statistics.saved_state import SavedState
from plywise.engine.statistics.state_shapes import check_shapes
from plywise.errors import AttachError, StateError

_HAD_A_RULE: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
"""Optimizers whose statistics the user has dropped, by detaching a rule, and the id of the state they had
then: a load replaces it."""

ROUNDED = (torch.float16, torch.bfloat16)

Keys = dict[str, Any]
"""The part of a parameter's state that is ours."""


class StateDicts:
    """The hooks of one rule on its optimizer's state dicts.

    Args:
        saved: the rule's statistics.
        optimizer: the optimizer.
        loaded: called after a state dict has been loaded.

    Raises:
        AttachError: the optimizer takes its steps where no rule can see them.
        StateError: the optimizer's state holds statistics that this rule cannot go on from.
    """

    def __init__(self, saved: SavedState, optimizer: Optimizer, loaded: Callable[[], None]) -> None:
        self._saved = saved
        self._name = saved.rule_name
        self._loaded = loaded
        self._raw: dict[Tensor, Keys] = {}
        self._sharded = any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)
        if self._sharded and getattr(optimizer, "_overlap_with_ddp", False):
            raise AttachError(
                "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside DistributedDataParallel's "
                f"backward pass, where {self._name} cannot learn. Make it with overlap_with_ddp=False.",
                see="attach-optimizer",
            )
        self._check_found(optimizer)
        warn_if_lost(optimizer, f"statistics of {self._name}", find_rule)
        saved.note_biases()
        self._handles = [
            optimizer.register_state_dict_post_hook(self._add_to_saved),
            optimizer.register_load_state_dict_pre_hook(self._take_from_loaded),
            optimizer.register_load_state_dict_post_hook(self._put_in_place),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._raw = {}
        optimizer = self._saved.optimizer
        if optimizer is not None:
            note_detached(optimizer)

    # ---- what is there when the rule is attached -------------------------------------------------------

    def _check_found(self, optimizer: Optimizer) -> None:
        """Statistics that were loaded before attach must be this rule's, of these parameters, and whole."""
        check_name_numbers(optimizer.state, self._saved.list_own_parameters(), self._saved.name_key)
        for parameter, entry in self._saved.list_own_parameters():
            own = optimizer.state.get(parameter)
            ours = _find_ours(own) if isinstance(own, dict) else {}
            others = {find_rule(key) for key in ours if key.endswith(".step") and ours[key]} - {self._name}
            if others:
                raise StateError(
                    f"The optimizer's state holds statistics of {', '.join(sorted(others))} for layer "
                    f"{entry.layer!r}, and the rule attached is {self._name}. Attach the rule that they were "
                    "saved with, or clear them: optimizer.state.clear().",
                    see="state-memory",
                )
            if any(isinstance(value, Tensor) and value.dtype in ROUNDED for value in ours.values()):
                raise StateError(
                    f"The statistics of layer {entry.layer!r} were loaded before attach(), and torch has "
                    "rounded them to the parameter's dtype. Attach the rule first, then load.",
                    see="state-memory",
                )
            self._check(parameter, entry, ours)

    # ---- saving ----------------------------------------------------------------------------------------

    def _add_to_saved(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._saved.follow(optimizer)
        states = {index: dict(own) if isinstance(own, dict) else own for index, own in state["state"].items()}
        indices = find_indices(optimizer, state)
        add_names(state, indices, self._saved.entries)
        mark = state[MARK]
        mark |= {"format": 2, "rules": [*mark.get("rules", []), self._name]}
        if any(states.values()) or self._saved.holds:  # the optimizer has stepped
            self._complete(states, indices)
        if self._sharded:
            ours = {index: _find_ours(own or {}) for index, own in states.items()}
            states = _Statistics(ours)
            mark["state"] = ours
        state["state"] = states

    def _complete(self, states: dict[Any, Any], indices: Mapping[Tensor, Any]) -> None:
        """Add templates, where a later load may have something to put."""
        stateless = is_stateless(states)
        for parameter, entry in self._saved.list_own_parameters():
            index = indices.get(parameter)
            held = self._saved.get_held(entry)
            if index is not None and held:
                states[index] = {**(states.get(index) or {}), **held}
            if index is None or not parameter.requires_grad or nn.parameter.is_lazy(parameter):
                continue
            own = states.get(index) or {}
            if stateless or not is_stateless({index: own}):
                template = self._saved.make_template(entry, own)
                states |= {index: {**own, **template}} if template else {}
        complete_stateless(states, indices)

    # ---- loading ---------------------------------------------------------------------------------------

    def _take_from_loaded(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Check the state to load, and take this rule's part out of it."""
        indices = find_indices(optimizer, state)
        if isinstance(state.get(MARK), list):
            state = convert_old_state(self._saved, state, indices)
        check_names(state, indices, self._saved.entries)
        raw = self._collect(state, indices)
        self._check_rules(optimizer, state, raw)
        self._check_parameters(optimizer, raw)
        states = dict(state["state"])
        self._raw = {}
        for parameter, _ in self._saved.list_own_parameters():
            mine = {k: v for k, v in raw.get(parameter, {}).items() if is_of_rule(k, self._name)}
            kept = states.get(indices.get(parameter)) or {}
            others = {k: v for k, v in kept.items() if not is_of_rule(k, self._name)}
            if mine.get(self._saved.step_key) or others:  # a template alone would look like a state begun
                self._raw[parameter] = mine
            if kept:
                states[indices[parameter]] = others
        return {**state, "state": states}

    def _collect(self, state: dict[str, Any], indices: Mapping[Tensor, Any]) -> dict[Tensor, Keys]:
        """Return the statistics in a state dict, of all rules."""
        beside = find_mark(state).get("state", {})
        raw = {}
        for parameter, index in indices.items():
            own = state["state"].get(index, {})
            if own is None and index not in beside and self._sharded:
                raise StateError(
                    "ZeroRedundancyOptimizer throws away the state of other processes' parameters when it "
                    f"loads, and with it the statistics of {self._name}, unless it has saved them itself. "
                    "Load this state into an optimizer under DistributedDataParallel instead.",
                    see="state-memory",
                )
            raw[parameter] = _find_ours({**(own or {}), **beside.get(index, {})})
        return raw

    def _check_rules(self, optimizer: Optimizer, state: dict[str, Any], raw: Mapping[Tensor, Keys]) -> None:
        rules = _find_marked(state) | {find_rule(key) for keys in raw.values() for key in keys}
        if self._name not in rules:
            raise StateError(_explain_missing(self._name, rules), see="state-memory")
        others = rules - {rule._name for rule in find_attached(optimizer)}
        if others:
            raise StateError(
                f"The optimizer state to load holds statistics of {', '.join(sorted(others))} besides those "
                f"of {self._name}, and no such rule is attached to this optimizer: attach it, then load.",
                see="state-memory",
            )

    def _check_parameters(self, optimizer: Optimizer, raw: Mapping[Tensor, Keys]) -> None:
        siblings = [rule for rule in find_attached(optimizer) if rule._name == self._name]
        known = {id(p) for rule in siblings for p, _ in rule._saved.list_own_parameters()}
        key = self._saved.step_key
        strangers = [p for p, keys in raw.items() if id(p) not in known and keys.get(key)]
        if strangers:
            raise StateError(_explain_strangers(self._name, strangers), see="state-memory")
        for parameter, entry in self._saved.list_own_parameters():
            self._check(parameter, entry, raw.get(parameter, {}))

    def _check(self, parameter: Tensor, entry: ParameterEntry, keys: Keys) -> None:
        """Raise StateError unless these are a parameter's statistics, as far as its calls are known."""
        check_keys(parameter, entry.name, keys)
        if not keys.get(self._saved.step_key):
            return
        if not any(isinstance(value, Tensor) for value in keys.values()):
            raise StateError(
                f"The statistics of {entry.name!r} were saved, but have not arrived: torch's flattened and "
                "distributed checkpoints load only what they find in the optimizer, and no call of that "
                "weight has been seen yet. Run one forward pass (model(batch)) after attach() and before "
                "get_state_dict or set_state_dict.",
                see="state-memory",
            )
        for name, layer in self._saved.layers.items():
            if layer.entry is entry:
                tensors = find_tensors(keys, self._saved.make_prefix(name))
                if tensors:
                    check_shapes(self._saved.rule, layer, tensors)

    def _put_in_place(self, optimizer: Optimizer) -> None:
        """Put the saved tensors beside the optimizer's own."""
        self._saved.follow(optimizer)
        if self._sharded:
            self._clean_shard(optimizer)
        for parameter, keys in self._raw.items():
            moved = {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in keys.items()}
            if moved:
                optimizer.state.setdefault(parameter, {}).update(moved)
        self._raw = {}
        self._saved.forget()
        self._saved.note_biases()
        self._loaded()

    def _clean_shard(self, optimizer: Any) -> None:
        """Leave our keys, and nothing else, in the outer optimizer's state, and none in that of the inner."""
        for parameter, own in list(optimizer.state.items()):
            optimizer.state[parameter] = _find_ours(own or {})
        for own in optimizer.optim.state.values():
            for key in _find_ours(own):
                del own[key]


class _Statistics(dict[Any, Any]):
    """States that `ZeroRedundancyOptimizer` adds its own to, where it would replace them."""

    def __setitem__(self, index: Any, own: dict[str, Any]) -> None:
        super().__setitem__(index, {**own, **_find_ours(self.get(index, {}))})


def find_attached(optimizer: Optimizer) -> list[StateDicts]:
    """Return the rules that are attached to an optimizer."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks.values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, StateDicts)]


def refuse_orphans(optimizer: Optimizer) -> None:
    """Refuse statistics that were loaded and, at the first step after that, have no rule."""
    rules = find_attached(optimizer)
    known = {(id(p), rule._name) for rule in rules for p, _ in rule._saved.list_own_parameters()}
    for parameter, own in optimizer.state.items():
        for key in _find_ours(own) if isinstance(own, dict) else ():
            if key.endswith(".step") and own[key] and (id(parameter), find_rule(key)) not in known:
                raise StateError(_explain_strangers(find_rule(key), [parameter]), see="state-memory")


def note_detached(optimizer: Optimizer) -> None:
    """Remember that the user has detached a rule, and so dropped what is in the optimizer's state now."""
    _HAD_A_RULE[optimizer] = id(optimizer.state)


def warn_if_lost(optimizer: Optimizer, what: str, is_ours: Callable[[Any], object]) -> None:
    """Say that an optimizer which has been used has nothing of a rule: that may have been lost on the way."""
    states = [own for own in optimizer.state.values() if isinstance(own, dict)]
    if was_used(optimizer) and not any(map(is_ours, chain(*states))):
        warnings.warn(
            f"The optimizer has been used or loaded, and has no {what}: they begin from nothing. If a "
            "checkpoint has them, attach the rule first and load it then: in the other order, torch's "
            "flattened and distributed checkpoints lose them, and so do those of plywise 0.1.",
            RuntimeWarning,
            stacklevel=2,
        )


def was_used(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has stepped or been loaded since the user has detached a rule from it."""
    states = [own for own in optimizer.state.values() if isinstance(own, dict)]  # empty ones are loaded, too
    begun = [own for own in states if "step" not in own or own["step"]]  # Adagrad begins a state when made
    has_begun = bool(begun) or _is_loaded_stateless(optimizer)
    return has_begun and _HAD_A_RULE.get(optimizer) != id(optimizer.state)


def _is_loaded_stateless(optimizer: Optimizer) -> bool:
    """Return whether plain SGD, which has no state, has been loaded: the order of its options shows it.

    torch puts "params" behind all options when it makes a state dict, and before them in a new optimizer.
    (accelerate's wrapper, which loads the state that an optimizer has already, is not SGD.)
    """
    groups = optimizer.param_groups
    if not isinstance(optimizer, SGD) or optimizer.state or any(group["momentum"] for group in groups):
        return False
    return all(list(group)[-1] == "params" for group in groups)


def is_stateless(states: Mapping[Any, Any]) -> bool:
    """Return whether the optimizer itself keeps nothing in these states of parameters."""
    return all(str(key).startswith(PREFIX) for own in states.values() for key in own or ())


def complete_stateless(states: dict[Any, Any], indices: Mapping[Tensor, Any]) -> None:
    """Add a state for every parameter if all are ours: torch's set_state_dict wants all, if there is one."""
    if is_stateless(states):
        for index in indices.values():
            states.setdefault(index, {})


def _find_marked(state: dict[str, Any]) -> set[str]:
    """Return the rules that a state dict's mark names."""
    mark = state.get(MARK)
    if isinstance(mark, list):
        return {entry["rule"] for entry in mark}
    return set(find_mark(state).get("rules", []))


def _find_ours(own: Mapping[Any, Any]) -> Keys:
    """Return our part of a parameter's state; torch's flattened form has empty dicts for missing values."""
    return {key: value for key, value in own.items() if find_rule(key) and not isinstance(value, dict)}


def _explain_missing(rule: str, rules: set[str]) -> str:
    if not rules:
        return (
            f"The optimizer state to load holds no memory of {rule}: it was saved without the rule. To start "
            "the statistics again from nothing, load it before attach()."
        )
    others = ", ".join(sorted(rules))
    return f"The optimizer state to load was saved with {others}, and the rule attached is {rule}."


def _explain_strangers(rule: str, parameters: list[Tensor]) -> str:
    shapes = ", ".join(str(tuple(p.shape)) for p in parameters[:4])
    return (
        f"The optimizer's state has statistics of {rule} for {len(parameters)} parameters (of shapes "
        f"{shapes}) that no attached {rule} handles. Attach with the same layers and kinds as when they were "
        "saved, or clear them: optimizer.state.clear()."
    )
