"""Inverse roots from the leading eigenvectors of a statistic, at a cost quadratic in its size.

- `low_rank_root`: ``(S + λI)^-p`` with the mean of the other eigenvalues in their place;
- `times_root`, `rows_times_root`: rows times such a root, or times a matrix (`plywise.roots`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plywise.roots import LinAlgError, Relative, gram_scale
from plywise.solve import mirrored

FRESH_SWEEPS = 4


@dataclass(frozen=True)
class LowRank:
    """``scale · (I + V diag(w) Vᵀ)`` for each group.

    Attributes:
        vectors: V (g, k, r), orthonormal columns.
        weights: w (g, r).
        scale: (g,).
    """

    vectors: Tensor
    weights: Tensor
    scale: Tensor


def low_rank_root(
    gram: Tensor,
    power: float,
    damping: float,
    relative: Relative,
    rank: int,
    start: Tensor | None = None,
    sweeps: int = 1,
) -> LowRank | None:
    """``(gram + λI)^-power`` with all but the ``rank`` largest eigenvalues replaced by their mean τ.

    ``V`` comes from block subspace iteration and Rayleigh-Ritz: ``sweeps + 1`` products ``gram V``, no cost
    cubic in k. ``w_i = ((λ_i + λ)/(τ + λ))^-power - 1, scale = (τ + λ)^-power``; what is below the rounding
    of the largest eigenvalue counts as that rounding, λ too. None if ``gram`` is not finite.

    Args:
        gram: (g, k, k); only its lower triangle is read.
        power: any positive number.
        damping: λ, or its ratio to what ``relative`` says.
        relative: as in `inverse_root`; "max" is relative to the largest Ritz value.
        rank: number of eigenvectors; k if that is less.
        start: the ``vectors`` of the last root, of any dtype and device. Without one, or with one that does
            not fit, seeded noise and at least four sweeps.
        sweeps: number of iterations.
    """
    if not power > 0 or rank < 1 or sweeps < 1:
        raise ValueError(f"power, rank and sweeps must be positive, not {power}, {rank}, {sweeps}")
    scale, dead = gram_scale(gram, damping, relative)
    groups, k, _ = gram.shape
    rank = min(rank, k)
    if start is None or start.shape != (groups, k, rank) or not bool(torch.isfinite(start).all()):
        noise = torch.randn(k, rank, generator=torch.Generator().manual_seed(0))
        start, sweeps = noise.expand(groups, k, rank), max(sweeps, FRESH_SWEEPS)
    matrix, column = mirrored(gram), scale.to(gram.dtype)[:, None, None]
    image = matrix @ start.to(gram) / column
    for _ in range(sweeps):
        if not bool(torch.isfinite(image.sum())):  # any bad entry of the gram spoils a row
            return None
        basis = torch.linalg.qr(image).Q  # Householder: orthonormal whatever the rank of the image
        image = matrix @ basis / column
    try:
        values, rotation = torch.linalg.eigh(basis.mT @ image)
    except LinAlgError:
        return None
    values = values.clamp_min(0)
    trace = (gram.diagonal(dim1=1, dim2=2) / column.squeeze(2)).sum(1)
    # with no tail left, τ may be anything: the smallest value makes no weight cancel a scale
    tail = ((trace - values.sum(1)) / (k - rank)).clamp_min(0) if rank < k else values[:, 0]
    if relative == "absolute":
        shift = (damping / scale).to(gram.dtype)
    else:
        shift = damping * (values[:, -1] if relative == "max" else trace / k)
    floor = torch.finfo(gram.dtype).eps * values[:, -1] + dead  # 1 for the dead: nothing but the identity
    tail = torch.maximum(tail + shift, floor)
    values = torch.maximum(values + shift.unsqueeze(1), floor.unsqueeze(1))
    weights = (values / tail.unsqueeze(1)).pow(-power) - 1
    factor = (tail * column.flatten()).pow(-power)
    return LowRank(basis @ rotation, weights, factor)


def rows_times_root(rows: Tensor, root: Tensor | LowRank, with_ones: bool) -> tuple[Tensor, Tensor | None]:
    """``[rows, 1] @ root`` for rows (n, k - 1) and one group, as its columns but the last, and its last.

    Without ``with_ones``, ``rows @ root`` and None. Neither the column of ones nor a product of odd width is
    made: both would cost as much as a tenth of the product.
    """
    if isinstance(root, LowRank):
        vectors, scale = root.vectors[0], root.scale[0]
        inputs = vectors[: rows.shape[1]]
        inner = rows @ inputs + vectors[-1] if with_ones else rows @ inputs
        inner *= root.weights[0] * scale
        product = torch.addmm(rows * scale, inner, inputs.T)
        return product, inner @ vectors[-1] + scale if with_ones else None
    if not with_ones:
        return rows @ root[0], None
    corner = root[0, -1, -1]
    product = torch.addmm(root[0, -1, :-1], rows, root[0, :-1, :-1])
    return product, rows @ root[0, :-1, -1] + corner


def times_root(x: Tensor, root: Tensor | LowRank) -> Tensor:
    """``x @ root`` for rows (g, n, k)."""
    if isinstance(root, Tensor):
        return x @ root if len(root) > 1 else (x[0] @ root[0]).unsqueeze(0)  # one product, not a batch of one
    inner = (x @ root.vectors) * root.weights.unsqueeze(1)
    return torch.baddbmm(x, inner, root.vectors.mT) * root.scale[:, None, None]
