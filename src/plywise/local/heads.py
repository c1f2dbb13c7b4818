"""Auxiliary heads: what a block's activations say of the classes, for a loss of the block's own."""

import math
from collections.abc import Callable

import torch
from torch import nn

MakeHead = Callable[[torch.Size, int], nn.Module]
"""Makes a head from the shape of a sample's activations and the number of classes."""

_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def pooled_linear(shape: torch.Size, num_classes: int) -> nn.Module:
    """Average positions into at most two along each axis, flatten, and one linear layer.

    Channels come first, as convolutions hand them on; flat features go to the linear layer as they are.
    Blocks of a transformer, with features last, want a head of their own.

    Example:
        >>> pooled_linear(torch.Size([16, 8, 8]), 10)
        Sequential(
          (0): AdaptiveAvgPool2d(output_size=(2, 2))
          (1): Flatten(start_dim=1, end_dim=-1)
          (2): Linear(in_features=64, out_features=10, bias=True)
        )
    """
    layers, features = pooled(shape)
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def pooled(shape: torch.Size) -> tuple[list[nn.Module], int]:
    """Layers that average positions into at most two along each axis and flatten; a sample's features."""
    positions = tuple(shape[1:])
    layers: list[nn.Module] = []
    if len(positions) in _POOLS and max(positions) > 2:
        positions = tuple(min(2, size) for size in positions)
        layers.append(_POOLS[len(positions)](positions))
    return [*layers, nn.Flatten()], math.prod([*shape[:1], *positions])
