"""Batches of a set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from plywise.data.digits import Split


def endless_batches(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(split.y))
    while True:
        order = torch.randperm(len(split.y), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield split.x[rows], split.y[rows]
