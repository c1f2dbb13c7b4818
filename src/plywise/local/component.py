"""A component of local learning: a block that turns a signal into the next one, with its own loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plywise.data.batches import map_tensors
from plywise.errors import BlockError


@dataclass(frozen=True)
class Signal:
    """What one component passes to the next, in this direction only.

    Attributes:
        s: activations of the batch; of the first component the inputs, which may be any nesting of tensors.
        y: the batch's targets, as the loss takes them.
        codes: codes of the targets, a row for each class; None for methods without them.
        carried: the model's inputs, which go along unchanged where blocks need them (`Blocks.carries`): masks
            and positions are made of them.
    """

    s: Any
    y: Tensor
    codes: Tensor | None = None
    carried: Any = None

    def through(self, block: nn.Module) -> Tensor:
        """Return the block's output for these activations."""
        return block(self.s) if self.carried is None else block(self.s, self.carried)

    def detached(self) -> "Signal":
        """This signal without a graph: no gradient crosses from one component to the one before."""
        codes = None if self.codes is None else self.codes.detach()
        return replace(self, s=map_tensors(torch.Tensor.detach, self.s), codes=codes)


class Component(nn.Module, ABC):
    """A block with what its local objective needs; abstract."""

    @abstractmethod
    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Return the next signal, and the local loss, a scalar with this component's graph."""

    def split(self, signal: Signal) -> list[tuple[Signal, float]]:
        """Parts of a batch that run one after another, backward included, and the share of each in the loss.

        The default is the batch as one part. With more parts the graph of one is all that is kept.
        """
        return [(signal, 1.0)]

    def join(self, signal: Signal, parts: Sequence[Signal]) -> Signal:
        """Return the signal that goes on, from what `forward` makes of the parts of ``signal``."""
        if len(parts) == 1:
            return parts[0]
        s = torch.cat([part.s for part in parts])
        return replace(parts[0], s=s, y=signal.y, carried=signal.carried)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; ``"rate"`` is a factor of its learning rate (default 1)."""
        return [{"params": list(self.parameters())}]


def check_answer(component: nn.Module, index: int, answer: object) -> tuple[Signal, Tensor]:
    """Return what a component's `Component.forward` returned: the next signal, and the loss.

    Raises:
        BlockError: it is something else, or the loss is not one number.
    """
    name = f"Component {index} ({type(component).__name__})"
    how = "forward(signal) must return the next plywise.Signal and the loss, a tensor of one number"
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Signal):
        parts = answer if isinstance(answer, tuple) else (answer,)
        found = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise BlockError(f"{name} returned {found}: {how}.")
    signal, loss = answer
    if not isinstance(loss, Tensor):
        raise BlockError(f"{name} returned a loss of type {type(loss).__name__}: {how}.")
    if loss.numel() != 1:
        raise BlockError(f"{name} returned a loss of shape {tuple(loss.shape)}: {how}; take its mean.")
    return signal, loss
