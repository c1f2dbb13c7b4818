"""Lets an optimizer work in other coordinates: its step is read off the weights and turned back.

The optimizer gets the gradient of turned weights, while the weights themselves are not turned. So what it
adds to them, apart from a weight decay, is a step in the other coordinates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_not

import torch
from torch import Tensor
from torch.optim import Optimizer

from plywise.engine.contract import State, StatefulContract
from plywise.engine.coordinates.optimizer_probe import OptimizerTraits, find_direction, probe_optimizer
from plywise.engine.coordinates.turned_layers import LargeLayer, SmallLayers, arrange_turned
from plywise.engine.coordinates.turned_shards import ShardedLayers, turn_stand_ins
from plywise.engine.health import IDENTITY, Health
from plywise.engine.processes.training_processes import TrainingProcesses
from plywise.engine.statistics.layer_handle import LayerHandle, find_trained
from plywise.engine.statistics.saved_keys import PREFIX
from plywise.engine.statistics.saved_state import LayerState, SavedState
from plywise.engine.statistics.shard_exchange import gather_whole
from plywise.engine.statistics.stacks import convert_state


class TurnedSteps:
    """The steps of one optimizer in the coordinates of one rule.

    Args:
        rule: the rule.
        optimizer: the optimizer.
        health: where steps that are not finite are counted.
        processes: the processes that share the states.

    Raises:
        AttachError: the optimizer's steps cannot be turned.
    """

    def __init__(
        self, rule: StatefulContract, optimizer: Optimizer, health: Health, processes: TrainingProcesses
    ) -> None:
        self._rule = rule
        self._processes = processes
        self._traits: OptimizerTraits = probe_optimizer(optimizer)
        self._health = health
        self._last: list[LayerHandle] = []
        self._arranged: list[SmallLayers | LargeLayer | ShardedLayers] = []
        self._states: list[State] = []
        self._key: tuple[object, ...] = ()
        self._is_turned = False
        self._lent: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, its gradient, the one in its place

    def make(
        self,
        layers: list[LayerHandle],
        before: Mapping[str, LayerState],
        memories: dict[str, State],
        optimizer: Optimizer,
    ) -> None:
        """Turn the gradients of these layers, for the step that the optimizer is about to take.

        New coordinates are used from the next step on, because momenta are turned after this step. The first
        coordinates are used at once if the optimizer has no state yet, because its second moments then belong
        to them.
        """
        ready: list[LayerHandle] = []
        states: list[State] = []
        for layer in layers:
            state = before[layer.name].tensors
            if not state and not self._has_state(layer, optimizer):
                state = memories[layer.name]
            weight = layer.entry.parameter()
            if state and weight is not None and weight.grad is not None:
                ready.append(layer)
                states.append(state)
        self._lend_gradients(ready)
        self._add_decay(ready, optimizer, 1.0)
        with torch.no_grad():
            self._turn_gradients(ready, states, optimizer)
        self._add_decay(ready, optimizer, -1.0)

    def keep(
        self,
        layers: Sequence[LayerHandle],
        before: Mapping[str, State],
        made: Mapping[str, LayerState],
        optimizer: Optimizer,
    ) -> None:
        """Turn the optimizer's steps back once it has stepped, and momenta into the new coordinates.

        An optimizer that divides by second moments keeps its momenta as they are. Second moments cannot be
        turned. If the momentum alone were turned, it would be divided by second moments of other axes, and
        the step could have any size.

        Args:
            layers: the layers with new coordinates.
            before: their states before this step.
            made: their states from now on.
            optimizer: the optimizer.
        """
        self._put_gradients_back()
        self._turn_steps_back(optimizer)
        for layer in layers:
            if before[layer.name]:
                if not self._traits.quadratic:
                    self._turn_momenta(layer, before[layer.name], made[layer.name].tensors, optimizer)
            elif layer not in self._last:
                self._restart(layer, optimizer)  # second moments of other coordinates do not fit these

    # ---- gradients ---------------------------------------------------------------------------------

    def _lend_gradients(self, layers: Sequence[LayerHandle]) -> None:
        """Put copies in the place of gradients, to be turned: a second step must find them as they were."""
        self._put_gradients_back()  # of a step that has failed
        for parameter in find_trained(layers).values():
            if parameter.grad is not None:
                plain, parameter.grad = parameter.grad, parameter.grad.clone()
                self._lent.append((parameter, plain, parameter.grad))

    def _put_gradients_back(self) -> None:
        for parameter, plain, lent in self._lent:
            if parameter.grad is lent:  # some optimizers drop gradients
                parameter.grad = plain
        self._lent.clear()

    # ---- weight decay ------------------------------------------------------------------------------

    def _add_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer, sign: float) -> None:
        """Add a coupled weight decay before gradients are turned, because it uses the unturned weights.

        From the turned gradients it is subtracted again (``sign`` -1), because the optimizer will add it.
        """
        if self._traits.decay != "coupled":
            return
        scale = getattr(optimizer, "grad_scale", None)
        groups = optimizer.param_groups
        decays = {id(p): g["weight_decay"] * find_direction(g) for g in groups for p in g["params"]}
        for parameter in find_trained(layers).values():
            decay = decays.get(id(parameter), 0.0)
            if decay and parameter.grad is not None:
                added = parameter.detach() * (decay * sign)
                parameter.grad.add_(added if scale is None else added * scale)

    # ---- the step ------------------------------------------------------------------------------------

    def _turn_gradients(self, layers: list[LayerHandle], states: list[State], optimizer: Optimizer) -> None:
        """Turn gradients, and keep the weights that the optimizer's weight decay alone would give."""
        self._arrange(layers, states)
        self._last, self._is_turned = layers, True
        for group in self._arranged:
            group.turn(partial(self._find_factors, optimizer), self._note)

    def _arrange(self, layers: list[LayerHandle], states: list[State]) -> None:
        """Arrange layers as before, or again if they, their parameters or their sizes have changed."""
        key = layers, list(map(_make_signature, layers))
        before, self._states = self._states, states
        if key == self._key and not any(map(is_not, states, before)):
            return
        if key == self._key and _list_sizes(states) == _list_sizes(before):
            for group in self._arranged:
                group.follow(states)
            return
        self._key = key
        self._arranged = [*arrange_turned(self._rule, layers, states)]
        sharded = [place for place, layer in enumerate(layers) if layer.entry.sharding is not None]
        if sharded:
            replicas = self._processes.replicas
            self._arranged.append(ShardedLayers(self._rule, layers, sharded, states, replicas))

    def _find_factors(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[float]:
        """Return what a decoupled weight decay multiplies parameters by."""
        if self._traits.decay != "decoupled":
            return [1.0] * len(parameters)
        decays = {
            id(p): 1 - float(group["lr"]) * group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        return [decays.get(id(parameter), 1.0) for parameter in parameters]

    def _turn_steps_back(self, optimizer: Optimizer) -> None:
        """Turn the optimizer's steps back."""
        is_turned, self._is_turned = self._is_turned, False
        found_inf = getattr(optimizer, "found_inf", None)
        if not is_turned or (found_inf is not None and bool(found_inf)):  # a fused optimizer has not stepped
            return
        still = self._find_still(optimizer)
        with torch.no_grad():
            values = [parameter.clone() for parameter in still]
            for group in self._arranged:
                group.turn_back(self._note)
            for parameter, value in zip(still, values, strict=True):
                parameter.copy_(value)

    def _find_still(self, optimizer: Optimizer) -> list[Tensor]:
        """Find the parameters whose rate is 0: they stay, though a step turned back moves its whole layer."""
        rates = ((group, group.get("lr")) for group in optimizer.param_groups)
        groups = [group for group, rate in rates if rate is not None and float(rate) == 0]
        still = {id(parameter) for group in groups for parameter in group["params"]}
        if not still:
            return []
        own = find_trained(self._last)
        return [parameter for key, parameter in own.items() if key in still]

    def _note(self, layer: LayerHandle) -> None:
        """Count that a matrix of this layer is not finite once it is turned."""
        self._health.note(layer.name, IDENTITY)

    # ---- the optimizer's state -------------------------------------------------------------------------

    def _has_state(self, layer: LayerHandle, optimizer: Optimizer) -> bool:
        """Return whether the optimizer keeps anything of its own for a layer."""
        names = [name for parameter in layer.trained for name in optimizer.state.get(parameter, ())]
        return any(not str(name).startswith(PREFIX) for name in names)

    def _restart(self, layer: LayerHandle, optimizer: Optimizer) -> None:
        """Clear the optimizer's state of a layer: momenta, second moments and the count of steps."""
        for parameter in layer.trained:
            state = optimizer.state.get(parameter, {})
            for name in (*self._traits.linear, *self._traits.quadratic, "step"):
                if isinstance(state.get(name), Tensor):
                    state[name] = torch.zeros_like(state[name])
                elif name in state:
                    state[name] = 0

    def _turn_momenta(self, layer: LayerHandle, old: State, new: State, optimizer: Optimizer) -> None:
        """Bring momenta into new coordinates; without a state, into the weights' own."""

        def turn(matrix: Tensor) -> Tensor:
            return self._rule.turn_momentum(convert_state(old, matrix), convert_state(new, matrix), matrix)

        self._turn(layer, self._traits.linear, turn, optimizer)

    def turn_back(self, layers: Iterable[LayerHandle], saved: SavedState) -> None:
        """Bring momenta and second moments of layers back into the weights' own coordinates."""
        optimizer = saved.optimizer
        if optimizer is None:
            return
        for layer in layers:
            state = saved.read(layer.name).tensors if layer.is_in_place else {}
            if state:
                turn = partial(self._turn_squares_back, state)
                with layer.with_bias(saved.has_column(layer.name)):  # it may be frozen by now
                    self._turn_momenta(layer, state, {}, optimizer)
                    self._turn(layer, self._traits.quadratic, turn, optimizer)

    def _turn_squares_back(self, state: State, matrix: Tensor) -> Tensor:
        return self._rule.turn_squares_back(convert_state(state, matrix), matrix)

    def _turn(
        self,
        layer: LayerHandle,
        names: Sequence[str],
        turn: Callable[[Tensor], Tensor],
        optimizer: Optimizer,
    ) -> None:
        for name in names:
            states = {id(p): optimizer.state.get(p, {}) for p in layer.trained}
            if all(isinstance(state.get(name), Tensor) for state in states.values()):
                # new tensors: the user may have saved the old ones
                news = {key: state[name].clone() for key, state in states.items()}
                with self._make_whole(layer, news) as mine:
                    for one in mine:
                        turn_stand_ins(one, turn)
                for key, state in states.items():
                    state[name] = news[key]

    @contextmanager
    def _make_whole(self, layer: LayerHandle, tensors: dict[int, Tensor]) -> Iterator[list[LayerHandle]]:
        """Let tensors stand in for a layer's gradient, whole; of a sharded layer on one process."""
        if layer.entry.sharding is not None:
            with gather_whole([layer], lambda p: tensors[id(p)], self._processes.replicas) as mine:
                yield mine
            return
        layer.stand_ins = tensors
        try:
            yield [layer]
        finally:
            layer.stand_ins = {}


def _make_signature(layer: LayerHandle) -> tuple[object, ...]:
    """Return what stacks of a layer depend on."""
    weight, bias = layer.entry.parameter(), layer.bias
    assert weight is not None
    return id(weight), id(bias), weight.shape, weight.dtype, weight.device, id(layer.site)


def _list_sizes(states: Sequence[State]) -> list[dict[str, torch.Size]]:
    return [{key: value.shape for key, value in state.items()} for state in states]
