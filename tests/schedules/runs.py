"""A small network in training, as the tests of schedules need it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer


def network(seed: int = 0) -> nn.Sequential:
    """Layers "0" (convolution), "1" and "4" (batch norms), "3" and "8" (linear) on (B, 2, 4, 4)."""
    torch.manual_seed(seed)
    front = [nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 6)]
    return nn.Sequential(*front, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@dataclass
class Run:
    """A model in training."""

    model: nn.Module
    optimizer: Optimizer

    def loss(self, number: int, rows: slice = slice(None)) -> Tensor:
        """The loss of some rows of a step's batch, a sum over them."""
        x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(number))
        return self.model(x[rows]).square().sum()

    def step(self, number: int, factor: float = 1.0) -> None:
        """One whole step, in a model that is told to train; ``factor`` spoils or scales its loss."""
        self.model.train()
        self.optimizer.zero_grad()
        (self.loss(number) * factor).backward()
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """A copy of parameters and buffers."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def run(seed: int = 0, lr: float = 0.001) -> Run:
    """`network` under SGD with momentum and decay, which move weights whose gradient is zero."""
    model = network(seed)
    return Run(model, SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.1))


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor], start: str = "") -> bool:
    """Same values, of the names that begin with ``start``."""
    names = [name for name in left if name.startswith(start)]
    return bool(names) and all(torch.equal(left[name], right[name]) for name in names)
