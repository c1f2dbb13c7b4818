"""What a model family is: a tiny model, a loss on a fixed batch, and the package that both need."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = 48
"""Number of different tokens in `make_tokens`."""

CLASSES = 5
"""Number of different labels in `make_labels`."""


@dataclass(frozen=True)
class Family:
    """A kind of model that people train, at a size that takes milliseconds.

    Attributes:
        name: short and unique.
        make_model: builds the model; it may draw random numbers.
        compute_loss: the loss of a model on a batch that it draws itself; a scalar.
        package: a package that must be importable besides torch, or None.
    """

    name: str
    make_model: Callable[[], nn.Module]
    compute_loss: Callable[[nn.Module], Tensor]
    package: str | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """Build the model in training mode; the same seed gives the same weights."""
        torch.manual_seed(seed)
        return self.make_model().train()

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        """Compute the loss; the same seed gives the same batch and the same noise."""
        torch.manual_seed(1000 + seed)
        return self.compute_loss(model)

    def find_obstacle(self) -> str | None:
        """Say why this family cannot run here, or return None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def make_tokens(batch: int = 4, length: int = 12) -> Tensor:
    """Draw token numbers; 0, 1 and 2 are kept for padding, begin and end."""
    return torch.randint(3, VOCABULARY, (batch, length))


def make_images(batch: int = 4, channels: int = 3, size: int = 16) -> Tensor:
    """Draw images of noise."""
    return torch.randn(batch, channels, size, size)


def make_labels(batch: int = 4) -> Tensor:
    """Draw class labels."""
    return torch.randint(CLASSES, (batch,))
