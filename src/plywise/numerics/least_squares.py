"""Solve damped least-squares problems, with a guard that estimates the error of every answer.

Every exact rule needs ``(gram + λI)⁻¹ right`` for the Gram matrix of a layer's rows. Forming a Gram squares
the condition number of the rows, so float32 is not always enough. `solve_damped` tries, in this order:

1. a Cholesky factorisation in the caller's dtype;
2. a Cholesky factorisation in float64, of a system that is built again from data in float64;
3. the eigenvalues of the float64 Gram, without those that are only rounding;
4. nothing: the answer is None, and the caller falls back to backpropagation.

An estimate of the relative error decides whether an answer is good enough, see
`plywise.numerics.error_estimate`. Every step after the first is counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plywise.numerics.damped_system import (
    BuildSystem,
    DampedSystem,
    Damping,
    as_column,
)
from plywise.numerics.error_estimate import Numbers, bound_square_error, estimate_square_errors
from plywise.numerics.events import EIGENVALUES, FLOAT64, IDENTITY, Note

__all__ = [
    "BuildSystem",
    "CentredSystem",
    "Damping",
    "find_power_of_two",
    "solve_damped",
    "solve_damped_with_bias",
]

TOLERANCE = 1e-4
"""The largest estimated relative error of an answer that is accepted."""

FAINT = 1e-20
"""Energies of rows below which products with gradients may be zero in float32 where the answer is not."""

MOST_CANCELLED = 100.0
"""How many times as large as the whole answer that without the mean may be, in float32."""

BOUNDED = 128
"""Up to this size, the estimate costs as much as the solve, and it is worth while to try a cheaper bound."""


def solve_damped(
    build_system: BuildSystem, damping: Damping, dtype: torch.dtype, note: Note, *, dual: bool = False
) -> Tensor | None:
    """Solve ``(gram + λI) X = right`` for each group.

    Two systems give the same update of a layer with rows R (n, k) and output gradients Δ (n, c), and the
    smaller one is cheaper: ``(RᵀR + λI) X = RᵀΔ``, or ``(RRᵀ + λI) Y = Δ`` with ``X = RᵀY``. Set ``dual`` for
    the second one, because the guard estimates the error of X in both cases.

    A group without any energy, where both the Gram and λ are zero, has the answer zero. Where the system is
    singular, the answer is the one of minimum norm. Rows between 1e-9 and 1e9 are solved in float32; beyond,
    use `find_power_of_two` or pay for float64.

    For rows with a column of ones, `solve_damped_with_bias` is more accurate: inputs with an offset, and wide
    layers on pixels, need float64 here and not there.

    Args:
        build_system: makes ``gram`` (g, k, k) and ``right`` (g, k, c) in a dtype; see `BuildSystem`.
        damping: λ, not negative; see `Damping`.
        dtype: the dtype to solve in, float32 or float64.
        note: is called with the name of a fallback, a constant of `plywise.numerics.events`.
        dual: whether the caller multiplies the answer by the transposed rows.

    Returns:
        The answer (g, k, c). It is in float64 if the fallback was necessary: keep it in float64 until it has
        been multiplied by the rows. None if the system is not finite.
    """

    def make(wanted: torch.dtype) -> DampedSystem:
        gram, right = build_system(wanted)
        return DampedSystem.make(gram, right, damping(gram) if callable(damping) else damping, dual)

    return _solve(make, dtype, note, 0)


@dataclass(frozen=True)
class CentredSystem:
    """The system of a layer with a bias, made from centred rows ``C = R - 1 meanᵀ`` and centred gradients.

    Attributes:
        gram: ``CᵀC`` (g, k, k), or ``CCᵀ`` (g, n, n) for a dual system, as in `BuildSystem`.
        right: ``Cᵀ`` times the centred gradients (g, k, c), or these gradients (g, n, c) for a dual system.
        mean: the mean row, (g, k).
        mean_target: the mean gradient, (g, c).
        rows: the number of rows n.
        projected: ``C mean`` (g, n), for dual systems only.
    """

    gram: Tensor
    right: Tensor
    mean: Tensor
    mean_target: Tensor
    rows: int
    projected: Tensor | None = None


def solve_damped_with_bias(
    build_system: Callable[[torch.dtype], CentredSystem],
    damping: Damping,
    dtype: torch.dtype,
    note: Note,
    *,
    dual: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Minimise ``½‖R X + 1 bᵀ - Δ‖² + λ/2 (‖X‖² + ‖b‖²)`` for each group.

    This is the problem of `solve_damped` for rows ``[R, 1]``; the bias is damped too. Here the rows are
    centred before they are multiplied, so an offset of the inputs costs no digits: the error for pixels is
    about a twentieth of that of the plain system, and rows ``10,000 + noise`` are solved in float32. It costs
    one more right-hand side. Centre the rows by `plywise.numerics.products.centre_rows`.

    Args:
        build_system: makes the system in a dtype, as in `BuildSystem`.
        damping: λ, not negative. A function gets the Gram of the centred rows.
        dtype: the dtype to solve in, float32 or float64.
        note: is called with the name of a fallback.
        dual: whether the Gram is that of a dual system, for fewer rows than columns.

    Returns:
        X (g, k, c) and b (g, c). For a dual system, Y (g, n, c) and b, with ``X = Cᵀ Y + mean bᵀ``. Both are
        in float64 if the fallback was necessary. None if the system is not finite.
    """
    last: list[tuple[CentredSystem, float | Tensor]] = []

    def make(wanted: torch.dtype) -> DampedSystem:
        system = build_system(wanted)
        gram = system.gram
        value = damping(gram) if callable(damping) else damping
        last[:] = [(system, as_column(value, gram))]
        energy = _get_mean_energy(system)
        lost = _find_lost(system.mean_target, energy)
        if not dual:
            right = torch.cat([system.right, (system.mean + lost).unsqueeze(2)], 2)
            return DampedSystem.make(gram, right, value)
        z = _get_projected(system)
        known = z + lost
        right = torch.cat([system.right, known.unsqueeze(2)], 2)
        return DampedSystem.make(gram, right, value, True, (z / energy, z))

    answer = _solve(make, dtype, note, 1)
    if answer is None:
        return None
    if dual:
        return _add_bias_to_dual(*last[0], answer[..., :-1], answer[..., -1])
    found = _add_bias(*last[0], answer[..., :-1], answer[..., -1])
    if answer.dtype != torch.float64 and _cancels(answer[..., :-1], found[0]):
        note(FLOAT64)
        return solve_damped_with_bias(build_system, damping, torch.float64, note)
    return found


def _find_lost(target: Tensor, energy: Tensor) -> Tensor:
    """Return 0; NaN, and so no answer, where the mean's square, or what it divides, leaves the range."""
    size = target.abs().amax(1, keepdim=True)
    return (0 * energy).masked_fill((size > 0) & (size < torch.finfo(size.dtype).tiny * energy), math.nan)


def _cancels(part: Tensor, whole: Tensor) -> bool:
    """Tell whether most digits of an answer are lost: the mean of the rows forbids what their noise wants."""
    norms = torch.stack(torch._foreach_norm([part, whole])).tolist()
    return norms[0] > MOST_CANCELLED * norms[1]


def _add_bias(system: CentredSystem, shift: float | Tensor, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the system with a bias, from ``x = M⁻¹ right`` and ``p = M⁻¹ mean`` with ``M = gram + λI``.

    With ``w = n / (n + λ)`` and ``r = (mean_target - xᵀ mean) / (1 + λ w meanᵀ p)``, the solution is
    ``X = x + λ w p rᵀ`` and ``b = w r``. Where X is much smaller than x, digits are lost.
    """
    weight = system.rows / (system.rows + shift)
    residual = system.mean_target - (system.mean.unsqueeze(1) @ x).squeeze(1)
    residual = residual / (1 + shift * weight * (system.mean * p).sum(1, keepdim=True))
    added = torch.baddbmm(x, (shift * weight * p).unsqueeze(2), residual.unsqueeze(1))
    return added, weight * residual


def _add_bias_to_dual(
    system: CentredSystem, shift: float | Tensor, y: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve the dual system with a bias, from ``y = M⁻¹ right`` and ``p = M⁻¹ z`` with ``z = C mean``.

    ``[R, 1] [R, 1]ᵀ = CCᵀ - z zᵀ / β + (z + β 1) (z + β 1)ᵀ / β`` with ``β = ‖mean‖² + 1``. M is the damped
    matrix of the first two terms, and 1 is an eigenvector of it. The third term has rank one.
    """
    z, energy = _get_projected(system), _get_mean_energy(system)
    n, target = system.rows, system.mean_target
    zy, zp = (z.unsqueeze(1) @ y).squeeze(1), (z * p).sum(1, keepdim=True) / energy
    total = n + shift / energy * (1 + zp)
    bias = n / energy / total * (target * (1 + zp) - zy)
    row = (n * target + shift / energy * zy) / total
    return torch.baddbmm(y, (p / energy).unsqueeze(2), row.unsqueeze(1), alpha=-1), bias


def _get_projected(system: CentredSystem) -> Tensor:
    """Return ``z = C mean``."""
    if system.projected is None:
        raise ValueError("a dual system with a bias needs `projected`")
    return system.projected


def _get_mean_energy(system: CentredSystem) -> Tensor:
    """Return ``β = ‖mean‖² + 1`` of shape (g, 1)."""
    return system.mean.square().sum(1, keepdim=True) + 1


def find_power_of_two(rows: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """Find the power of two s that brings rows to a size near 1, for data near the end of a dtype's range.

    Squares of numbers below 1e-19 or above 1e19 leave the range of float32. `solve_damped` notices that and
    solves in float64. To stay in float32, divide the rows by s before the Gram is formed, which is exact::

        s = find_power_of_two(rows, damping)                  # rows (g, n, k)
        rows = rows / s[:, None, None]
        X = solve_damped(..., damping / s / s, ...)           # the system of the divided rows
        X = X / s[:, None, None]                              # dual: rows.mT @ Y / s[:, None, None]

    Args:
        rows: the rows (g, n, k) of each group. Pass the input of a convolution as a single group.
        damping: λ, a number or a tensor (g,). It bounds s from below, so that ``λ / s / s`` is finite.

    Returns:
        Powers of two of shape (g,) in the dtype of ``rows``; 1 for groups that are zero or not finite.
    """
    size = rows.flatten(1).abs().amax(1).double()
    size = torch.maximum(size, torch.as_tensor(damping, dtype=size.dtype, device=size.device).sqrt())
    usable = torch.isfinite(size) & (size > 0)
    exponent = torch.log2(torch.where(usable, size, torch.ones_like(size))).floor()
    return torch.exp2(exponent.clamp(-126, 126)).to(rows.dtype)


def _solve(
    make_system: Callable[[torch.dtype], DampedSystem], dtype: torch.dtype, note: Note, apart: int
) -> Tensor | None:
    """Solve as `solve_damped` does, and estimate the error of the last ``apart`` columns apart."""
    system = make_system(dtype)
    if system.right.numel() == 0:
        return torch.zeros_like(system.right)
    attempt = _try(system, apart)
    if attempt.succeeds():
        return attempt.get_answer()
    failed = attempt.find_failed_groups()
    if dtype != torch.float64:
        if not bool(failed.any()):
            return attempt.get_answer()
        attempt = _try(make_system(torch.float64), apart)
    dead = attempt.system.find_dead_groups()
    if attempt.succeeds() or not bool((attempt.find_failed_groups() & ~dead).any()):
        if dtype != torch.float64 and bool((failed & ~dead).any()):
            note(FLOAT64)
        return attempt.get_answer().masked_fill(dead[:, None, None], 0)
    answer = attempt.system.solve_by_eigenvalues()
    note(IDENTITY if answer is None else EIGENVALUES)
    return answer


def _try(system: DampedSystem, apart: int) -> "_Attempt":
    """Solve ``system``; try again without the groups that have no energy, if there are any."""
    attempt = _Attempt(system, apart)
    if not attempt.succeeds() and system.replace_dead_groups():
        return _Attempt(system, apart)
    return attempt


class _Attempt:
    """A solution of a system in one dtype, with estimates of its error."""

    def __init__(self, system: DampedSystem, apart: int) -> None:
        """Solve ``system``, and estimate the error of the last ``apart`` columns apart from the others."""
        self.system = system
        self.solution = system.solve()
        columns = system.right.shape[2]
        self.parts = [(0, columns - apart), (columns - apart, columns)] if apart else [(0, columns)]
        self.square_errors: list[Numbers] = []
        if self._has_cheap_bound() and _is_small(bound_square_error(system, self.solution)):
            self.parts = []
        if self.parts:
            self.square_errors = estimate_square_errors(system, self.solution, self.parts)

    def get_answer(self) -> Tensor:
        """Return the answer (g, k, c)."""
        return self.solution.answers[..., : self.system.right.shape[2]]

    def succeeds(self) -> bool:
        """Tell whether the answers of all groups are good enough."""
        return all(_is_small(error) for error in self.square_errors)

    def find_failed_groups(self) -> Tensor:
        """Find the groups (g,) whose answer is not good enough.

        Zeros are a good answer to zeros, unless these are products of numbers so small that they have left
        the range of the dtype. If the Gram is zero, the answer is a division by λ.
        """
        system, answer = self.system, self.get_answer()
        zero = (system.right == 0) & (answer == 0)
        if answer.dtype != torch.float64:
            zero &= (system.energy + system.shift > FAINT).all(1)[:, None, None]
        smallest = torch.finfo(answer.dtype).tiny
        total = system.energy + system.shift
        divided = ((system.energy == 0) & (total > smallest) & torch.isfinite(total)).all(1)
        divided &= torch.isfinite(answer).all(2).all(1)
        failed = torch.zeros_like(divided)
        for error, (start, stop) in zip(self.square_errors, self.parts, strict=True):
            error = torch.as_tensor(error, device=answer.device)
            good = (error > 0) & (error <= TOLERANCE**2)
            failed |= ~(good | divided | zero[..., start:stop].all(2).all(1))
        return failed

    def _has_cheap_bound(self) -> bool:
        """Tell whether to look at a bound first. That waits for the device if it is a GPU."""
        if self.system.matrix.device.type != "cpu" or self.system.size > BOUNDED:
            return False
        return not self.system.dual or (self.solution.inverse is None and len(self.parts) == 1)


def _is_small(square_error: Numbers) -> bool:
    """Compare an estimate with the tolerance. NaN is not small, and 0 has left the range of the dtype."""
    if isinstance(square_error, Tensor):
        return bool(((square_error > 0) & (square_error <= TOLERANCE**2)).all())
    return 0 < square_error <= TOLERANCE**2
