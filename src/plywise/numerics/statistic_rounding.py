"""Estimate what an inverse root has lost because the Gram beneath it was summed in float32.

No solver brings these digits back. The model is that of `plywise.numerics.error_estimate`: entry (i, j) of
the Gram S is off by ``c u dᵢ dⱼ``, where D² is the diagonal of S and u the unit roundoff. This changes an
update ``G S^-p`` as it would change that of a gradient whose rows have the covariance S. On 300 systems (3 to
256 rows, 5 to 513 columns, offsets of up to 100 deviations) the estimate was 1 to 14 times the error.
"""

import torch
from torch import Tensor

from plywise.numerics.error_estimate import EQUAL_SIGNS, LONGEST_SUM, MIXED_SIGNS, SHORTEST_SUM

NOISE = 4.0
"""Eigenvalues of a Gram below this multiple of the dtype's precision of the largest are only rounding."""


def estimate_entry_rounding(lower: Tensor, dtype: torch.dtype, rows: Tensor | float) -> Tensor:
    """Estimate the error of a Gram's entries (g,), the same for all.

    Args:
        lower: Grams (g, k, k), zero above the diagonal.
        dtype: the dtype in which they were summed.
        rows: how many rows were summed in one product.
    """
    squares, trace = lower.square().sum((1, 2)), lower.diagonal(dim1=1, dim2=2).sum(1)
    beside = squares - lower.diagonal(dim1=1, dim2=2).square().sum(1)
    cosine = 2 * beside / trace.square()  # the mean square of that of two columns
    count = torch.as_tensor(rows, dtype=trace.dtype, device=trace.device)
    length = count.clamp(SHORTEST_SUM, LONGEST_SUM) / LONGEST_SUM
    factor = MIXED_SIGNS**2 + EQUAL_SIGNS**2 * length * cosine / (1 + 3 * cosine)
    return factor.sqrt() * (torch.finfo(dtype).eps / 2) * trace / lower.shape[1]


def estimate_amplification(values: Tensor, damped: Tensor, power: float, dtype: torch.dtype) -> Tensor:
    """Estimate the relative error of updates, (g,), over that of the Gram's entries.

    Errors of size 1 in all entries change ``S^-p`` by a matrix whose entries, in the basis of eigenvectors,
    are the divided differences of ``x^-p``. These are at most ``max(1, p) aᵢ^-p / aⱼ`` for ``aᵢ ≤ aⱼ``.
    Column i of G has the size ``√values[i]`` there.

    Args:
        values: eigenvalues of the Gram (g, k), in ascending order.
        damped: the same with λ added, positive.
        power: p.
        dtype: the dtype in which the Gram was summed.
    """
    noise = NOISE * torch.finfo(dtype).eps * values[:, -1:]
    sizes = torch.where(values > noise, values, 0.0)
    gains = damped.pow(-power)
    larger = torch.maximum(damped.unsqueeze(2), damped.unsqueeze(1))
    changes = torch.maximum(gains.unsqueeze(2), gains.unsqueeze(1)) / larger
    change = (sizes * changes.square().sum(2)).sum(1)
    return max(1.0, power) * (change / (sizes * gains.square()).sum(1)).sqrt()


def estimate_amplification_by_inverse(inverse: Tensor) -> Tensor:
    """Do as `estimate_amplification`, for a power of 1, from the inverse (g, k, k)."""
    return torch.linalg.vector_norm(inverse, dim=(1, 2))
