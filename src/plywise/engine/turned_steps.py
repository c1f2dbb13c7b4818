"""An optimizer at work in other coordinates: its step is taken from the weights and turned back.

The gradient that the optimizer sees is that of turned weights, the weights themselves are as they were. So
what it adds to them, beside a weight decay, is a step in the other coordinates.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from plywise.engine.call import Update
from plywise.engine.contract import State, StatefulContract
from plywise.engine.health import Health
from plywise.engine.layer_handle import LayerHandle
from plywise.engine.optimizer_probe import OptimizerTraits, probe_optimizer
from plywise.engine.saved_state import PREFIX, LayerState
from plywise.engine.stacks import Scratch, convert_state
from plywise.engine.step_updates import StepsBack, StepUpdates
from plywise.errors import PlywiseError


class TurnedSteps:
    """The steps of one optimizer in the coordinates of one rule.

    Args:
        rule: the rule.
        optimizer: the optimizer.
        health_: where steps that are not finite are counted.
        scratch: memory for large layers.

    Raises:
        AttachError: the optimizer's steps cannot be turned.
    """

    def __init__(
        self, rule: StatefulContract, optimizer: Optimizer, health_: Health, scratch: Scratch
    ) -> None:
        self._rule = rule
        self._traits: OptimizerTraits = probe_optimizer(optimizer)
        self._back = StepsBack(rule, health_, scratch)
        self._layers: list[LayerHandle] = []
        self._last: list[LayerHandle] = []
        self._memories: dict[str, State] = {}
        self._parameters: list[Tensor] = []
        self._bases: list[Tensor] = []

    def make(
        self,
        updates: StepUpdates,
        layers: list[LayerHandle],
        before: Mapping[str, LayerState],
        memories: dict[str, State],
        optimizer: Optimizer,
    ) -> None:
        """Turn the gradients of these layers, for the step that the optimizer is about to take.

        New coordinates hold from the next step on: momenta are turned once this one has been taken. The first
        hold at once where the optimizer has no state yet: its second moments are of these then.
        """
        now = {layer.name: before[layer.name].tensors for layer in layers}
        for layer in layers:
            if not now[layer.name] and not self._has_state(layer, optimizer):
                now[layer.name] = memories[layer.name]
        layers = [layer for layer in layers if now[layer.name]]
        self._give_decay(layers, optimizer)
        turned = updates.make(layers, now)
        self._take_decay(layers, optimizer)
        self._begin(turned, now, optimizer)

    def keep(
        self,
        layers: Sequence[LayerHandle],
        before: Mapping[str, State],
        made: Mapping[str, LayerState],
        optimizer: Optimizer,
    ) -> None:
        """The optimizer has stepped: turn its steps back, and momenta into the coordinates that hold now.

        An optimizer that divides by second moments keeps its momenta as they are. Second moments cannot be
        turned, and a momentum that is turned alone meets second moments of other axes: steps of any size.

        Args:
            layers: the layers with new coordinates.
            before: their states before this step.
            made: their states from now on.
            optimizer: the optimizer.
        """
        self._end(optimizer)
        for layer in layers:
            if before[layer.name]:
                if not self._traits.quadratic:
                    self._turn_momenta(layer, before[layer.name], made[layer.name].tensors, optimizer)
            elif layer not in self._last:
                self._restart(layer, optimizer)  # second moments of other coordinates are none of these

    # ---- weight decay ------------------------------------------------------------------------------

    def _give_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer) -> None:
        """Add what a coupled weight decay adds, before gradients are turned: it belongs to the weights."""
        self._add_decay(layers, optimizer, 1.0)

    def _take_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer) -> None:
        """Take from the turned gradients what the optimizer will add to them."""
        self._add_decay(layers, optimizer, -1.0)

    def _add_decay(self, layers: Sequence[LayerHandle], optimizer: Optimizer, sign: float) -> None:
        if self._traits.decay != "coupled":
            return
        scale = getattr(optimizer, "grad_scale", None)
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        for parameter in _list_parameters(layers):
            decay = decays.get(id(parameter), 0.0)
            if decay and parameter.grad is not None:
                added = parameter.detach() * (decay * sign)
                parameter.grad.add_(added if scale is None else added * scale)

    # ---- the step ------------------------------------------------------------------------------------

    def _begin(self, layers: list[LayerHandle], memories: dict[str, State], optimizer: Optimizer) -> None:
        """The optimizer is about to step: keep what its weight decay alone would make of the weights."""
        for layer in layers:
            if layer.entry.sharding is not None:
                raise PlywiseError(
                    f"{type(self._rule).__name__} turns the steps of whole weights, and fully_shard has "
                    f"spread {layer.entry.name!r} over processes. Use DistributedDataParallel, or a rule "
                    "that turns none, such as Foof."
                )
        self._layers, self._memories = layers, memories
        self._parameters = _list_parameters(layers)
        factors = [1.0] * len(self._parameters)
        if self._traits.decay == "decoupled":
            decays = {
                id(p): 1 - float(g["lr"]) * g["weight_decay"]
                for g in optimizer.param_groups
                for p in g["params"]
            }
            factors = [decays.get(id(parameter), 1.0) for parameter in self._parameters]
        with torch.no_grad():
            self._bases = list(torch._foreach_mul(self._parameters, factors)) if layers else []

    def _end(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped: turn its steps back."""
        layers, self._layers = self._layers, []
        self._last = layers
        parameters, self._parameters = self._parameters, []
        bases, self._bases = self._bases, []
        found_inf = getattr(optimizer, "found_inf", None)
        if not layers or (found_inf is not None and bool(found_inf)):  # a fused optimizer has not stepped
            return
        with torch.no_grad():
            steps = torch._foreach_sub(parameters, bases)
            stand_ins = {id(parameter): step for parameter, step in zip(parameters, steps, strict=True)}
            try:
                for layer in layers:
                    layer.stand_ins = stand_ins
                self._back.make(layers, self._memories)
            finally:
                for layer in layers:
                    layer.stand_ins = {}
            torch._foreach_add_(bases, steps)
            torch._foreach_copy_(parameters, bases)

    # ---- the optimizer's state -------------------------------------------------------------------------

    def _has_state(self, layer: LayerHandle, optimizer: Optimizer) -> bool:
        """Whether the optimizer keeps anything of its own for a layer."""
        return any(_find_own(optimizer, parameter) for parameter in layer.trained)

    def _restart(self, layer: LayerHandle, optimizer: Optimizer) -> None:
        """Let the optimizer begin again with a layer: momenta, second moments and its count of steps."""
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

    def turn_back_state(self, layer: LayerHandle, state: State, optimizer: Optimizer) -> None:
        """Bring momenta and second moments back into the weights' own coordinates."""
        self._turn_momenta(layer, state, {}, optimizer)

        def turn(matrix: Tensor) -> Tensor:
            return self._rule.turn_squares_back(convert_state(state, matrix), matrix)

        self._turn(layer, self._traits.quadratic, turn, optimizer)

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
                # new tensors: somebody may have saved the old ones
                layer.stand_ins = {key: state[name].clone() for key, state in states.items()}
                try:
                    if _turn_stand_ins(layer, turn):
                        for key, state in states.items():
                            state[name] = layer.stand_ins[key]
                finally:
                    layer.stand_ins = {}


def _turn_stand_ins(layer: LayerHandle, turn: Callable[[Tensor], Tensor]) -> bool:
    """Turn what stands in for a layer's gradient; whether that is finite."""
    update = layer.read_gradient()
    matrix = update.matrix(layer.groups)
    turned = turn(matrix.to(torch.promote_types(matrix.dtype, torch.float32))).to(matrix.dtype)
    if not bool(torch.isfinite(turned.sum())):
        return False
    assert update.weight is not None
    layer.write_gradient(Update.of(turned, update.weight.shape, update.bias is not None))
    return True


def _find_own(optimizer: Optimizer, parameter: Tensor) -> list[str]:
    """What the optimizer itself keeps for a parameter."""
    return [name for name in optimizer.state.get(parameter, {}) if not str(name).startswith(PREFIX)]


def _list_parameters(layers: Sequence[LayerHandle]) -> list[Tensor]:
    """The parameters of these layers, each once."""
    return list({id(p): p for layer in layers for p in layer.trained}.values())
