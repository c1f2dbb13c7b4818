"""Products of batched matrices that several methods share.

Shapes: ``g`` groups (independent problems side by side), ``k`` rows, ``w`` columns.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Rows of a Gram that are computed at a time: enough for full speed, few enough to skip half of the work."""


def compute_lower_product(rows: Tensor) -> Tensor:
    """Compute the lower triangle of ``rows @ rows.mT``.

    torch has no symmetric product (``syrk`` of BLAS). A Cholesky factorisation reads only one triangle, so
    the blocks above the diagonal are left at zero, which saves almost half of the work.

    Args:
        rows: matrices of shape (g, k, w).

    Returns:
        Matrices of shape (g, k, k). Their lower triangle is exact; above it, an entry is exact or zero.
    """
    size = rows.shape[1]
    if size <= 2 * BLOCK and rows.shape[0] > 1:  # many small groups: one batched product is faster
        return rows @ rows.mT
    gram = rows.new_zeros(rows.shape[0], size, size)
    for group, out in zip(rows, gram, strict=True):
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            torch.mm(group[start:stop], group[:stop].T, out=out[start:stop, :stop])
    return gram


def mirror_lower(lower: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one.

    Args:
        lower: matrices of shape (g, k, k). What stands above their diagonal is ignored.

    Returns:
        Symmetric matrices of shape (g, k, k).
    """
    size = lower.shape[1]
    if size <= 4 * BLOCK or lower.device.type != "cpu":
        return lower.tril() + lower.tril(-1).mT
    whole = lower.clone()  # in blocks that fit into the cache: a fifth of the time at size 3000
    for start in range(0, size, BLOCK):
        rows = slice(start, start + BLOCK)
        whole[:, rows, rows] = mirror_lower(lower[:, rows, rows])
        whole[:, :start, rows] = lower[:, rows, :start].mT
    return whole


def multiply_lower(lower: Tensor, x: Tensor) -> Tensor:
    """Compute ``S x`` for symmetric matrices S of which the lower triangle is given.

    S is not made: of a large matrix that would take longer than the product.

    Args:
        lower: matrices of shape (g, k, k). What stands above their diagonal is ignored.
        x: matrices of shape (g, k, w).

    Returns:
        Products of shape (g, k, w).
    """
    size = lower.shape[1]
    if size <= 4 * BLOCK:
        return mirror_lower(lower) @ x
    product = torch.empty_like(x)
    for start in range(0, size, BLOCK):
        rows = slice(start, start + BLOCK)
        torch.bmm(mirror_lower(lower[:, rows, rows]), x[:, rows], out=product[:, rows])
        if start:
            left = lower[:, rows, :start]
            product[:, rows].baddbmm_(left, x[:, :start])
            product[:, :start].baddbmm_(left.mT, x[:, rows])
    return product


def compute_outer_product(x: Tensor, y: Tensor) -> Tensor:
    """Compute ``x yᵀ`` for each group.

    Args:
        x: vectors of shape (g, m).
        y: vectors of shape (g, k).

    Returns:
        Matrices of shape (g, m, k).
    """
    return x.unsqueeze(2) * y.unsqueeze(1)


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, and return 0 where the denominator is not positive.

    Where there is no curvature there is no signal either, and so no step to take.

    Args:
        numerator: tensor of any shape.
        denominator: tensor of a shape that broadcasts with the numerator's.

    Returns:
        The quotient in the broadcast shape.
    """
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def centre_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean row from all rows.

    The mean is subtracted twice. The first time it is off by rounding, which is relative to the mean and not
    to what is left of the rows: for rows ``10,000 + noise``, it is a thousandth of the noise.

    Args:
        rows: rows of shape (g, n, k), with n > 0.

    Returns:
        The centred rows (g, n, k), and the mean row (g, k).
    """
    mean = rows.mean(1)
    centred = rows - mean.unsqueeze(1)
    rest = centred.mean(1)
    return centred.sub_(rest.unsqueeze(1)), mean + rest
