"""Solve one damped system by a Cholesky factorisation, and keep what an error estimate needs.

`plywise.numerics.least_squares` decides whether the answer is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from plywise.numerics.cholesky import factorise
from plywise.numerics.products import mirror_lower

BuildSystem = Callable[[torch.dtype], tuple[Tensor, Tensor]]
"""A function that makes ``gram`` (g, k, k) and ``right`` (g, k, c) in the given dtype.

The lower triangle of ``gram`` counts; above it, zeros or the mirror image must stand. The solver adds λ to
the diagonal in place. The function is called again with float64 if the first answer is not good enough, so it
must start from the data: a float32 Gram that is cast to float64 keeps its rounding.
"""

Damping = float | Tensor | Callable[[Tensor], float | Tensor]
"""λ: a number, a tensor (g,) with a number for each group, or a function that makes either from ``gram``.

Pass the function where λ is relative to the energy of the rows. It is called with the float64 Gram too, so an
energy beyond the range of float32 does no harm.
"""

SMALL = 32
"""Up to this size, one explicit inverse is as quick as triangular solves, and a cheaper bound will do."""

FEW = 4
"""Up to this number of groups, explicit inverses of small matrices are as quick as triangular solves."""

PROBES, FEWER_PROBES = 8, 4
"""Numbers of vectors by which the norm of an inverse is estimated: for a few groups, and for more."""

NOISE = 1e-12
"""An eigenvalue below this part of the largest one is rounding, in float64 too: nothing is divided by it."""

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@dataclass(slots=True)
class Solution:
    """The answer of a damped system, and what its error estimate needs.

    Attributes:
        answers: the answer X (g, k, c), and after it the answers to the probes where no inverse was made.
            They are meaningless for groups without a Cholesky factor.
        rights: the right-hand sides of ``answers``. A probe is ``D w``, with D² the diagonal of the Gram and
            w random signs.
        failed: positive for each group (g,) without a Cholesky factor, else 0.
        inverse: ``(gram + λI)⁻¹``, (g, k, k), where it was made.
    """

    answers: Tensor
    rights: Tensor
    failed: Tensor
    inverse: Tensor | None = None


@dataclass(slots=True)
class DampedSystem:
    """``(gram + λI) X = right`` for each group.

    Attributes:
        matrix: ``gram + λI``, (g, k, k), of which the lower triangle counts.
        right: right-hand sides (g, k, c).
        diagonal: the diagonal of the Gram without λ, (g, k).
        energy: the diagonal (g, k) before something was subtracted from the Gram. Rounding is relative
            to it. Otherwise it is the same as ``diagonal``, where that is not negative.
        shift: λ, a number or a tensor (g, 1) or (1, 1).
        dual: whether the caller multiplies the answer by the transposed rows.
        norm: the norm (g,) of the Gram before something was subtracted from it; None otherwise.
    """

    matrix: Tensor
    right: Tensor
    diagonal: Tensor
    energy: Tensor
    shift: float | Tensor
    dual: bool
    norm: Tensor | None = None

    @classmethod
    def make(
        cls,
        gram: Tensor,
        right: Tensor,
        damping: float | Tensor,
        dual: bool = False,
        subtract: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Change ``gram`` to the matrix of the system, in place.

        Args:
            gram: the Gram (g, k, k).
            right: right-hand sides (g, k, c).
            damping: λ, a number or a tensor (g,), to be added to the diagonal.
            dual: whether the caller multiplies the answer by the transposed rows.
            subtract: vectors x and y (g, k) whose product ``x yᵀ`` is to be subtracted.
        """
        shift = as_column(damping, gram)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # a negative square length is rounding: of 1 / eps times as much, and more (`MIXED_SIGNS` is below 1)
        energy, norm = torch.maximum(diagonal, diagonal * (-8 / torch.finfo(gram.dtype).eps)), None
        if subtract is not None:
            norm = torch.linalg.vector_norm(gram.flatten(1), dim=1)
            gram.baddbmm_(subtract[0].unsqueeze(2), subtract[1].unsqueeze(1), alpha=-1)
        before = diagonal.clone()
        diagonal.add_(shift)
        return cls(gram, right, before, energy, shift, dual, norm)

    @property
    def size(self) -> int:
        """The number of unknowns k."""
        return self.matrix.shape[1]

    def find_dead_groups(self) -> Tensor:
        """Find the groups (g,) without any energy: both the Gram and λ are zero."""
        return (self.energy + self.shift == 0).all(1)

    def replace_dead_groups(self) -> bool:
        """Replace the matrices of dead groups by the identity, in place; return whether there are any."""
        dead = self.find_dead_groups()
        self.matrix.diagonal(dim1=1, dim2=2).add_(dead.unsqueeze(1))
        return bool(dead.any())

    def solve(self) -> Solution:
        """Solve by a Cholesky factorisation, or in closed form if there are at most two unknowns."""
        if self.size <= 2:
            inverse, failed = _invert_in_closed_form(self.matrix)
            return Solution(inverse @ self.right, self.right, failed, inverse)
        factor, failed = factorise(self.matrix)
        if self._prefers_inverse():
            try:
                inverse = torch.cholesky_inverse(factor)
            except LinAlgError:  # a zero on the diagonal of the factor
                return Solution(torch.full_like(self.right, torch.nan), self.right, failed, factor)
            return Solution(inverse @ self.right, self.right, failed, inverse)
        probes = self.energy.sqrt().unsqueeze(2) * _get_signs(self.energy)
        rights = torch.cat([self.right, probes], 2)
        return Solution(torch.cholesky_solve(rights, factor), rights, failed)

    def solve_by_eigenvalues(self) -> Tensor | None:
        """Solve without the eigenvalues that are only rounding; None if the system is not finite.

        What remains is the solution of minimum norm, where a damping does not say otherwise.
        """
        lower = self.matrix.tril(-1) + torch.diag_embed(self.diagonal)
        try:
            values, vectors = torch.linalg.eigh(mirror_lower(lower))
        except LinAlgError:
            return None
        floor = NOISE * values.amax(1, keepdim=True)
        values = values.clamp_min(0) + self.shift
        inverse_values = torch.where((values > 0) & (values >= floor), 1 / values, torch.zeros_like(values))
        answer = (vectors * inverse_values.unsqueeze(1)) @ (vectors.mT @ self.right)
        return answer if bool(torch.isfinite(answer).all()) else None

    def _prefers_inverse(self) -> bool:
        """Tell whether an explicit inverse is quicker than triangular solves.

        On a GPU it never is, since `torch.cholesky_inverse` waits for the device.
        """
        if self.matrix.device.type != "cpu":
            return False
        small = self.size <= SMALL and len(self.matrix) <= FEW and not self.dual
        return small or self.right.shape[2] > self.size


def as_column(damping: float | Tensor, like: Tensor) -> float | Tensor:
    """Return λ as a number, or as a tensor (g, 1) or (1, 1) in the dtype of ``like``."""
    if isinstance(damping, Tensor):
        return damping.to(like).reshape(-1, 1)
    return float(damping)


_SIGNS: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def _get_signs(energy: Tensor) -> Tensor:
    """Return random signs of shape (k, probes), always the same ones for a size."""
    probes = PROBES if len(energy) <= FEW else FEWER_PROBES
    key = energy.shape[1], probes, energy.dtype, energy.device
    signs = _SIGNS.get(key)
    if signs is None:
        with torch.inference_mode(False):
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(key[0], probes, generator=generator, dtype=torch.float32, device="cpu")
            signs = torch.where(noise < 0.5, -1.0, 1.0).to(energy.device, energy.dtype)
        if len(_SIGNS) >= 256:
            _SIGNS.clear()
        if type(signs) is Tensor:  # not one of a tracer
            _SIGNS[key] = signs
    return signs


def _invert_in_closed_form(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Invert matrices (g, k, k) with k = 1 or 2, many at once: LAPACK takes them one after another.

    Returns:
        The inverses, and a number for each group that is positive where the matrix is not positive definite.
    """
    first = matrix[:, 0, 0]
    if matrix.shape[1] == 1:
        return (1 / matrix), ~(first > 0)
    ratio = matrix[:, 1, 0] / first
    pivot = matrix[:, 1, 1] - ratio * matrix[:, 1, 0]
    last = 1 / pivot
    side = -ratio * last
    inverse = torch.stack([1 / first - ratio * side, side, side, last], 1).view(-1, 2, 2)
    return inverse, ~((first > 0) & (pivot > 0))
