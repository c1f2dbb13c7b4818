"""Layers at rest: autograd alone makes their gradients, and the optimizer's step makes the updates."""

from plywise.engine.layer_handle import LayerHandle
from plywise.engine.saved_state import LayerState, SavedState


class Resting:
    """All layers of one attachment between two steps that gather.

    Args:
        layers: the layers whose updates the step makes.
        states: their states.
        known: all layers, also those that have learned nothing or are frozen.

    Attributes:
        states: their states by name.
        memories: the tensors of these.
    """

    def __init__(self, layers: list[LayerHandle], states: list[LayerState], known: list[LayerHandle]) -> None:
        self._layers = layers
        self._signs = [(layer, _sign(layer)) for layer in known]
        self.states = {layer.name: state for layer, state in zip(layers, states, strict=True)}
        self.memories = {name: state.tensors for name, state in self.states.items()}

    def holds(self, saved: SavedState) -> bool:
        """Whether these are still the states, and the layers still where they were."""
        return all(
            saved.read(layer.name) is state and not layer.entry.why_left
            for layer, state in zip(self._layers, self.states.values(), strict=True)
        ) and all(_sign(layer) == sign for layer, sign in self._signs)

    def take_arrived(self) -> list[LayerHandle]:
        """The layers whose gradients have arrived since the last step."""
        arrived = [layer for layer in self._layers if layer.entry.arrived]
        for layer in arrived:
            layer.entry.arrived = False
        return arrived


def _sign(layer: LayerHandle) -> tuple[object, ...]:
    """What the statistics of a layer depend on."""
    weight = layer.entry.parameter()
    if weight is None:
        return ()
    return weight.dtype, weight.device, weight.requires_grad, layer.bias is not None
