"""Orthogonal matrices near given ones, by Newton-Schulz iterations.

An iteration applies an odd polynomial to the singular values of X: with A = X Xᵀ it is X ← P X, where
P = a I + b A + c A². The same result comes from the small matrices alone: the A of the next iteration is
P A P, and the product of all P is applied to X once, at the end. This takes fewer operations if X is at least
twice as long as high, down to half of the time for 64 × 784. In float32 it rounds more: after five iterations
of ill-conditioned matrices, entries are within 1e-4, in place of 2e-6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The coefficients of the polynomial a x + b x³ + c x⁵, which is steep at zero."""
WORTH_IT = 2.0**21
"""Operations that must be saved before the small matrices are iterated, which takes more calls."""


def orthogonalize(
    matrices: Tensor,
    iterations: Sequence[Triple] = (COEFFICIENTS,) * 5,
    eps: float = 1e-7,
) -> Tensor:
    """Bring the singular values of (k, m, n) matrices near 1 by Newton-Schulz iterations; a new tensor.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([1.0, 9.0]))[None]))
        >>> bool((values > 0.65).all() and (values < 1.25).all())
        True
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps)
    # half precision would lose the small eigenvalues of A, which are squares of singular values
    is_precise = x.dtype in (torch.float32, torch.float64)
    k, m, n = x.shape
    if is_precise and count_saved(k, m, n, len(iterations)) > WORTH_IT:
        x = torch.bmm(_multiply_factors(torch.bmm(x, x.mT), iterations), x)
    else:
        for a, b, c in iterations:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def count_operations(m: int, n: int, iterations: int) -> float:
    """Operations of the iterations on a matrix of m × n, m ≤ n, if they are done on the matrix itself.

    Example:
        >>> count_operations(2, 3, iterations=1)
        64.0
    """
    return iterations * (4.0 * m * m * n + 2.0 * m**3)


def count_saved(k: int, m: int, n: int, iterations: int) -> float:
    """Operations that are saved for k matrices of m × n, m ≤ n, if the small matrices are iterated.

    Example:
        >>> count_saved(1, 256, 256, 3) < 0 < count_saved(1, 256, 784, 3)
        True
    """
    return k * (count_operations(m, n, iterations) - 4.0 * m * m * n - (8 * iterations - 6) * m**3)


def _multiply_factors(gram: Tensor, iterations: Sequence[Triple]) -> Tensor:
    """Multiply the P of all iterations, from A of the first; they commute."""
    whole = gram
    for i, (a, b, c) in enumerate(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        whole = torch.bmm(factor, whole) if i else factor
        if i + 1 < len(iterations):
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return whole
