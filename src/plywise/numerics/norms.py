"""Frobenius norms that are exact to rounding, also those of large tensors.

On a CPU, torch adds up the squares of a tensor in a few chains. In float32 the sum of 16 million squares of
normal numbers is off by 1e-3, and that of equal numbers by 2e-2. Here the norms of blocks are combined, which
takes about as long.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 2**14
"""Numbers that are added up at once; the norm of this many equal numbers is off by less than 1e-5."""

BLOCK = 512
"""Numbers in a block."""


def compute_norm(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the Frobenius norm of a tensor of any shape and layout.

    Args:
        tensor: the tensor.
        dtype: of the result. Default: the tensor's.
    """
    if tensor.numel() <= LONGEST or tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=dtype)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)  # no copy, in most cases
    return compute_row_norms(tensor.permute(order).reshape(1, -1), dtype)[0]


def compute_norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Compute the norms of tensors of one dtype on one device, as `compute_norm` does."""
    if tensors[0].device.type != "cpu" or all(tensor.numel() <= LONGEST for tensor in tensors):
        return list(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    return [compute_norm(tensor, dtype) for tensor in tensors]


def compute_row_norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the norm of each row of a matrix (k, n); returns (k,)."""
    size = rows.shape[1]
    if size <= LONGEST or rows.device.type != "cpu":
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    whole = size - size % BLOCK
    norms = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, BLOCK)), dim=2, dtype=dtype)
    if whole < size:
        rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True, dtype=dtype)
        norms = torch.cat([norms, rest], 1)
    return compute_row_norms(norms)
