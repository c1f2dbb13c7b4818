"""What every learner is checked on: three blocks on (B, 6) to three classes, dropout in the first."""

from typing import Any

import torch
from torch import Tensor, nn

from plywise.local.learner import Learner

CLASSES = 3


def make_adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.01)


def make_halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def make_modules(seed: int = 1) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Tanh()),
        nn.Linear(10, CLASSES),
    ]


def make_data(number: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    y = torch.arange(rows) % CLASSES
    return torch.randn(rows, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6), y


def copy_parameters(learner: Learner) -> dict[str, Tensor]:
    """Copy the parameters of all components, by component and name."""
    return {
        f"{trainer.index}: {name}": p.detach().clone()
        for trainer in learner.trainers
        for name, p in trainer.component.named_parameters()
    }


def format_numbers(values: Tensor) -> str:
    """Write the numbers of a vector, as an error shows them."""
    return f"[{', '.join(f'{value:.3g}' for value in values.tolist())}]"


def copy_state(learner: Learner) -> dict[str, Tensor]:
    """Copy all tensors of the learner's state, by path."""
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
