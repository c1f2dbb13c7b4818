"""Eigenvalues and eigenvectors of a matrix that changes slowly.

A whole decomposition costs about ten times as much as one step of orthogonal iteration. That step starts from
the last eigenvectors and is enough while the matrix changes by a few per cent from one refresh to the next.
"""

import torch
from torch import Tensor

from plywise.numerics.events import EIGENVALUES, Note, ignore_event
from plywise.numerics.inverse_roots import LinAlgError, find_gram_scale
from plywise.numerics.low_rank import FIRST_SWEEPS, find_eigenpairs
from plywise.numerics.products import mirror_lower

RAMP = 1e-3
"""The largest of the small numbers that are added to the diagonal, relative to its mean."""


def compute_eigenbasis(
    gram: Tensor, start: Tensor | None = None, note: Note = ignore_event, rank: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Compute eigenvalues, relative to their mean, and eigenvectors of each group, or the leading ones.

    Without ``start``, by a whole decomposition, in descending order. With it, by one step of orthogonal
    iteration: ``Q = qr(gram @ start)`` and the Rayleigh quotients ``diag(Qᵀ gram Q)``, in the order of
    ``start``. Values below the rounding of the largest are 0. A group of zeros has values near 1. Numbers
    from 0 to a thousandth are added to the diagonal, so that vectors of equal eigenvalues are distinct. The
    signs are those of ``start``; without it, the largest entry of a vector is positive.

    Args:
        gram: matrices (g, k, k), symmetric and positive semidefinite; only their lower triangle is read.
        start: orthonormal columns (g, k, r), of any dtype and device.
        note: is called with an event of `plywise.numerics.events` where a wider dtype was needed.
        rank: how many eigenvectors are wanted, r < k; None for all. The other values are their mean.

    Returns:
        Values (g, k) and vectors (g, k, r); None if ``gram`` is not finite or has no decomposition.
    """
    scale, dead = find_gram_scale(gram, 0.0, "mean")
    matrix = mirror_lower(gram / scale.to(gram.dtype)[:, None, None])
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.add_(dead.unsqueeze(1))
    # equal eigenvalues (of dead inputs, of few rows) would leave the choice of their vectors to rounding
    size = matrix.shape[1]
    diagonal.add_(torch.linspace(RAMP, 0, size, dtype=matrix.dtype, device=matrix.device))
    if not bool(torch.isfinite(matrix.sum())):
        return None
    if start is None:
        pair = _decompose(matrix, note) if rank is None else _iterate(matrix, rank)
        if pair is None:
            return None
        values, vectors = pair
    else:
        vectors, upper = torch.linalg.qr(matrix @ start.to(matrix))
        signs = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(matrix)
        vectors = vectors * signs.unsqueeze(1)
        values = (vectors * (matrix @ vectors)).sum(1)
    if rank is not None:
        rest = (diagonal.sum(1, keepdim=True) - values.sum(1, keepdim=True)) / (size - rank)
        values = torch.cat([values, rest.expand(-1, size - rank)], 1)
    floor = torch.finfo(matrix.dtype).eps * values.amax(1, keepdim=True)
    values = torch.where(values > floor, values, 0.0)
    return values / values.mean(1, keepdim=True), vectors


def _iterate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Find the leading eigenvalues and vectors by subspace iteration, in descending order."""
    pair = find_eigenpairs(matrix, matrix.new_ones(len(matrix), 1, 1), rank, None, FIRST_SWEEPS)
    return None if pair is None else (pair[0].flip(1), _fix_signs(pair[1].flip(2)))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make the largest entry of each vector positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)


def _decompose(matrix: Tensor, note: Note) -> tuple[Tensor, Tensor] | None:
    """Decompose in the matrix's own dtype, or in float64: dead pixels can keep float32 from converging."""
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except LinAlgError:
            note(EIGENVALUES)
            continue
        return values.to(matrix).flip(1), _fix_signs(vectors.to(matrix).flip(2))
    return None
