"""Inverse roots of symmetric positive semidefinite matrices, for methods that keep a covariance.

`compute_inverse_root` computes ``(S + λI)^-p`` as a matrix, by one of four solvers.
`plywise.numerics.low_rank` computes the same from the leading eigenvectors, at a cost that is quadratic in
the size.

All solvers work on ``S / s``, where s is the power of two below the mean diagonal. Dividing by it is exact,
and no scale of S overflows on the way. They work in float64 where a small λ would make float32 lose digits.
Every call ends: with the chosen solver; with clamped eigenvalues in float64 if that solver has no good
answer; or with None if S is not finite, so that the caller can keep its last root.

What was lost when the statistic was summed is estimated (`plywise.numerics.statistic_rounding`), and counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from plywise.numerics.events import EIGENVALUES, FLOAT64, IDENTITY, NON_FINITE, ROUNDING, Note, ignore_event
from plywise.numerics.products import compute_lower_product, mirror_lower
from plywise.numerics.statistic_rounding import (
    estimate_amplification,
    estimate_amplification_by_inverse,
    estimate_entry_rounding,
)

Relative = Literal["mean", "max", "absolute"]
"""What λ is relative to: the mean of the diagonal, the largest eigenvalue, or nothing."""

Solver = Literal["auto", "cholesky", "eigh", "newton", "newton_schulz"]

NOISE = 1e-12
"""An eigenvalue below this part of the largest one is rounding, in float64 too: nothing is divided by it."""

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

LEAST_DAMPING = 4e-3
"""λ over the norm of the Gram, from which on float32 keeps the first four digits of a root.

In an eigendecomposition or a factorisation in float32, an update lost up to ``3 u ‖S‖ / λ``, relative to its
size, on normal data, their ReLU, smooth rows and offsets of up to 100 deviations, with 9 to 513 unknowns.
Float64 takes twice as long.
"""

ALLOWED_ERROR = 1e-4
"""The largest estimate of an update's relative error that is not counted."""

SCHULZ_STEPS = 10
POWER_STEPS = 10
NEWTON_STEPS = 100


def compute_inverse_root(
    gram: Tensor,
    power: float,
    damping: float,
    relative: Relative = "mean",
    solver: Solver = "auto",
    note: Note = ignore_event,
    rows: Tensor | float = math.inf,
) -> Tensor | None:
    """Compute ``(gram + λI)^-power`` for each group.

    The root of a matrix of zeros is the identity, also if λ is 0.

    Args:
        gram: matrices (g, k, k), symmetric and positive semidefinite; only their lower triangle is read.
        power: a positive number. Any for "eigh"; 1 for "cholesky"; 1/p with an integer p for "newton"; ½ for
            "newton_schulz".
        damping: λ, or its ratio to what ``relative`` names.
        relative: the "mean" diagonal or the "max" eigenvalue of each group; or "absolute".
        solver: "auto" is Cholesky for a power of 1, and eigenvalues otherwise. "newton" iterates until it
            converges. "newton_schulz" is the published iteration of AdaBK, which does *not* converge: its
            ten steps multiply the gain of the smallest eigenvalues, ``1 / √trace`` at first, by at most
            ``1.5^10``.
        note: is called with the name of each fallback, a constant of `plywise.numerics.events`.
        rows: how many rows were summed in one product for ``gram``. Longer sums are rounded more.

    Returns:
        Matrices (g, k, k) in the dtype of ``gram``, symmetric, with both triangles filled. None if ``gram``
        or its root is not finite.

    Raises:
        ValueError: the solver is unknown or cannot take the power, or the damping is negative.
    """
    solve = get_solver(solver, power)
    problem = ScaledGram.make(gram, power, damping, relative)
    if problem is None:
        note(NON_FINITE)
        return None
    if solver != "newton_schulz" and problem.needs_float64():
        problem = replace(problem, lower=problem.lower.double())
    answer = solve(problem)
    root = None if answer is None else problem.restore(answer.root, gram.dtype)
    if root is None:
        answer, event = _solve_by_clamped_eigenvalues(problem)
        root = None if answer is None else problem.restore(answer.root, gram.dtype)
        note(IDENTITY if root is None else event)
    if answer is not None and root is not None and root.dtype != torch.float64:
        errors = answer.amplification * estimate_entry_rounding(problem.lower, root.dtype, rows)
        if bool((errors > ALLOWED_ERROR).any()):
            note(ROUNDING)
    return root


class Answer(NamedTuple):
    """The root of a scaled Gram.

    Attributes:
        root: the root (g, k, k).
        amplification: the relative error of updates over that of the Gram's entries, (g,).
    """

    root: Tensor
    amplification: Tensor | float = 0.0


def get_solver(solver: Solver, power: float) -> Callable[["ScaledGram"], "Answer | None"]:
    """Return the solver of that name.

    Raises:
        ValueError: there is none, or it cannot take that power.
    """
    if not 0 < power < math.inf:
        raise ValueError(f"power must be positive and finite, not {power}")
    if solver == "cholesky" or (solver == "auto" and power == 1):
        if power != 1:
            raise ValueError(f"solver='cholesky' inverts: power must be 1, not {power}")
        return _solve_by_cholesky
    if solver in ("auto", "eigh"):
        return _solve_by_eigenvalues
    if solver == "newton":
        if abs(1 / power - round(1 / power)) > 1e-9 or power > 1:
            raise ValueError(
                f"solver='newton' takes integer roots: power must be 1, 1/2, 1/3 ..., not {power}"
            )
        return _solve_by_newton
    if solver == "newton_schulz":
        if power != 0.5:
            raise ValueError(f"solver='newton_schulz' takes square roots: power must be 0.5, not {power}")
        return _solve_by_newton_schulz
    raise ValueError(f"unknown solver {solver!r}, choose from {', '.join(get_args(Solver))}")


@dataclass(frozen=True)
class ScaledGram:
    """A Gram with a mean diagonal between 1 and 2 (together with λ, if λ is absolute).

    Attributes:
        lower: ``gram / scale`` with zeros above the diagonal; the identity for groups that are ``dead``.
        scale: powers of two (g,), in float64.
        dead: the groups (g,) where both the Gram and λ are zero.
        power: the power.
        damping: λ, or its ratio to what ``relative`` names.
        relative: what λ is relative to.
    """

    lower: Tensor
    scale: Tensor
    dead: Tensor
    power: float
    damping: float
    relative: Relative

    @classmethod
    def make(cls, gram: Tensor, power: float, damping: float, relative: Relative) -> Self | None:
        """Scale ``gram``; return None if it is not finite."""
        scale, dead = find_gram_scale(gram, damping, relative)
        lower = gram.tril().div_(scale.to(gram.dtype)[:, None, None])
        # Entries are at most the trace, about k. So the sum cannot overflow, and one bad entry shows in it.
        if not bool(torch.isfinite(lower.sum())):
            return None
        lower.diagonal(dim1=1, dim2=2).add_(dead.unsqueeze(1))
        return cls(lower, scale, dead, power, damping, relative)

    def compute_trace(self) -> Tensor:
        """Return the trace of the scaled Gram, (g,)."""
        return self.lower.diagonal(dim1=1, dim2=2).sum(1)

    def estimate_rounding(self) -> Tensor:
        """Return what λ must exceed for a solve in this dtype, (g,). It is 0 if there is no wider dtype."""
        if self.lower.dtype == torch.float64:
            return torch.zeros_like(self.compute_trace())
        return torch.finfo(self.lower.dtype).eps / 16 * self.compute_trace()

    def needs_float64(self) -> bool:
        """Tell whether float32 would lose digits because λ is small."""
        if self.lower.dtype == torch.float64 or self.lower.device.type == "mps":
            return False
        if self.relative == "max":
            return self.damping < LEAST_DAMPING
        size = 2**0.5 * torch.linalg.vector_norm(self.lower, dim=(1, 2))  # at least the norm of the Gram
        return bool((self.compute_shift(_find_largest) < LEAST_DAMPING * size).any())

    def compute_shift(self, find_largest: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``λ / scale``, (g,).

        Args:
            find_largest: computes the largest eigenvalues of matrices from their lower triangle.
        """
        if self.relative == "max":
            shift = self.damping * find_largest(self.lower)
        elif self.relative == "mean":
            shift = self.damping * self.compute_trace() / self.lower.shape[1]
        else:
            shift = (self.damping / self.scale).to(self.lower.dtype)
        return shift + self.dead  # a dead group gets 1, which is far from rounding and asks for no fallback

    def add_shift(self, shift: Tensor) -> Tensor:
        """Return a copy of ``lower`` with ``shift`` (g,) added to the diagonal."""
        lower = self.lower.clone()
        lower.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
        return lower

    def restore(self, root: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Turn the root of the scaled Gram into that of the Gram itself; None if it is not finite."""
        dtype = dtype or root.dtype
        root = root.mul_((self.scale**-self.power).to(root.dtype)[:, None, None]).to(dtype)
        if bool(self.dead.any()):
            eye = torch.eye(root.shape[1], dtype=dtype, device=root.device)
            root = torch.where(self.dead[:, None, None], eye, root)
        # The sum is finite unless an entry is not, or nearly. That is thirty times faster than to ask each.
        return root if bool(torch.isfinite(root.sum())) else None


def find_gram_scale(gram: Tensor, damping: float, relative: Relative) -> tuple[Tensor, Tensor]:
    """Find powers of two (g,) near the mean diagonal, and which groups (g,) are zero.

    The powers are in float64 for its range. They are not finite where the diagonal is not finite.

    Raises:
        ValueError: the damping is negative or ``relative`` is unknown.
    """
    if damping < 0:
        raise ValueError(f"damping must not be negative, not {damping}")
    if relative not in ("mean", "max", "absolute"):
        raise ValueError(f"unknown relative {relative!r}")
    size = gram.diagonal(dim1=1, dim2=2).double().abs().mean(1)
    return find_power_near(size + damping if relative == "absolute" else size, gram.dtype)


def find_power_near(size: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the powers of two below positive sizes (g,) in float64, 1 for zero, and which sizes are zero.

    What is below the normal numbers of ``dtype`` counts as zero.
    """
    dead = size < torch.finfo(dtype).tiny
    size = torch.where(dead, torch.ones_like(size), size)
    return torch.exp2(torch.log2(size).floor()), dead


def _solve_by_cholesky(problem: ScaledGram) -> Answer | None:
    """Invert by a Cholesky factorisation."""
    shift = problem.compute_shift(_find_largest)
    if bool((problem.estimate_rounding() > shift).any()):
        return None
    factor, info = torch.linalg.cholesky_ex(problem.add_shift(shift))
    if bool(info.any()):
        return None
    inverse = torch.cholesky_inverse(factor)
    if inverse.device.type != "cpu":  # LAPACK makes one triangle and copies it; others solve for the columns
        inverse = mirror_lower(inverse)
    if _may_divide_by_rounding(problem, shift, inverse):
        return None
    return Answer(inverse, estimate_amplification_by_inverse(inverse))


def _solve_by_eigenvalues(problem: ScaledGram) -> Answer | None:
    """Compute any root from eigenvalues."""
    try:
        values, vectors = torch.linalg.eigh(problem.lower)
    except LinAlgError:
        return None
    rounding, shift = problem.estimate_rounding(), problem.compute_shift(lambda _: values[:, -1])
    floor = torch.maximum(rounding, NOISE * values[:, -1])
    if bool(((rounding > shift) | (values[:, 0] + shift <= floor)).any()):
        return None
    return _assemble(values, values + shift.unsqueeze(1), vectors, problem.power)


def _solve_by_clamped_eigenvalues(problem: ScaledGram) -> tuple[Answer | None, str]:
    """Compute any root in float64, with eigenvalues that are at least rounding.

    Returns:
        The answer, and the event: a wider dtype was enough, or eigenvalues were clamped.
    """
    wide = replace(problem, lower=problem.lower.double())
    try:
        values, vectors = torch.linalg.eigh(wide.lower)
    except LinAlgError:
        return None, EIGENVALUES
    shift, floor = wide.compute_shift(lambda _: values[:, -1]), NOISE * values[:, -1:]
    clamped = bool((values + shift.unsqueeze(1) < floor).any()) or problem.lower.dtype == torch.float64
    damped = torch.maximum(values.clamp_min(0) + shift.unsqueeze(1), floor)
    return _assemble(values, damped, vectors, problem.power), EIGENVALUES if clamped else FLOAT64


def _assemble(values: Tensor, damped: Tensor, vectors: Tensor, power: float) -> Answer:
    """Compute ``V diag(damped^-power) Vᵀ``, symmetric to the last bit."""
    root = mirror_lower(compute_lower_product(vectors * damped.pow(-power / 2).unsqueeze(1)))
    return Answer(root, estimate_amplification(values, damped, power, torch.float32))


def _solve_by_newton(problem: ScaledGram) -> Answer | None:
    """Iterate ``T = ((p+1)I - M)/p; X ← XT; M ← TᵖM``, which takes M to I and X to A^(-1/p).

    M keeps the eigenvalues of ``z A`` in (0, (p+1)/2], where each step is safe. Below 1 they grow at first by
    at least ``(1 + 1/p)ᵖ ≥ 2``, and converge quadratically at the end.
    """
    try:
        values = torch.linalg.eigvalsh(problem.lower) if problem.power != 1 else None
        shift = problem.compute_shift(_find_largest if values is None else lambda _: values[:, -1])
    except LinAlgError:
        return None
    p = round(1 / problem.power)
    if bool((problem.estimate_rounding() > shift).any()):
        return None
    M = mirror_lower(problem.add_shift(shift))
    k, dtype = M.shape[1], M.dtype
    eye = torch.eye(k, dtype=dtype, device=M.device)
    bound = torch.minimum(M.norm(dim=(1, 2)), M.abs().sum(2).amax(1))  # both are at least the largest one
    z = ((1 + p) / 2 / bound)[:, None, None]
    X, M = z.pow(problem.power) * eye, z * M
    # Rounding leaves about √k eps in M. To stop at its square root would be enough, but for the last step.
    enough, tolerance = 4 * torch.finfo(dtype).eps * k**0.5, torch.finfo(dtype).eps ** 0.5
    residual = float("inf")
    for _ in range(NEWTON_STEPS):
        T = ((p + 1) * eye - M) / p
        X = X @ T
        M = torch.linalg.matrix_power(T, p) @ M
        M = (M + M.mT) / 2  # what is not symmetric is rounding, and would grow to a wrong root
        before, residual = residual, float((M - eye).abs().max())
        if not residual > enough or (before < tolerance and residual > before / 2):
            break
    if not residual < tolerance:
        return None
    root = (X + X.mT) / 2
    if _may_divide_by_rounding(problem, shift, root):
        return None
    if values is None:
        return Answer(root, estimate_amplification_by_inverse(root))
    damped = values.clamp_min(0) + shift.unsqueeze(1)
    return Answer(root, estimate_amplification(values, damped, problem.power, torch.float32))


def _solve_by_newton_schulz(problem: ScaledGram) -> Answer:
    """Iterate as AdaBK does: ``T = ½(3I - ZY); Y ← YT; Z ← TZ``, ten times, from ``Y = A / tr A, Z = I``."""
    lower = problem.add_shift(problem.compute_shift(_estimate_largest))
    trace = lower.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    Y, Z = mirror_lower(lower) / trace, eye.expand_as(lower)
    for _ in range(SCHULZ_STEPS):
        T = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Answer((Z + Z.mT) / 2 / trace.sqrt())


def _find_largest(lower: Tensor) -> Tensor:
    """Compute the largest eigenvalues (g,)."""
    return torch.linalg.eigvalsh(lower)[:, -1]


def _estimate_largest(lower: Tensor) -> Tensor:
    """Estimate the largest eigenvalues (g,) as AdaBK does, by ten steps of a power iteration from ones.

    The estimate is 0 where ones are orthogonal to the range of the matrix.
    """
    matrix = mirror_lower(lower)
    image = matrix @ matrix.new_ones(matrix.shape[0], matrix.shape[1], 1)
    for _ in range(POWER_STEPS):
        length = image.norm(dim=1, keepdim=True)
        image = matrix @ (image / torch.where(length > 0, length, torch.ones_like(length)))
    return image.norm(dim=(1, 2))


def _may_divide_by_rounding(problem: ScaledGram, shift: Tensor, root: Tensor) -> bool:
    """Tell whether ``root`` is so large that it may come from an eigenvalue that is rounding.

    The norm of the root is at least its largest eigenvalue, and the trace at least that of the Gram. This
    bound is coarse, so it counts only if λ itself is not safely above rounding.
    """
    trace = problem.compute_trace()
    if not bool((shift < NOISE * trace).any()):
        return False
    smallest = root.abs().sum(2).amax(1) ** (-1 / problem.power)
    return not bool((smallest > NOISE * trace).all())
