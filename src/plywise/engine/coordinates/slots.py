"""Reads and writes the weights, and the gradients, of several layers at once."""

import weakref
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from plywise.engine.statistics.layer_handle import LayerHandle


class Slots:
    """Where the weights and biases of some layers are, and their gradients.

    Parameters are known weakly: their hooks own the attachment, and torch hides that from the garbage
    collector.
    """

    def __init__(self, layers: Sequence[LayerHandle]) -> None:
        self._owners = [(layer, i == 0) for layer in layers for i in range(len(layer.trained))]
        self._parameters = [weakref.ref(parameter) for layer in layers for parameter in layer.trained]
        self._are_plain = all(layer.is_plain for layer in layers)
        self.layers = layers

    def find_parameters(self) -> list[Tensor]:
        """Return each layer's weight, and its bias if that trains."""
        return [ref() for ref in self._parameters]  # type: ignore[misc]

    def find_gradients(self) -> list[Tensor]:
        """Return the layers' gradients; if that of a bias is missing, return zeros for it."""
        gradients = [parameter.grad for parameter in self.find_parameters()]
        if not self._are_plain or any(map(is_, gradients, [None] * len(gradients))):
            for layer in self.layers:
                layer.read_gradient()
            gradients = [parameter.grad for parameter in self.find_parameters()]
        return gradients  # type: ignore[return-value]

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return these tensors in their canonical shapes: themselves, views or copies."""
        if self._are_plain:
            return tensors
        return [
            layer.make_canonical(tensor) if is_weight else tensor.reshape(-1)
            for (layer, is_weight), tensor in zip(self._owners, tensors, strict=True)
        ]

    def write(self, tensors: list[Tensor], values: list[Tensor]) -> None:
        """Put values in canonical shapes into these tensors."""
        if self._are_plain:
            torch._foreach_copy_(tensors, values)
            return
        for (layer, is_weight), tensor, value in zip(self._owners, tensors, values, strict=True):
            if is_weight:
                layer.write_canonical(tensor, value)
            else:
                tensor.copy_(value.reshape(tensor.shape))
