"""The contract of a rule with memory: what layers learn from step to step.

A rule with memory keeps a running statistic of each layer. In backward it gathers *evidence*, sums over
rows that add over micro-batches and processes (`MemoryRule.gather`). At the optimizer's step, if that step
happens, the evidence is learned: on every process alike and cheaply (`learn`), and every so many steps
dearly, on one process for all (`refresh`). What happens to evidence in between is `plywise.keeper`'s care.

Then the step makes the move from the gradient (`finish`), which is plain, whole and averaged by then. Where
it is cheaper to act on the rows that only backward sees (`in_backward`), backward makes the move by what is
remembered (`Rule.move`, `Ply.memory`), but for the steps that refresh.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from plywise.health import Health
from plywise.kept_layer import LayerShape
from plywise.ply import Move, Ply
from plywise.rule import Rule

__all__ = ["Evidence", "LayerShape", "Memory", "MemoryRule", "Shapes"]

Memory = Mapping[str, Tensor]
"""What one layer remembers, tensors by name; empty at first. Travels in the optimizer's state."""

Evidence = dict[str, Tensor]
"""What one backward pass says of a layer: sums, so that those of micro-batches and processes add.

``"rows"`` counts what was summed (a 0-dimensional tensor); evidence of no rows is not learned.
"""


Shapes = Mapping[str, tuple[int, ...]]
"""Tensors by name: their shapes."""


class MemoryRule(Rule):
    """A rule that keeps a running statistic of each layer; abstract.

    Subclasses are frozen dataclasses with the methods below besides those of `Rule`. All are pure: memory
    goes in, and what changes in it comes out.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, plywise as pw
        >>> @dataclass(frozen=True, eq=False)
        ... class RunningNLMS(pw.MemoryRule):
        ...     '''Divide G by a running mean of the rows' squared norm.'''
        ...     decay: float = 0.9
        ...     def move(self, ply):
        ...         return ply.gradient()
        ...     def gather(self, ply, turn):
        ...         norms = ply.square_norms()
        ...         return {"rows": norms.new_tensor(float(norms.numel())), "squares": norms.sum()}
        ...     def evidence_shapes(self, shape):
        ...         return {"rows": (), "squares": ()}
        ...     def learned_shapes(self, shape):
        ...         return {"mean": ()}
        ...     def learn(self, memory, evidence):
        ...         mean = evidence["squares"] / evidence["rows"]
        ...         return {"mean": self.decay * memory.get("mean", mean) + (1 - self.decay) * mean}
        ...     def finish(self, memory, gradient, groups):
        ...         return gradient.scaled(1 / memory["mean"], 1 / memory["mean"]), {}
        ...     def price(self, size):
        ...         return 2.0 * size.n * size.d, 1.0
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> rule = RunningNLMS().attach(model, optimizer)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.grad
        tensor([[0.2500, 0.2500, 0.2500]])
        >>> rule.detach()
    """

    remembers: ClassVar[bool] = True

    stats_every: int = 1
    """Steps from one gathering of evidence to the next."""

    refresh_every: int = 1
    """Steps from one refresh to the next, a multiple of ``stats_every``."""

    @abstractmethod
    def gather(self, ply: Ply, turn: int) -> Evidence:
        """What this backward pass says of the layer; ``turn`` counts the gatherings so far."""

    @abstractmethod
    def evidence_shapes(self, shape: LayerShape) -> Shapes:
        """Names and shapes of a layer's evidence."""

    @abstractmethod
    def learn(self, memory: Memory, evidence: Evidence) -> Memory:
        """What changes in the memory by this evidence; cheap, for every process does it."""

    @abstractmethod
    def learned_shapes(self, shape: LayerShape) -> Shapes:
        """Names and shapes of what `learn` returns."""

    def refresh(self, memory: Memory, name: str, health: Health) -> Memory:
        """The dear part of learning, done by one process for all: something of `refreshed_shapes`."""
        return {}

    def refreshed_shapes(self, shape: LayerShape) -> Shapes:
        """Names and shapes of what `refresh` returns."""
        return {}

    def refresh_cost(self, shape: LayerShape) -> float:
        """What `refresh` costs for a layer, in any unit: decides which process does it, and in which step."""
        return 0.0

    def in_backward(self, memory: Memory, shape: LayerShape) -> bool:
        """Whether, between refreshes, backward itself makes the move."""
        return False

    def finish(self, memory: Memory, gradient: Move, groups: int) -> tuple[Move, Memory]:
        """At the step: the move made from the gradient at hand, and what changes in the memory.

        Called in every step that refreshes, and in the others unless the rule acts `in_backward`.
        """
        return gradient, {}
