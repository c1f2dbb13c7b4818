"""Keeps running statistics in ``optimizer.state[weight]``, where everything that saves optimizers finds them.

Beside the optimizer's own keys, the state of a weight has

- ``"plywise.Foof.step"``: how many steps the rule had counted when the statistics were last written; 0 in a
  template, which only says what a checkpoint may put in its place;
- ``"plywise.Foof.name"``: a number made from the parameter's name, so that a state loaded in another order
  is noticed;
- ``"plywise.Foof.input"`` and so on: the rule's tensors, by the names that the rule gives them;
- ``"plywise.Foof.phase"``, ``"plywise.Foof.in_backward"``: in which step of a cycle the layer is refreshed,
  and whether backward makes its updates in between.

A weight whose parts are used apart has one set for each part, ``"plywise.Foof[0:8].input"``: the part is
named by its rows, so that it does not matter which one is called first. What is done when a state dict is
saved or loaded is in `plywise.engine.statistics.state_dicts`.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise.engine.contract import State, StatefulContract
from plywise.engine.sites import ParameterEntry, format_use
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.saved_keys import PREFIX, find_tensors, is_of_rule, remove_keys
from plywise.engine.statistics.saved_names import NUMBERS, make_number
from plywise.engine.statistics.stacks import convert_state, separate_state
from plywise.engine.statistics.state_shapes import check_shapes, find_shapes


@dataclass(frozen=True)
class LayerState:
    """One layer's running state.

    Attributes:
        tensors: the rule's statistics by name; empty if nothing has been learned.
        phase: the step of a cycle in which the layer is refreshed.
        in_backward: whether backward itself makes the updates between refreshes.
    """

    tensors: State = field(default_factory=dict)
    phase: int = 0
    in_backward: bool = False


NOTHING = LayerState()


class SavedState:
    """Reads and writes the statistics of one rule in an optimizer's state.

    Args:
        rule: the rule.
        optimizer: the optimizer.
        layers: the layers by name; those found later are added by their owner.
        entries: the parameters that the rule may take.
        before_drop: called with layers whose statistics are about to be removed.

    Attributes:
        entries: the parameters that the rule may take.
        step: steps that the rule has counted.
        version: changes with every change of the statistics.
        rule_name: the name of the rule's class, which the keys have.
    """

    def __init__(
        self,
        rule: StatefulContract,
        optimizer: Optimizer,
        layers: Mapping[str, LayerHandle],
        entries: list[ParameterEntry],
        before_drop: Callable[[list[LayerHandle]], None],
    ) -> None:
        self.rule = rule
        self.rule_name = type(rule).__name__
        self.step_key = f"{PREFIX}{self.rule_name}.step"
        self.name_key = f"{PREFIX}{self.rule_name}.name"
        self.layers = layers
        self.entries = entries
        self._before_drop = before_drop
        self._optimizer_ref = weakref.ref(optimizer)
        self._prefixes: dict[str, str] = {}
        self._had_bias: dict[str, bool] = {}
        self._cache: dict[str, tuple[str, Tensor, LayerState, torch.Size]] = {}
        self._held: dict[str, LayerState] = {}
        self._removed = False
        self.version = 0
        self.step = self.find_step()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, while it lives."""
        return self._optimizer_ref()

    @property
    def state(self) -> dict[Any, Any]:
        """The optimizer's state; empty once the optimizer is gone."""
        optimizer = self._optimizer_ref()
        return {} if optimizer is None else optimizer.state

    def follow(self, optimizer: Optimizer) -> None:
        """Keep the statistics with the optimizer whose hooks run: a wrapper's ``state`` may be an old one."""
        if self._optimizer_ref() is not optimizer:
            self._optimizer_ref = weakref.ref(optimizer)
            self.forget()

    def list_own_parameters(self) -> Iterator[tuple[Tensor, ParameterEntry]]:
        """Return the weights that belong to the rule, whether or not a call of theirs has been seen."""
        entries = dict.fromkeys([*self.entries, *(layer.entry for layer in self.layers.values())])
        for entry in entries:
            parameter = entry.parameter()
            if parameter is not None and not entry.excluded and entry.may_hold_weights:
                yield parameter, entry

    def find_step(self) -> int:
        """Return how many steps the rule had counted, by what is in the optimizer's state."""
        found = 0
        for parameter, _ in self.list_own_parameters():
            own = self.state.get(parameter)
            if isinstance(own, dict) and isinstance(own.get(self.step_key), int):
                found = max(found, own[self.step_key])
        return found

    def make_prefix(self, name: str) -> str:
        """Return the beginning of a layer's keys."""
        prefix = self._prefixes.get(name)
        if prefix is None:
            layer = self.layers[name]
            use = "" if layer.site is None else format_use(layer.site)
            prefix = f"{PREFIX}{self.rule_name}{use}."
            if layer.site is not None:
                self._prefixes[name] = prefix
        return prefix

    # ---- reading ---------------------------------------------------------------------------------

    def read(self, name: str) -> LayerState:
        """Return a layer's state; nothing if the optimizer's state has been cleared.

        Once the optimizer is gone or the rule is detached, this is the last state, so that a graph that was
        made before can still run its backward.
        """
        parameter, optimizer = self.layers[name].entry.parameter(), self._optimizer_ref()
        own = None if parameter is None or optimizer is None else optimizer.state.get(parameter)
        cached = self._cache.get(name)
        if cached is not None:
            if optimizer is None or self._removed:
                return cached[2]
            # a weight that has been cut (pruning by .data) has statistics of another shape
            is_whole = parameter is not None and parameter.shape == cached[3]
            if own and own.get(cached[0]) is cached[1] and is_whole:
                return cached[2]
            del self._cache[name]
            self._had_bias.pop(name, None)
            self.step = min(self.step, self.find_step())  # 0 if everything has been cleared
        if not own or not own.get(self.step_key):
            return self._held.get(name, NOTHING)
        prefix = self.make_prefix(name)
        tensors = find_tensors(own, prefix)
        if not tensors:
            return NOTHING
        self._had_bias.setdefault(name, check_shapes(self.rule, self.layers[name], tensors))
        found = LayerState(tensors, int(own.get(prefix + "phase", 0)), bool(own.get(prefix + "in_backward")))
        self._remember(name, found)
        return found

    def read_moved(self, name: str, like: Tensor) -> LayerState:
        """Return a layer's state on the device of ``like``; if its bias froze, its statistics are dropped."""
        self.follow_bias(name)
        state = self.read(name)
        if any(value.dtype != like.dtype or value.device != like.device for value in state.tensors.values()):
            state = LayerState(convert_state(state.tensors, like), state.phase, state.in_backward)
            self.write(name, state)
        return state

    def has_state(self, entry: ParameterEntry) -> bool:
        """Return whether there are statistics of a parameter, whether or not its calls are known."""
        own = self.state.get(entry.parameter()) or {}
        return bool(own.get(self.step_key))

    def count_uses(self, entry: ParameterEntry) -> int:
        """Return how many uses of a parameter have statistics, whether or not its calls are known."""
        own = self.state.get(entry.parameter()) or {}
        return sum(is_of_rule(key, self.rule_name) and key.endswith(".phase") for key in own)

    def peek(self, name: str) -> LayerState:
        """Return a layer's state as it was last read: within a step, another look-up would cost too much."""
        cached = self._cache.get(name)
        return self.read(name) if cached is None else cached[2]

    def find_mark(self, name: str) -> tuple[str, Tensor]:
        """Return a key of a parameter's state, and the tensor there, which changes with the layer's state."""
        return self._cache[name][:2]

    def _remember(self, name: str, made: LayerState) -> None:
        """Cache a state; it holds as long as its first tensor is in its place."""
        prefix = self.make_prefix(name)
        for key, value in made.tensors.items():
            parameter = self.layers[name].entry.parameter()
            shape = torch.Size() if parameter is None else parameter.shape
            self._cache[name] = prefix + key, value, made, shape
            break

    def follow_bias(self, name: str) -> None:
        """Drop a layer's statistics if its bias has been frozen or thawed since they were made."""
        has_bias = self.layers[name].bias is not None
        if self.has_column(name) != has_bias:
            self.drop(name)
            self._had_bias[name] = has_bias

    def has_column(self, name: str) -> bool:
        """Return whether a layer's statistics have, or will have, a column for the bias."""
        if name not in self._had_bias:
            self.read(name)  # the shapes of what has been loaded show it
        return self._had_bias.setdefault(name, self.layers[name].bias is not None)

    def note_biases(self) -> None:
        """Remember whether the statistics that are there now have a column for the bias."""
        for name, layer in self.layers.items():
            if not layer.gone and layer.entry.dimensions:
                self.has_column(name)

    # ---- writing ---------------------------------------------------------------------------------

    def count_step(self, written: Collection[str]) -> None:
        """Count one more step of the rule; what was learned before belongs to this step, too.

        Args:
            written: layers that will be written, and need no more.
        """
        self.step += 1
        state = self.state
        for name, layer in self.layers.items():
            own = None if name in written else state.get(layer.entry.parameter())
            if own and own.get(self.step_key):
                own[self.step_key] = self.step
        for name, held in list(self._held.items()):
            del self._held[name]
            self.write(name, held)

    def write(self, name: str, made: LayerState) -> None:
        """Put a layer's state in its place.

        Many optimizers initialise a parameter's state only if it is empty. So nothing is written for a
        parameter that the optimizer has not stepped yet (another process may have had its gradient); it is
        kept aside.
        """
        self.version += 1
        layer = self.layers[name]
        if layer.gone:
            return
        made = LayerState(separate_state(made.tensors), made.phase, made.in_backward)
        weight = layer.weight
        own = self.state.get(weight)
        if not own and weight.grad is None:
            self._held[name] = made
            return
        if own is None:
            own = self.state[weight] = {}
        prefix = self.make_prefix(name)
        remove_keys(own, prefix)
        whole = self.step_key.removesuffix("step")
        layers = (other for other, one in self.layers.items() if one.entry is layer.entry)
        if not any(self.make_prefix(other) == whole for other in layers):  # there may be a template of it
            remove_keys(own, whole)
        own.update(self._make_keys(name, made))
        self._remember(name, made)

    def _make_keys(self, name: str, made: LayerState) -> dict[str, Any]:
        """Return a layer's state as it is kept in the optimizer's."""
        prefix, reserved = self.make_prefix(name), set(NUMBERS) & made.tensors.keys()
        if reserved:
            raise ValueError(
                f"{self.rule_name}: {min(reserved)!r} is plywise's own name, not one for a statistic."
            )
        keys: dict[str, Any] = {prefix + key: value for key, value in made.tensors.items()}
        keys |= {prefix + "phase": made.phase, prefix + "in_backward": int(made.in_backward)}
        return keys | {self.step_key: self.step, self.name_key: make_number(self.layers[name].entry.name)}

    @property
    def holds(self) -> bool:
        """Whether anything waits for the optimizer's own state to begin."""
        return bool(self._held)

    def get_held(self, entry: ParameterEntry) -> dict[str, Any]:
        """Return what waits for the optimizer's own state to begin, in the form that it will have there."""
        keys: dict[str, Any] = {}
        for name, made in self._held.items():
            if self.layers[name].entry is entry:
                keys |= self._make_keys(name, made)
        return keys

    def make_template(self, entry: ParameterEntry, own: Mapping[str, Any]) -> dict[str, Any]:
        """Make zeros in the shapes of the statistics that ``own`` does not have yet for a parameter.

        Some savers load in place, into the tensors that they find. If the calls of a parameter are not known
        yet, the template only says that there may be statistics.
        """
        found: dict[str, Any] = {}
        if not (entry.is_weight or entry.sites):
            return found
        if self.step_key not in own:
            found = {self.step_key: 0, self.name_key: make_number(entry.name)}
        for name, layer in self.layers.items():
            prefix = self.make_prefix(name)
            if layer.entry is not entry or layer.gone or prefix + "phase" in own:
                continue
            shape = layer.shape
            for key, size in find_shapes(self.rule, layer).items():
                found[prefix + key] = torch.zeros(size, dtype=shape.dtype, device=shape.device)
            found |= {prefix + "phase": 0, prefix + "in_backward": 0}
        return found

    def write_templates(self) -> None:
        """Put templates into the state of the parameters that have just been stepped.

        torch's distributed checkpoints take a step with zero gradients, to see which tensors there will be.
        """
        for parameter, entry in self.list_own_parameters():
            if parameter.grad is not None and not nn.parameter.is_lazy(parameter):
                template = self.make_template(entry, self.state.get(parameter) or {})
                if template:
                    self.state.setdefault(parameter, {}).update(template)

    def drop(self, name: str) -> None:
        """Remove a layer's statistics."""
        if self.layers[name].entry.sharding is None:  # else the processes may not get here together
            self._before_drop([self.layers[name]])
        self.version += 1
        parameter = self.layers[name].entry.parameter()
        own = self.state.get(parameter)
        self._cache.pop(name, None)
        self._held.pop(name, None)
        if own:
            remove_keys(own, self.make_prefix(name))
            common = (self.step_key, self.name_key)
            if not any(is_of_rule(key, self.rule_name) for key in own if key not in common):
                for key in common:
                    own.pop(key, None)
            if not own:
                del self.state[parameter]

    def remove(self) -> None:
        """Remove all statistics of this rule's layers from the optimizer's state, for good."""
        self._removed = True
        self._remove_all()

    def clear(self) -> None:
        """Remove all statistics of this rule's layers, and begin again."""
        self._remove_all()
        self.forget()

    def _remove_all(self) -> None:
        state = self.state
        for parameter, _ in list(self.list_own_parameters()):
            own = state.get(parameter)
            if isinstance(own, dict):
                for key in [key for key in own if is_of_rule(key, self.rule_name)]:
                    del own[key]
                if not own:
                    del state[parameter]

    def forget(self) -> None:
        """Forget what is known of the optimizer's state, because it has changed or been cleared."""
        self.version += 1
        self._cache.clear()
        self._held.clear()
        self._had_bias.clear()
        self.step = self.find_step()
