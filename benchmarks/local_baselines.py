"""What local learning has to hold against: backpropagation in the forms that save memory or waiting.

All train the same blocks and the classifier behind them by the loss of its scores, on Adam. "deep
supervision" adds the loss of a head behind every block, and sends all of them all the way down.
"checkpointing" keeps what goes from block to block, and runs each block again in backward: the numbers are
backpropagation's. "accumulation" takes a batch in as many parts as there are blocks, so that it keeps about
what one block keeps. "one-step delay" steps by the gradient of the batch before, at the weights before:
what a pipeline of backpropagation has to bear that waits for nobody.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plywise._util.modes import evaluating

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """A way to train, at work: a step on a batch, and scores."""

    step: Callable[[Tensor, Tensor], object]
    predict: Callable[[Tensor], Tensor]


def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


class Stepper:
    """Backpropagation of some blocks; the classifier is in the last one."""

    def __init__(
        self, blocks: list[nn.Module], loss: Loss, rate: float, others: Iterable[nn.Module] = ()
    ) -> None:
        self.model, self.loss = nn.Sequential(*blocks), loss
        learning = [p for part in (self.model, *others) for p in part.parameters()]
        self.optimizer = adam(rate)(learning)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Add the gradients of a batch."""
        self.loss(self.model(x), y).backward()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.backward(x, y)
        self.optimizer.step()

    def predict(self, x: Tensor) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            return self.model(x)


class DeepSupervision(Stepper):
    """Every block's head has a loss, and all losses go all the way down."""

    def __init__(self, blocks: list[nn.Module], loss: Loss, rate: float, heads: list[nn.Module]) -> None:
        super().__init__(blocks, loss, rate, heads)
        self.heads = heads

    def backward(self, x: Tensor, y: Tensor) -> None:
        losses = []
        for number, block in enumerate(self.model):
            x = block(x)
            losses.append(self.loss(self.heads[number](x) if number < len(self.heads) else x, y))
        torch.stack(losses).sum().backward()


class Checkpointing(Stepper):
    """Blocks run again in backward. Batch norm's running statistics take each batch in twice."""

    def backward(self, x: Tensor, y: Tensor) -> None:
        for block in self.model:
            x = checkpoint(block, x, use_reentrant=False)
        self.loss(x, y).backward()


class Accumulation(Stepper):
    """A batch in as many parts as there are blocks. Batch norm sees the parts."""

    def backward(self, x: Tensor, y: Tensor) -> None:
        parts = min(len(self.model), len(x) // 2) or 1
        for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            (self.loss(self.model(a), b) * (len(a) / len(x))).backward()


class OneStepDelay(Stepper):
    """Steps by the gradient of the batch before, at the weights that it met."""

    def __init__(self, blocks: list[nn.Module], loss: Loss, rate: float) -> None:
        super().__init__(blocks, loss, rate)
        self._before: list[Tensor | None] | None = None

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        parameters = list(self.model.parameters())
        self.optimizer.zero_grad()
        self.backward(x, y)
        now = [p.grad for p in parameters]
        if self._before is not None:
            for p, gradient in zip(parameters, self._before, strict=True):
                p.grad = gradient
            self.optimizer.step()
        self._before = now
