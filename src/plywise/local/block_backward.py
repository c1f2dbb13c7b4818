"""Runs a block forward once, and sends any number of gradients back through it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plywise.engine.capture.calls_below import train_by_inputs
from plywise.local.component import Signal


class BlockBackward:
    """A block's forward on a batch, with its graph, cut off from the block before.

    Args:
        block: the block; it runs once.
        signal: what it gets.
        open_below: whether gradients at ``s`` will be asked for.

    Attributes:
        output: what the block hands on, with the graph.
    """

    def __init__(self, block: nn.Module, signal: Signal, open_below: bool) -> None:
        self._learning: list[Tensor] = [p for p in block.parameters() if p.requires_grad]
        self._arrived: list[Tensor] = []
        self._entrance: list[Tensor] = []
        s = signal.s.detach()
        if open_below:
            self._nothing = s.new_zeros(()).expand(s.shape)
            self._entrance.append(torch.zeros((), device=s.device, requires_grad=True))
            s = _Entrance.apply([s], self._entrance[0], self._arrived)
        self.output = replace(signal, s=s).through(block)

    def below(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the input for a gradient at the output."""
        with train_by_inputs():
            self._send(gradient, self._entrance, again=True)
        return self._arrived.pop() if self._arrived else self._nothing

    def learn(self, gradient: Tensor) -> None:
        """Add the gradients of the block's parameters, and free the graph."""
        self._send(gradient, self._learning, again=False)

    def learn_and_below(self, gradient: Tensor) -> Tensor:
        """Both in one backward."""
        self._send(gradient, [*self._learning, *self._entrance], again=False)
        return self._arrived.pop() if self._arrived else self._nothing

    def _send(self, gradient: Tensor, to: list[Tensor], again: bool) -> None:
        if to and self.output.requires_grad:
            self.output.backward(gradient, inputs=to, retain_graph=again)


class _Entrance(torch.autograd.Function):
    """Identity in forward; stores the incoming gradient in backward.

    A leaf would not do: a block may begin with an operation in place (``nn.ReLU(inplace=True)``).
    """

    @staticmethod
    def forward(ctx: Any, box: list[Tensor], entrance: Tensor, arrived: list[Tensor]) -> Tensor:
        ctx.arrived = arrived
        return box.pop()  # through a container: a tensor argument handed back would count as a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.arrived.append(gradient)
        return None, None, None
