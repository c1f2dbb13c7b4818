"""Inverse roots from the leading eigenvectors of a matrix, at a cost that is quadratic in its size.

`compute_low_rank_root` computes ``(S + λI)^-p`` with the mean of the other eigenvalues in their place.
`multiply_by_root` and `multiply_rows_by_root` multiply rows by such a root, or by a matrix.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plywise.numerics.inverse_roots import LEAST_DAMPING, LinAlgError, Relative, find_gram_scale
from plywise.numerics.products import mirror_lower, multiply_lower

FIRST_SWEEPS = 4
"""The number of sweeps if there are no vectors to start from, and the largest number that is added."""

ALLOWED_GAIN = 0.1
"""How much a sweep may add to the eigenvalues, as a part of all that is left out, before another one follows.

Where the rows of the first batches exceed the rank, or the inputs have become others, a first sweep adds 0.4
to 3 of it, and another one a fifth of that; in the long run one adds 0.002 to 0.08.
"""

LEAST_LEFT = 1e-5
"""If less than this part of the trace is left out, the Gram is of fewer rows than the rank."""

OF_DENSE = 4.0
"""How much more float32 loses in an iteration than in the decomposition of a dense root."""

LARGE = 2048
"""Up to this size, to copy the lower triangle to the upper one once costs less than products without it."""


@dataclass(frozen=True)
class LowRankRoot:
    """The matrix ``scale · (I + V diag(w) Vᵀ)`` for each group.

    Attributes:
        vectors: V (g, k, r), with orthonormal columns.
        weights: w (g, r).
        scale: scale (g,).
    """

    vectors: Tensor
    weights: Tensor
    scale: Tensor


def compute_low_rank_root(
    gram: Tensor,
    power: float,
    damping: float,
    relative: Relative,
    rank: int,
    start: Tensor | None = None,
    sweeps: int = 1,
    divisor: float | Tensor = 1.0,
) -> LowRankRoot | None:
    """Compute ``(gram / divisor + λI)^-power``, its smaller eigenvalues replaced by their mean τ.

    All eigenvalues but the ``rank`` largest are replaced. The eigenvectors come from a block subspace
    iteration with a Rayleigh-Ritz step. It takes ``sweeps + 1`` products ``gram V``, a few more where the
    Gram has changed much, and nothing cubic in k. They are exact while the Gram is of fewer rows than
    ``rank``. Beyond, they follow with some delay. That and what is left out changed updates, relative to
    those of the full root, by 1.0 to 1.5 times as much as what is left out alone.

    The root has the weights
    ``wᵢ = ((λᵢ + λ)/(τ + λ))^-power - 1`` and the scale ``(τ + λ)^-power``. Values below the rounding of the
    largest eigenvalue count as that rounding, and so does λ.

    Args:
        gram: matrices (g, k, k); only their lower triangle is read.
        power: any positive number.
        damping: λ, or its ratio to what ``relative`` names.
        relative: as in `compute_inverse_root`; "max" is the largest Ritz value.
        rank: the number of eigenvectors; k if that is less.
        start: the ``vectors`` of the last root, of any dtype and device. Without them, or if their shape is
            another one, the iteration starts from seeded noise and makes at least four sweeps.
        sweeps: the least number of iterations.
        divisor: a positive number, or a tensor of one number. The matrix itself is not divided: to copy a
            large one would cost as much as a product.

    Returns:
        The root, or None if ``gram`` is not finite.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not power > 0 or rank < 1 or sweeps < 1:
        raise ValueError(f"power, rank and sweeps must be positive, not {power}, {rank}, {sweeps}")
    scale, dead = find_gram_scale(gram, damping, relative)
    k, rank = gram.shape[1], min(rank, gram.shape[1])
    pairs = find_eigenpairs(gram, scale.to(gram.dtype)[:, None, None], rank, start, sweeps)
    if pairs is None:
        return None
    trace, shift = _find_shift(gram, scale, pairs[0], damping, relative, divisor)
    if _needs_float64(pairs[0], trace, shift):
        wide = gram.double()
        pairs = find_eigenpairs(wide, scale[:, None, None], rank, pairs[1], 1)
        if pairs is None:
            return None
        trace, shift = _find_shift(wide, scale, pairs[0], damping, relative, divisor)
    values, vectors = pairs
    # If there are no other eigenvalues, τ may be anything. With the smallest value no weight cancels a scale.
    tail = ((trace - values.sum(1)) / (k - rank)).clamp_min(0) if rank < k else values[:, 0]
    # The floor of a dead group is 1, so that its root is the identity.
    floor = torch.finfo(gram.dtype).eps * values[:, -1] + dead
    tail = torch.maximum(tail + shift, floor)
    values = torch.maximum(values + shift.unsqueeze(1), floor.unsqueeze(1))
    weights = (values / tail.unsqueeze(1)).pow(-power) - 1
    factor = (tail * scale.to(gram.dtype) / divisor).pow(-power)
    return LowRankRoot(*(part.to(gram.dtype) for part in (vectors, weights, factor)))


def _find_shift(
    gram: Tensor,
    scale: Tensor,
    values: Tensor,
    damping: float,
    relative: Relative,
    divisor: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the trace of ``gram / scale`` and λ in the same units, (g,) each."""
    trace = (gram.diagonal(dim1=1, dim2=2) / scale.to(gram.dtype).unsqueeze(1)).sum(1)
    if relative == "absolute":
        return trace, (damping * divisor / scale).to(gram.dtype)
    return trace, damping * (values[:, -1] if relative == "max" else trace / gram.shape[1])


def find_eigenpairs(
    gram: Tensor, scale: Tensor, rank: int, start: Tensor | None, sweeps: int
) -> tuple[Tensor, Tensor] | None:
    """Find the largest eigenvalues (g, rank) of ``gram / scale``, and eigenvectors (g, k, rank).

    They are in ascending order. Returns None if ``gram`` is not finite. Arguments as for
    `compute_low_rank_root`.
    """
    groups, k, _ = gram.shape
    most = max(sweeps, FIRST_SWEEPS)
    if start is None or start.shape != (groups, k, rank) or not bool(torch.isfinite(start).all()):
        generator = torch.Generator().manual_seed(0)  # the same numbers, whatever torch's default dtype is
        noise = torch.randn(k, rank, generator=generator, dtype=torch.float32, device="cpu")
        start, sweeps = noise.expand(groups, k, rank), most
    multiply = partial(multiply_lower, gram) if k > LARGE else partial(torch.matmul, mirror_lower(gram))
    trace = gram.diagonal(dim1=1, dim2=2).sum(1) / scale.flatten()
    basis = start.to(gram)
    image = multiply(basis).div_(scale)
    for sweep in range(most):
        if not bool(torch.isfinite(image.sum())):  # any bad entry of the matrix shows in a row
            return None
        before = (basis * image).sum((1, 2))
        basis = torch.linalg.qr(image).Q  # by Householder: orthonormal whatever the rank of the image is
        image = multiply(basis).div_(scale)
        if sweep + 1 >= sweeps and not _gains(before, basis, image, trace):
            break
    try:
        values, rotation = torch.linalg.eigh(basis.mT @ image)
    except LinAlgError:
        return None
    return values.clamp_min(0), basis @ rotation


def _needs_float64(values: Tensor, trace: Tensor, shift: Tensor) -> bool:
    """Tell whether a root is exact but for rounding, and float32 would round it by much.

    Where eigenvalues are left out, that changes updates by more.
    """
    if values.dtype == torch.float64 or values.device.type == "mps":
        return False
    is_exact = trace - values.sum(1) < LEAST_LEFT * trace
    return bool((is_exact & (shift < OF_DENSE * LEAST_DAMPING * values[:, -1])).any())


def _gains(before: Tensor, basis: Tensor, image: Tensor, trace: Tensor) -> bool:
    """Tell whether the last sweep has added much to the sum of the eigenvalues of any group.

    Args:
        before: that sum before the sweep, (g,).
        basis: vectors (g, k, rank) after it.
        image: the matrix times these.
        trace: the sum of all eigenvalues.
    """
    after = (basis * image).sum((1, 2))
    left = torch.maximum(trace - after, LEAST_LEFT * trace)
    return bool((after - before > ALLOWED_GAIN * left).any())


def multiply_rows_by_root(
    rows: Tensor, root: Tensor | LowRankRoot, with_ones: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute ``[rows, 1] @ root`` for a single group.

    Neither the column of ones nor a product of odd width is made: both would cost a tenth of the product.

    Args:
        rows: rows (n, k - 1), or (n, k) without ``with_ones``.
        root: a root of one group, (1, k, k) or of low rank.
        with_ones: whether a column of ones follows the rows.

    Returns:
        All columns of the product but the last one, and the last one; ``rows @ root`` and None without ones.
    """
    if isinstance(root, LowRankRoot):
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


def multiply_by_root(x: Tensor, root: Tensor | LowRankRoot) -> Tensor:
    """Compute ``x @ root`` for rows (g, n, k)."""
    if isinstance(root, Tensor):
        if len(root) > 1:
            return x @ root
        return (x[0] @ root[0]).unsqueeze(0)  # one product is quicker than a batch of one
    inner = (x @ root.vectors) * root.weights.unsqueeze(1)
    return torch.baddbmm(x, inner, root.vectors.mT) * root.scale[:, None, None]


def measure_square_gain(root: Tensor | LowRankRoot) -> Tensor:
    """Compute by how much a root multiplies the squares of random rows on average, in float64 if possible.

    Args:
        root: roots (..., g, k, k), or of low rank.

    Returns:
        The gains (..., g).
    """
    if isinstance(root, LowRankRoot):
        size, rank = root.vectors.shape[-2:]
        scale, weights = _widen(root.scale), _widen(root.weights)
        return scale.square() * ((size - rank) + (1 + weights).square().sum(-1)) / size
    dtype = None if root.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(root, dim=(-2, -1), dtype=dtype).square() / root.shape[-1]


def _widen(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()
