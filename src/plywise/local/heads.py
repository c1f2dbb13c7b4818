"""Auxiliary heads: they predict the classes from a block's activations, for the block's local loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

MakeHead = Callable[[torch.Size, int], nn.Module]
"""Makes a head from the shape of a sample's activations and the number of classes."""

_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def position_linear(shape: torch.Size, num_classes: int) -> nn.Module:
    """Return a linear layer at every position, for a target at each: activations (T, d), features last.

    Example:
        >>> position_linear(torch.Size([12, 16]), 50)
        Linear(in_features=16, out_features=50, bias=True)
    """
    return nn.Linear(shape[-1], num_classes)


class MeanLinear(nn.Linear):
    """A linear layer of the mean over positions, features last."""

    def forward(self, s: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores (N, C) of activations (N, ..., d); of the positions in ``mask`` (N, T), if it is given."""
        if s.dim() == 2:
            return super().forward(s)
        if mask is None or mask.shape != s.shape[:2]:
            return super().forward(s.flatten(1, -2).mean(1))
        share = mask.to(s) / mask.sum(1, keepdim=True).clamp_min(1)
        return super().forward((s * share.unsqueeze(2)).sum(1))


def mean_linear(shape: torch.Size, num_classes: int) -> nn.Module:
    """Average over all positions and one linear layer: for blocks of a transformer, features last.

    Example:
        >>> mean_linear(torch.Size([12, 16]), 3)
        MeanLinear(in_features=16, out_features=3, bias=True)
    """
    return MeanLinear(shape[-1], num_classes)


def pooled_linear(shape: torch.Size, num_classes: int) -> nn.Module:
    """Average positions into at most two along each axis, flatten, and one linear layer.

    Channels come first, as convolutions hand them on; flat features go to the linear layer as they are.
    Blocks of a transformer have features last: see `mean_linear` and `position_linear`.

    Example:
        >>> pooled_linear(torch.Size([16, 8, 8]), 10)
        Sequential(
          (0): AdaptiveAvgPool2d(output_size=(2, 2))
          (1): Flatten(start_dim=1, end_dim=-1)
          (2): Linear(in_features=64, out_features=10, bias=True)
        )
    """
    layers, features = make_pooling(shape)
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def make_pooling(shape: torch.Size) -> tuple[list[nn.Module], int]:
    """Layers that average positions into at most two along each axis and flatten; a sample's features."""
    if not shape:  # a number a sample, (N,)
        return [nn.Unflatten(0, (-1, 1))], 1
    positions = tuple(shape[1:])
    layers: list[nn.Module] = []
    if len(positions) in _POOLS and max(positions) > 2:
        positions = tuple(min(2, size) for size in positions)
        layers.append(_POOLS[len(positions)](positions))
    return [*layers, nn.Flatten()], math.prod([*shape[:1], *positions])
