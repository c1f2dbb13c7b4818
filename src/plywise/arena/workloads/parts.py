"""Cutting samples into training, validation and test parts that share none; the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plywise.arena.workload import Data
from plywise.data.digits import Split

SEED = 0
"""What all cuts are drawn by: a workload's samples are the same for every trial."""


def drawn(x: Tensor, y: Tensor, sizes: Sequence[int]) -> list[Split]:
    """Disjoint parts of given sizes, drawn by the fixed seed; what is left over is not used.

    Example:
        >>> parts = drawn(torch.arange(10.0), torch.arange(10), [6, 2])
        >>> [len(part.y) for part in parts], bool(torch.isin(parts[0].y, parts[1].y).any())
        ([6, 2], False)
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))[: sum(sizes)]
    return [Split(x[rows], y[rows]) for rows in order.split(list(sizes))]


def tenths(x: Tensor, y: Tensor) -> Data:
    """8, 1 and 1 tenth of the samples, drawn by the fixed seed; at least one sample in each.

    Example:
        >>> data = tenths(torch.arange(100.0), torch.arange(100))
        >>> len(data.train.y), len(data.validation.y), len(data.test.y)
        (80, 10, 10)
    """
    held = max(1, len(y) // 10)
    return Data(*drawn(x, y, [len(y) - 2 * held, held, held]))


def tenths_of_kinds(x: Tensor, y: Tensor) -> Data:
    """Like `tenths`, of kinds of samples: those with the same inputs stay in one part.

    A model that has seen a sample's inputs knows much of its target, so that twins in two parts would make
    the test easier than new samples are.

    Example:
        >>> twins = torch.arange(50.0).repeat(2).unsqueeze(1)
        >>> data = tenths_of_kinds(twins, torch.zeros(100))
        >>> len(data.train.y), bool(torch.isin(data.test.x, data.train.x).any())
        (80, False)
    """
    kinds, kind = torch.unique(x.nan_to_num(torch.finfo(x.dtype).max), dim=0, return_inverse=True)
    numbers = torch.arange(len(kinds))
    parts = vars(tenths(numbers, numbers)).values()
    chosen = [torch.isin(kind, part.y) for part in parts]
    return Data(*(Split(x[rows], y[rows]) for rows in chosen))
