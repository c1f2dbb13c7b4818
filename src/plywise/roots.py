"""Inverse roots of symmetric positive semidefinite statistics, for the rules that have a memory.

`inverse_root` makes ``(S + λI)^-p`` as a matrix, by one of four solvers; `plywise.low_rank` the same from
the leading eigenvectors, at a cost quadratic in the size.

All work on ``S / s``, s the power of two below the mean diagonal: dividing by it is exact, and no scale of
S overflows on the way. Every root ends: the chosen solver; clamped eigenvalues in float64 where that one has
no answer worth having; None where S is not finite, so that the caller can keep its last good root.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from plywise import health
from plywise.layers import lower_product
from plywise.solve import mirrored

Relative = Literal["mean", "max", "absolute"]
"""What λ is relative to: the mean of the diagonal, the largest eigenvalue, or nothing."""

Solver = Literal["auto", "cholesky", "eigh", "newton", "newton_schulz"]

NOISE = 1e-12
"""An eigenvalue below this part of the largest is rounding, in float64 too: nothing is divided by it."""

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

SCHULZ_STEPS = 10
POWER_STEPS = 10
NEWTON_STEPS = 100


def _unheard(event: str) -> None:
    """For those who do not count."""


def inverse_root(
    gram: Tensor,
    power: float,
    damping: float,
    relative: Relative = "mean",
    solver: Solver = "auto",
    note: Callable[[str], None] = _unheard,
) -> Tensor | None:
    """``(gram + λI)^-power`` for each group; None if ``gram`` (or its root) is not finite.

    A gram of zeros has the identity as its root, where λ is 0 as well.

    Args:
        gram: (g, k, k), symmetric, positive semidefinite; only its lower triangle is read.
        power: positive. Any for "eigh"; 1 for "cholesky"; 1/p, p an integer, for "newton"; ½ for
            "newton_schulz".
        damping: λ, or its ratio to what ``relative`` says.
        relative: to the "mean" diagonal or the "max" eigenvalue of each group; or "absolute".
        solver: "auto" is Cholesky for a power of 1, eigenvalues otherwise. "newton" iterates to
            convergence. "newton_schulz" is the published iteration of AdaBK, *not* converged: ten steps
            multiply the smallest eigenvalues' gain, ``1 / √trace`` at first, by ``1.5^10`` at most.
        note: called with each fallback, a constant of `plywise.health`.

    Returns:
        (g, k, k), symmetric, both triangles filled, in the dtype of ``gram``.
    """
    solve = solver_for(solver, power)
    problem = _Problem.of(gram, power, damping, relative)
    if problem is not None:
        root = solve(problem)
        if root is not None:
            root = problem.restored(root)
        if root is not None:
            return root
        root, event = _by_clamped_eigenvalues(problem)
        if root is not None:
            note(event)
            return root
    note(health.NON_FINITE if problem is None else health.IDENTITY)
    return None


def solver_for(solver: Solver, power: float) -> Callable[["_Problem"], Tensor | None]:
    """The solver of that name; ValueError if it cannot take that power."""
    if not 0 < power < math.inf:
        raise ValueError(f"power must be positive and finite, not {power}")
    if solver == "cholesky" or (solver == "auto" and power == 1):
        if power != 1:
            raise ValueError(f"solver='cholesky' inverts: power must be 1, not {power}")
        return _by_cholesky
    if solver in ("auto", "eigh"):
        return _by_eigenvalues
    if solver == "newton":
        if abs(1 / power - round(1 / power)) > 1e-9 or power > 1:
            raise ValueError(
                f"solver='newton' takes integer roots: power must be 1, 1/2, 1/3 ..., not {power}"
            )
        return _by_newton
    if solver == "newton_schulz":
        if power != 0.5:
            raise ValueError(f"solver='newton_schulz' takes square roots: power must be 0.5, not {power}")
        return _by_newton_schulz
    raise ValueError(f"unknown solver {solver!r}, choose from {', '.join(get_args(Solver))}")


@dataclass(frozen=True)
class _Problem:
    """A gram brought to a mean diagonal between 1 and 2 (with λ, where λ is absolute).

    Attributes:
        lower: ``gram / scale``, zeros above the diagonal; the identity for groups that are ``dead``.
        scale: (g,) powers of two, in float64.
        dead: (g,) where there is neither gram nor λ.
    """

    lower: Tensor
    scale: Tensor
    dead: Tensor
    power: float
    damping: float
    relative: Relative

    @classmethod
    def of(cls, gram: Tensor, power: float, damping: float, relative: Relative) -> "_Problem | None":
        """None if the gram is not finite."""
        scale, dead = gram_scale(gram, damping, relative)
        lower = gram.tril().div_(scale.to(gram.dtype)[:, None, None])
        # Entries are at most the trace, about k: the sum cannot overflow, and one bad entry spoils it.
        if not bool(torch.isfinite(lower.sum())):
            return None
        lower.diagonal(dim1=1, dim2=2).add_(dead.unsqueeze(1))
        return cls(lower, scale, dead, power, damping, relative)

    @property
    def trace(self) -> Tensor:
        return self.lower.diagonal(dim1=1, dim2=2).sum(1)

    @property
    def rounding(self) -> Tensor:
        """What λ must exceed for a solve in this dtype, as in `plywise.solve`; 0: no wider type is left."""
        if self.lower.dtype == torch.float64:
            return torch.zeros_like(self.trace)
        return torch.finfo(self.lower.dtype).eps / 16 * self.trace

    def shift(self, largest: Callable[[Tensor], Tensor]) -> Tensor:
        """λ / scale, (g,); ``largest`` makes the largest eigenvalues of a lower triangle."""
        if self.relative == "max":
            shift = self.damping * largest(self.lower)
        elif self.relative == "mean":
            shift = self.damping * self.trace / self.lower.shape[1]
        else:
            shift = (self.damping / self.scale).to(self.lower.dtype)
        return shift + self.dead  # far from rounding: what is dead asks for no fallback

    def shifted(self, shift: Tensor) -> Tensor:
        lower = self.lower.clone()
        lower.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
        return lower

    def restored(self, root: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """The root of the gram itself from that of ``gram / scale``; None if not finite."""
        dtype = dtype or root.dtype
        root = root.mul_((self.scale**-self.power).to(root.dtype)[:, None, None]).to(dtype)
        if bool(self.dead.any()):
            eye = torch.eye(root.shape[1], dtype=dtype, device=root.device)
            root = torch.where(self.dead[:, None, None], eye, root)
        # the sum is finite unless an entry is not, or nearly: thirty times faster than asking each
        return root if bool(torch.isfinite(root.sum())) else None


def gram_scale(gram: Tensor, damping: float, relative: Relative) -> tuple[Tensor, Tensor]:
    """Powers of two (g,) near the mean diagonal, and which groups are zero; in float64, for its range."""
    if damping < 0:
        raise ValueError(f"damping must not be negative, not {damping}")
    if relative not in ("mean", "max", "absolute"):
        raise ValueError(f"unknown relative {relative!r}")
    size = gram.diagonal(dim1=1, dim2=2).double().abs().mean(1)
    if relative == "absolute":
        size = size + damping
    dead = size < torch.finfo(torch.float32).tiny
    size = torch.where(dead, torch.ones_like(size), size)
    return torch.exp2(torch.log2(size).floor()), dead  # not finite where the diagonal is not


def _by_cholesky(problem: _Problem) -> Tensor | None:
    shift = problem.shift(_largest)
    if bool((problem.rounding > shift).any()):
        return None
    factor, info = torch.linalg.cholesky_ex(problem.shifted(shift))
    if bool(info.any()):
        return None
    inverse = torch.cholesky_inverse(factor)
    if inverse.device.type != "cpu":  # LAPACK makes one triangle and copies it; others solve for the columns
        inverse = mirrored(inverse)
    return None if _steep(problem, shift, inverse) else inverse


def _by_eigenvalues(problem: _Problem) -> Tensor | None:
    try:
        values, vectors = torch.linalg.eigh(problem.lower)
    except LinAlgError:
        return None
    shift = problem.shift(lambda _: values[:, -1])
    floor = torch.maximum(problem.rounding, NOISE * values[:, -1])
    if bool(((problem.rounding > shift) | (values[:, 0] + shift <= floor)).any()):
        return None
    return _assembled(values + shift.unsqueeze(1), vectors, problem.power)


def _by_clamped_eigenvalues(problem: _Problem) -> tuple[Tensor | None, str]:
    """In float64, whatever the gram came in; and what that was: a wider type, or rounding kept away."""
    dtype = problem.lower.dtype
    wide = replace(problem, lower=problem.lower.double())
    try:
        values, vectors = torch.linalg.eigh(wide.lower)
    except LinAlgError:
        return None, health.EIGENVALUES
    shift, floor = wide.shift(lambda _: values[:, -1]), NOISE * values[:, -1:]
    clamped = bool((values + shift.unsqueeze(1) < floor).any())
    values = torch.maximum(values.clamp_min(0) + shift.unsqueeze(1), floor)
    root = wide.restored(_assembled(values, vectors, problem.power), dtype)
    return root, health.EIGENVALUES if clamped or dtype == torch.float64 else health.FLOAT64


def _assembled(values: Tensor, vectors: Tensor, power: float) -> Tensor:
    """``V diag(values^-power) Vᵀ``, symmetric to the bit."""
    return mirrored(lower_product(vectors * values.pow(-power / 2).unsqueeze(1)))


def _by_newton(problem: _Problem) -> Tensor | None:
    """Coupled Newton iteration: ``T = ((p+1)I - M)/p; X ← XT; M ← TᵖM`` takes M to I, X to A^(-1/p).

    M keeps the eigenvalues of ``z A`` in (0, (p+1)/2], where each step is safe; below 1 they grow by at
    least ``(1 + 1/p)ᵖ ≥ 2`` at first and converge quadratically at last.
    """
    shift, p = problem.shift(_largest), round(1 / problem.power)
    if bool((problem.rounding > shift).any()):
        return None
    M = mirrored(problem.shifted(shift))
    k, dtype = M.shape[1], M.dtype
    eye = torch.eye(k, dtype=dtype, device=M.device)
    bound = torch.minimum(M.norm(dim=(1, 2)), M.abs().sum(2).amax(1))  # two norms above the largest one
    z = ((1 + p) / 2 / bound)[:, None, None]
    X, M = z.pow(problem.power) * eye, z * M
    # Rounding leaves about √k eps in M; to stop at its square root would do, but for the last step's gain.
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
    return None if _steep(problem, shift, root) else root


def _by_newton_schulz(problem: _Problem) -> Tensor:
    """As AdaBK published it: ``T = ½(3I - ZY); Y ← YT; Z ← TZ``, ten times, from ``Y = A / tr A, Z = I``."""
    lower = problem.shifted(problem.shift(_published_largest))
    trace = lower.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    Y, Z = mirrored(lower) / trace, eye.expand_as(lower)
    for _ in range(SCHULZ_STEPS):
        T = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return (Z + Z.mT) / 2 / trace.sqrt()


def _largest(lower: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(lower)[:, -1]


def _published_largest(lower: Tensor) -> Tensor:
    """AdaBK's power iteration: ten steps from ones. 0 where those are orthogonal to all there is."""
    matrix = mirrored(lower)
    image = matrix @ matrix.new_ones(matrix.shape[0], matrix.shape[1], 1)
    for _ in range(POWER_STEPS):
        length = image.norm(dim=1, keepdim=True)
        image = matrix @ (image / torch.where(length > 0, length, torch.ones_like(length)))
    return image.norm(dim=(1, 2))


def _steep(problem: _Problem, shift: Tensor, root: Tensor) -> bool:
    """Whether ``root`` may have divided by rounding, for all that its size says.

    The norm of the root is at least its largest eigenvalue; the trace at least that of the gram. Only where
    λ itself is not safely above rounding does that count: the bound is a coarse one.
    """
    trace = problem.trace
    if not bool((shift < NOISE * trace).any()):
        return False
    smallest = root.abs().sum(2).amax(1) ** (-1 / problem.power)
    return not bool((smallest > NOISE * trace).all())
