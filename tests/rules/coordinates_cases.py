"""Data, a layer and definitions for the tests of `plywise.Coordinates`."""

import torch
from torch import Tensor, nn

STEPS = 9


def make_data(number: int, columns: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(12, columns, generator=generator) * torch.arange(1.0, columns + 1) + 0.3
    return x, torch.randn(12, 4, generator=generator)


def train(
    layer: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS), scale: float = 1.0
) -> None:
    for number in steps:
        optimizer.zero_grad()
        x, delta = make_data(number)
        ((layer(x) * delta).sum() * scale).backward()
        optimizer.step()


def matrix_of(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)


def gradient(number: int) -> tuple[Tensor, Tensor]:
    """``G`` and the covariance of the inputs with a trailing 1."""
    x, delta = make_data(number)
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    return delta.T @ a, a.T @ a / len(x)


def add_ramp(covariance: Tensor) -> Tensor:
    """What is added so that no two eigenvalues are equal, relative to a power of two near the mean."""
    size = torch.exp2(torch.log2(covariance.diagonal().mean()).floor())
    return covariance + size * torch.diag(torch.linspace(1e-4, 0, len(covariance)))


def find_basis(covariance: Tensor, power: float, damping: float) -> Tensor:
    covariance = add_ramp(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * (values.clamp_min(0) / values.mean() + damping) ** -power


def new_layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(5, 4)
