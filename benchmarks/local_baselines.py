"""Baselines of local learning: variants of backpropagation that save memory or waiting time.

All of them train the same blocks and a classifier after the last block with the loss of its scores, on Adam.
"deep supervision" adds the loss of a head after every block, and backpropagates all losses through the whole
network. "checkpointing" keeps only the activations between blocks and runs each block again in backward; its
gradients are those of backpropagation. "accumulation" splits a batch into as many parts as there are blocks,
so it keeps about as much as one block does. "one-step delay" steps with the gradient of the previous batch at
the previous weights, like a pipeline of backpropagation that never waits.
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
class Trainer:
    """A trainer: a step on a batch, and the scores of inputs."""

    step: Callable[[Tensor, Tensor], object]
    predict: Callable[[Tensor], Tensor]


def make_adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


class Stepper:
    """Backpropagation through some blocks; the last one contains the classifier."""

    def __init__(
        self, blocks: list[nn.Module], loss: Loss, rate: float, others: Iterable[nn.Module] = ()
    ) -> None:
        self.model, self.loss = nn.Sequential(*blocks), loss
        trainable = [p for part in (self.model, *others) for p in part.parameters()]
        self.optimizer = make_adam(rate)(trainable)

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
    """Every block has a head with a loss, and all losses are backpropagated through the whole network."""

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
    """Runs blocks again in backward. The running statistics of batch norm see each batch twice."""

    def backward(self, x: Tensor, y: Tensor) -> None:
        for block in self.model:
            x = checkpoint(block, x, use_reentrant=False)
        self.loss(x, y).backward()


class Accumulation(Stepper):
    """Splits a batch into as many parts as there are blocks. Batch norm sees the parts."""

    def backward(self, x: Tensor, y: Tensor) -> None:
        parts = min(len(self.model), len(x) // 2) or 1
        for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            (self.loss(self.model(a), b) * (len(a) / len(x))).backward()


class OneStepDelay(Stepper):
    """Steps with the gradient of the previous batch, taken at the previous weights."""

    def __init__(self, blocks: list[nn.Module], loss: Loss, rate: float) -> None:
        super().__init__(blocks, loss, rate)
        self._previous: list[Tensor | None] | None = None

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        parameters = list(self.model.parameters())
        self.optimizer.zero_grad()
        self.backward(x, y)
        gradients = [p.grad for p in parameters]
        if self._previous is not None:
            for p, gradient in zip(parameters, self._previous, strict=True):
                p.grad = gradient
            self.optimizer.step()
        self._previous = gradients
