"""What a block of local learning is: it turns a signal into the next one, and has a loss of its own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Signal:
    """What one component hands to the next, and in one direction only.

    Attributes:
        s: activations of the batch.
        y: the batch's targets, as the loss takes them.
        codes: codes of the targets, a row for each class; None for methods without them.
    """

    s: Tensor
    y: Tensor
    codes: Tensor | None = None

    def detached(self) -> "Signal":
        """This signal without a graph: no gradient crosses from one component to the one before."""
        return Signal(self.s.detach(), self.y, None if self.codes is None else self.codes.detach())


class Component(nn.Module, ABC):
    """A block with what its local objective needs; abstract."""

    @abstractmethod
    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """The next signal, and the local loss, a scalar with this component's graph."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; ``"rate"`` is a factor of its learning rate (default 1)."""
        return [{"params": list(self.parameters())}]
