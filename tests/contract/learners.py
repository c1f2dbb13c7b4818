"""Every local learner, made alike: three blocks on (B, 6) to three classes, dropout in the first."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import plywise as pw
from plywise.local.linear_heads import GradientHead

CLASSES = 3


def adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.01)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def modules(seed: int = 1) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Tanh()),
        nn.Linear(10, CLASSES),
    ]


def data(number: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    y = torch.arange(rows) % CLASSES
    return torch.randn(rows, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6), y


@dataclass(frozen=True)
class LearnerCase:
    """One learner; ``raises`` says that it refuses a batch that is not finite, where others skip it."""

    name: str
    kind: Callable[..., pw.Learner]
    raises: bool = False
    optimizes: bool = True

    def make(self, seed: int = 1, **training: Any) -> pw.Learner:
        """The learner, its parameters drawn by the seed."""
        if self.optimizes:
            training = {"optimizer": adam, "scheduler": halving, **training}
        blocks = pw.Blocks(modules(seed), torch.zeros(4, 6))
        return self.kind(blocks, CLASSES, **training)


def relaxation(blocks: pw.Blocks, num_classes: int, **training: Any) -> pw.Learner:
    return pw.ActivationRelaxation(blocks, rate=0.5, iterations=20, **training)


CASES = [
    LearnerCase("associated", partial(pw.AssociatedLearning, code=12)),
    LearnerCase("local_loss", pw.LocalLoss),
    LearnerCase("interlocking", partial(pw.Interlocking, horizon=2)),
    LearnerCase("cafo_gradient", partial(pw.CascadedForward, head=GradientHead), raises=True),
    LearnerCase("cafo_ridge", pw.CascadedForward, raises=True, optimizes=False),
    LearnerCase("forward_gradient", pw.LocalForwardGradient),
    LearnerCase("relaxation", relaxation),
]


def everything(learner: pw.Learner) -> dict[str, Tensor]:
    """All tensors of its state, by path."""
    found: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[path] = value.detach().clone()
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{path}/{key}", part)
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                walk(f"{path}/{number}", part)

    walk("", learner.state_dict())
    return found
