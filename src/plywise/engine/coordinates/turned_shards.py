"""Turns layers under fully_shard into other coordinates: each is whole on one process while it is turned."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from plywise.engine.call import Update
from plywise.engine.contract import State, StatefulContract, Turn
from plywise.engine.coordinates.turned_layers import FindFactors, Note, find_scale, measure
from plywise.engine.finite import is_finite
from plywise.engine.processes.replicas import Replicas
from plywise.engine.sharding import find_local
from plywise.engine.statistics.layer_handle import LayerHandle, find_trained
from plywise.engine.statistics.shard_exchange import gather_whole, get_layer_gradient
from plywise.engine.statistics.stacks import StackedState, convert_state


class ShardedLayers:
    """Layers of whose parameters each process has a shard.

    All processes call its methods in the same steps: they exchange the gradients, and then the steps.

    Args:
        rule: the rule.
        layers: all layers, the same on all processes.
        places: which of them are spread.
        states: the states of all layers, the same on all processes.
        replicas: the processes.
    """

    def __init__(
        self,
        rule: StatefulContract,
        layers: Sequence[LayerHandle],
        places: Sequence[int],
        states: Sequence[State],
        replicas: Replicas,
    ) -> None:
        self._rule = rule
        self._replicas = replicas
        self._places = {
            layers[place].name: place
            for place in places
            if rule.make_turn(StackedState().follow([states[place]])) is not None
        }
        self._layers = [layers[place] for place in self._places.values()]
        self._states = states
        self._bases: dict[int, Tensor] = {}
        self._failed: set[str] = set()

    def follow(self, states: Sequence[State]) -> None:
        """Use these as the states of all layers from now on."""
        self._states = states

    def turn(self, find_factors: FindFactors, note: Note) -> None:
        """Turn gradients, and keep the weights that a weight decay alone would make."""
        self._failed = set()
        if not self._layers:
            return
        with gather_whole(self._layers, get_layer_gradient, self._replicas) as mine:
            for layer in mine:
                if not turn_stand_ins(layer, partial(self._turn, layer)):
                    self._failed.add(layer.name)
                    note(layer)
        parameters = list(find_trained(self._layers).values())
        for parameter, factor in zip(parameters, find_factors(parameters), strict=True):
            self._bases[id(parameter)] = find_local(parameter.detach()) * factor

    def turn_back(self, note: Note) -> None:
        """Turn the optimizer's steps back, and put them into the weights."""
        if not self._layers:
            return
        parameters = find_trained(self._layers)
        steps = {key: torch.empty_like(p) for key, p in parameters.items()}
        locals_ = {key: find_local(p.detach()) for key, p in parameters.items()}
        for key, local in locals_.items():
            torch.sub(local, self._bases[key], out=find_local(steps[key]))
        with gather_whole(self._layers, lambda p: steps[id(p)], self._replicas) as mine:
            for layer in mine:
                if layer.name not in self._failed:
                    self._turn_step_back(layer, note)
        for key, local in locals_.items():
            torch.add(self._bases[key], find_local(steps[key]), out=local)

    def _turn_step_back(self, layer: LayerHandle, note: Note) -> None:
        if not turn_stand_ins(layer, partial(self._turn_back, layer)):  # such a step is not taken
            turn_stand_ins(layer, torch.zeros_like)
            note(layer)

    def _turn(self, layer: LayerHandle, gradient: Tensor) -> Tensor:
        return self._find_turn(layer, gradient).turn(gradient.clone(), torch.empty_like(gradient))

    def _turn_back(self, layer: LayerHandle, step: Tensor) -> Tensor:
        turned = self._find_turn(layer, step).turn_back(step.clone(), torch.empty_like(step))
        return turned * find_scale(measure(step), measure(turned)) if self._rule.keeps_norm else turned

    def _find_turn(self, layer: LayerHandle, like: Tensor) -> Turn:
        state = convert_state(self._states[self._places[layer.name]], like)
        turn = self._rule.make_turn(StackedState().follow([state]))
        assert turn is not None
        return turn


def turn_stand_ins(layer: LayerHandle, turn: Callable[[Tensor], Tensor]) -> bool:
    """Turn what stands in for a layer's gradient, as a matrix (g, m, k); return whether that is finite."""
    update = layer.read_gradient()
    matrix = update.matrix(layer.groups)
    turned = turn(matrix.to(torch.promote_types(matrix.dtype, torch.float32))).to(matrix.dtype)
    if not is_finite(turned):
        return False
    assert update.weight is not None
    layer.write_gradient(Update.of(turned, update.weight.shape, update.bias is not None))
    return True
