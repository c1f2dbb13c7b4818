"""Eigenvalues and eigenvectors of a matrix that changes slowly.

A whole decomposition costs about ten times as much as one step of orthogonal iteration. That step starts from
the last eigenvectors and is enough while the matrix changes by a few per cent from one refresh to the next.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from plywise.numerics.events import EIGENVALUES, Note, ignore_event
from plywise.numerics.inverse_roots import LinAlgError, find_power_near
from plywise.numerics.low_rank import FIRST_SWEEPS, find_eigenpairs
from plywise.numerics.products import mirror_lower, multiply_lower

RAMP = 1e-4
"""The largest of the small numbers that are added to the diagonal, relative to its mean."""

NOISE = 1e-3
"""Entries of unit vectors below this part of the dtype's rounding are set to 0. Dead inputs leave tiny
entries, which make gradients denormal, and products of denormal numbers are a hundred times slower on a CPU.
"""


def compute_eigenbasis(
    gram: Tensor,
    start: Tensor | None = None,
    note: Note = ignore_event,
    rank: int | None = None,
    count: Tensor | float = 1.0,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor] | None:
    """Compute eigenvalues, relative to their mean, and eigenvectors of each group, or the leading ones.

    Without ``start``, this is a whole decomposition, in descending order. With it, this is one step of
    orthogonal iteration: ``Q = qr(gram @ start)`` and the Rayleigh quotients ``diag(Qᵀ gram Q)``, in the
    order of ``start``. If `measure_residual` is within the tolerance, ``start`` is returned. Values below the
    rounding of the largest are 0. A group of zeros has values near 1. Numbers from 0 to `RAMP` are added
    to the diagonal, so that vectors of equal eigenvalues are distinct. The signs are those of
    ``start``; without it, the largest entry of a vector is positive. Entries far below rounding are 0.

    Args:
        gram: matrices (g, k, k), symmetric and positive semidefinite; only their lower triangle is read.
        start: orthonormal columns (g, k, r), of any dtype and device.
        note: is called with an event of `plywise.numerics.events` where a wider dtype was needed.
        rank: how many eigenvectors are wanted, r < k; None for all. The other values are their mean.
        count: what ``gram`` is divided by.
        tolerance: the largest residual with which ``start`` is kept.

    Returns:
        Values (g, k) and vectors (g, k, r); None if ``gram`` is not finite or has no decomposition.
    """
    size, diagonal = gram.shape[1], gram.diagonal(dim1=1, dim2=2) / count
    scale, dead = find_power_near(diagonal.double().abs().mean(1), gram.dtype)
    scale = scale.to(gram.dtype).unsqueeze(1)
    # equal eigenvalues (of dead inputs, of few rows) would leave the choice of their vectors to rounding
    added = torch.linspace(RAMP, 0, size, dtype=gram.dtype, device=gram.device) + dead.unsqueeze(1)
    matrix = _Shifted(gram, scale * count, added)
    if start is None:
        pair = _begin(matrix, note, rank)
    else:
        pair = _improve(matrix, start.to(gram), tolerance)
    if pair is None:
        return None
    values, vectors = pair
    if vectors is not start:
        vectors = hardshrink(vectors, NOISE * torch.finfo(vectors.dtype).eps)
    if rank is not None:
        trace = (diagonal / scale + added).sum(1, keepdim=True)
        rest = (trace - values.sum(1, keepdim=True)) / (size - rank)
        values = torch.cat([values, rest.expand(-1, size - rank)], 1)
    floor = torch.finfo(gram.dtype).eps * values.amax(1, keepdim=True)
    values = torch.where(values > floor, values, 0.0)
    return values / values.mean(1, keepdim=True), vectors


@dataclass(frozen=True)
class _Shifted:
    """``M = lower / scale + diag(added)``, often used without making M, which is slow for a large matrix.

    Attributes:
        lower: (g, k, k), of which the lower triangle counts.
        scale: (g, 1).
        added: (g, k).
    """

    lower: Tensor
    scale: Tensor
    added: Tensor

    def make(self) -> Tensor:
        """Make M."""
        matrix = mirror_lower(self.lower / self.scale.unsqueeze(2))
        matrix.diagonal(dim1=1, dim2=2).add_(self.added)
        return matrix

    def multiply(self, x: Tensor) -> Tensor:
        """Compute ``M x`` for columns (g, k, r)."""
        product = multiply_lower(self.lower, x).div_(self.scale.unsqueeze(2))
        return product.addcmul_(self.added.unsqueeze(2), x)


def _begin(shifted: _Shifted, note: Note, rank: int | None) -> tuple[Tensor, Tensor] | None:
    """Find eigenvalues and vectors where none are known."""
    matrix = shifted.make()
    if not bool(torch.isfinite(matrix.sum())):
        return None
    return _decompose(matrix, note) if rank is None else _iterate(matrix, rank)


def _improve(shifted: _Shifted, start: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Find Rayleigh quotients, and vectors by one step of orthogonal iteration, or keep those given."""
    product = shifted.multiply(start)
    values = (start * product).sum(1)
    residual = float(measure_residual(product, values).amax())  # all that the host waits for
    if not math.isfinite(residual):
        return None
    if residual <= tolerance:
        return values, start
    vectors, upper = torch.linalg.qr(product)
    signs = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(vectors)
    vectors = vectors * signs.unsqueeze(1)
    return (vectors * shifted.multiply(vectors)).sum(1), vectors


def measure_residual(product: Tensor, values: Tensor) -> Tensor:
    """Measure how far vectors V (g, k, r) are from eigenvectors of M, given ``M V`` and ``diag(Vᵀ M V)``.

    The measure is the root mean square over the vectors of ``‖M v - λ v‖ / (λ + mean λ)``, a number for each
    group; 0 is exact.
    """
    squares = (product.square().sum(1) - values.square()).clamp_min(0)
    return (squares / (values + values.mean(1, keepdim=True)).square()).mean(1).sqrt()


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
