"""Cholesky factorisations of a size at which LAPACK is quick.

On a CPU the time of a factorisation is not a smooth function of the size. MKL factorises up to 128 unknowns
column by column. If the columns are a multiple of 64 numbers apart, they compete for the same places in the
cache. On one thread of an Intel Xeon 128 unknowns in float32 take 0.20 ms, and 129 take 0.07; 256 take 0.50,
and 257 take 0.26; 1,024 take 20, and 1,025 take 12. So a matrix of such a size gets a border with a 1 on its
diagonal, which changes nothing else.
"""

import torch
from torch import Tensor

UNBLOCKED = 128
"""Up to so many unknowns are factorised column by column."""

WORTHWHILE = 112
"""From so many unknowns on, a border up to the first blocked size costs less than it saves."""

LINE = 64
"""Columns a multiple of so many numbers apart are slow."""


def find_quick_size(size: int, device: torch.device) -> int:
    """Find the size, at least this one, at which a factorisation takes the least time."""
    if device.type != "cpu" or size < WORTHWHILE:
        return size
    if size <= UNBLOCKED:
        return UNBLOCKED + 1
    return size + (size % LINE == 0)


def factorise(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise matrices (g, k, k) like `torch.linalg.cholesky_ex`, with a border where that is quicker."""
    size = matrices.shape[-1]
    quick = find_quick_size(size, matrices.device)
    if quick == size:
        factors, failed = torch.linalg.cholesky_ex(matrices)
        return factors, failed
    bordered = torch.constant_pad_nd(matrices, [0, quick - size, 0, quick - size])
    bordered.diagonal(dim1=1, dim2=2)[:, size:] = 1
    factors, failed = torch.linalg.cholesky_ex(bordered)
    return factors[:, :size, :size], failed
