"""Conjugate gradients on the damped least-squares problem of a layer, ``M V = G`` with ``M = AᵀA + λI``.

The iterates are those in the space of the weights; with fewer rows than columns they are carried as
``V = AᵀY``, so that a step is one product with AAᵀ.

Along directions where M is small relative to its norm, float32 holds nothing but rounding errors. Small
problems are iterated in float64 at once, which costs less than an estimate of the error. For other problems
the error is estimated from numbers of the iteration. If it is too large, the iteration is repeated in
float64, and the repetition is counted.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plywise.engine import health
from plywise.engine.call import LinearCall, Update
from plywise.numerics.least_squares import TOLERANCE, find_power_of_two
from plywise.numerics.products import divide_or_zero, mirror_lower
from plywise.numerics.small_solve import is_small
from plywise.rules._least_squares import cast_update

SMALLEST, LARGEST = 1e-26, 1e30
"""Between these mean diagonals of a Gram, float32 holds all of its entries without overflow or underflow."""

MARGIN = 2.0
"""Assumed rounding error of a Gram's entry, relative to eps times the lengths of its two columns."""


@dataclass(frozen=True)
class System:
    """The system to iterate on.

    Attributes:
        matrix: AᵀA, or AAᵀ if ``in_rows``; (g, k, k).
        right: G transposed, or the rows of Δ; (g, k, m).
        shift: λ, which broadcasts with them.
        in_rows: whether vectors stand for ``Aᵀ`` times them.
        flat: whether all of a layer's parameters are one vector, or each output has its own scalars.
    """

    matrix: Tensor
    right: Tensor
    shift: Tensor
    in_rows: bool
    flat: bool

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products; in row space ``<V, V> = <Y, AAᵀY>``, and x is the product with AAᵀ."""
        return (x * y).sum((0, 1, 2) if self.flat else 1, keepdim=True).clamp_min(0)


def conjugate_gradients(call: LinearCall, damping: float, steps: int, flat: bool = False) -> Update:
    """``steps`` of textbook conjugate gradients on ``M V = G`` from zero.

    Each output has its own scalars, or all of the layer's parameters are one vector (``flat``).
    """
    in_rows, dtype = call.row_count <= call.columns, call.dtype
    is_cheap = (
        is_small(call.row_count, call.columns, call.outputs * steps) and call.delta.device.type != "mps"
    )
    if dtype == torch.float32 and is_cheap:  # squares of its numbers are within float64's range
        system = _make_system(call, in_rows, damping, flat, torch.float64)
        return _finish(call, _iterate(system, steps), in_rows)
    # squares of what is small or large leave the range of float32
    unit = find_power_of_two(call.delta.to(dtype).reshape(1, 1, -1))
    scaled = replace(call, delta=call.delta / unit.to(call.delta.dtype))
    solution = _solve(scaled, in_rows, damping, steps, flat, dtype)
    if solution is None and dtype != torch.float64 and _is_finite(call):
        call.health.note(call.name, health.FLOAT64)
        solution = _solve(scaled, in_rows, damping, steps, flat, torch.float64)
    if solution is None:
        return _finish(call, None, in_rows)
    return _finish(call, _multiply(solution, unit.double()), in_rows)


def official_conjugate_gradients(call: LinearCall, damping: float, steps: int) -> Update:
    """The iteration of ProxProp's published code, kept so that the paper's tables can be reproduced.

    It differs from the textbook (and from the paper): the first direction is aliased with the residual,
    so that the second comes out too long by ``1 + β``; 1e-6 is added to both denominators, which is not
    small against the squared gradients of a mean loss; it stops once the worst residual is 1 % of the
    mean first one; and a convolution is one flat system, not one for each output.
    """
    flat = not (call.map.rows_are_inputs and call.groups == 1)
    in_rows = call.row_count <= call.columns
    system = _make_system(call, in_rows, damping, flat, call.dtype)
    return _finish(call, _iterate_officially(system, steps), in_rows)


def _is_finite(call: LinearCall) -> bool:
    return all(bool(torch.isfinite(x.sum(dtype=torch.float64))) for x in (call.delta, call.a))


def _finish(call: LinearCall, solution: Tensor | None, in_rows: bool) -> Update:
    if solution is None or not bool(torch.isfinite(solution).all()):
        call.health.note(call.name, health.IDENTITY)
        return call.gradient()
    if in_rows:
        return cast_update(call, call.gradient(call.from_delta_rows(solution)))
    return cast_update(call, call.update(solution.mT))


def _make_system(call: LinearCall, in_rows: bool, damping: float, flat: bool, dtype: torch.dtype) -> System:
    matrix = mirror_lower((call.dual_gram if in_rows else call.gram)(dtype))
    if in_rows:
        right = call.delta_rows(dtype)
    else:
        right = call.matrix(call.gradient(call.delta.to(dtype))).to(dtype).mT
    shift = torch.as_tensor(damping, dtype=torch.float64).to(matrix).reshape(-1, 1, 1)
    return System(matrix, right, shift, in_rows, flat)


def _solve(
    call: LinearCall, in_rows: bool, damping: float, steps: int, flat: bool, dtype: torch.dtype
) -> Tensor | None:
    """Solve in a dtype; return None if that dtype is not precise enough."""
    system = _make_system(call, in_rows, damping, flat, dtype)
    if system.right.numel() == 0:
        return torch.zeros_like(system.right)
    size = float(system.matrix.diagonal(dim1=1, dim2=2).mean())
    if dtype != torch.float64 and not SMALLEST < size < LARGEST:
        is_zero = size == 0 and not bool(call.trace(dtype=torch.float64).any())
        return torch.zeros_like(system.right) if is_zero else None
    # by powers of two, so that no square leaves the range: (M/s) V' = G/u, V = V' u/s
    scale = find_power_of_two(torch.tensor([[[max(size, damping)]]], dtype=torch.float64, device="cpu")).to(
        system.matrix
    )
    unit = find_power_of_two(system.right.reshape(1, 1, -1))
    scaled = replace(
        system,
        matrix=system.matrix / scale,
        right=system.right / unit,
        shift=system.shift / scale,
    )
    estimate = None
    if dtype != torch.float64:
        lengths = torch.linalg.vector_norm(call.delta_rows(dtype), dim=1, keepdim=True)
        estimate = _ErrorEstimate(scaled, lengths / unit * scale.sqrt())
    solution = _iterate(scaled, steps, estimate)
    if estimate is not None and not estimate.find(solution) <= TOLERANCE:
        return None
    return _multiply(solution, unit.double() / scale.double())


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply in float64 if float32 cannot hold a factor: Y may be out of range although ``AᵀY`` is not."""
    size = float(factor) * float(x.abs().max())
    return x * factor.to(x.dtype) if size == 0 or 1e-30 < size < 1e30 else x.double() * factor


def _iterate(system: System, steps: int, estimate: "_ErrorEstimate | None" = None) -> Tensor:
    """Run conjugate gradients, and estimate the relative error of the result if that is asked for."""
    matrix, shift = system.matrix, system.shift
    residual, solution = system.right.clone(), torch.zeros_like(system.right)
    direction, direction_image = residual.clone(), matrix @ residual
    square = system.inner(direction_image if system.in_rows else residual, residual)
    eps = torch.finfo(square.dtype).eps
    # a smaller residual is rounding: divided by a small curvature it would become a step of any size
    floor = (32 * eps) ** 2 * square
    for step in range(steps):
        curved = torch.addcmul(direction_image, direction, shift)
        curvature = system.inner(direction_image if system.in_rows else direction, curved)
        alpha = divide_or_zero(square, curvature)
        if estimate is not None:
            estimate.add(alpha, direction, direction_image, curved, curvature, square)
        solution.addcmul_(direction, alpha)  # in place: each of these is as large as Δ
        if step == steps - 1:
            break
        residual.addcmul_(curved, -alpha)
        del curved
        image = matrix @ residual
        previous, square = square, system.inner(image if system.in_rows else residual, residual)
        if estimate is not None:
            estimate.add_rest(square, square <= floor)
        square = torch.where(square <= floor, 0, square)
        beta = divide_or_zero(square, previous)
        direction.mul_(beta).add_(residual)
        direction_image.mul_(beta).add_(image)
        del image
    return solution


class _ErrorEstimate:
    """Estimates how far rounding has moved the result of an iteration, relative to its length.

    Entry (i, j) of M is off by about ``eps · (M_ii M_jj)^½``, in any direction. So are the curvature of
    a direction, to which the length of its step is inverse, and the residual, relative to which the next
    direction is off. Both errors are multiplied by the length of the step along that direction.

    Args:
        system: the system to iterate on.
        lengths: ‖Δ‖ of each output, (g, 1, m), in the unit of a right side that is a product of A and Δ.
    """

    def __init__(self, system: System, lengths: Tensor) -> None:
        self._system = system
        self._eps = MARGIN * torch.finfo(system.matrix.dtype).eps
        self._diagonal = system.matrix.diagonal(dim1=1, dim2=2).unsqueeze(2)
        # an error e of independent entries has the length (Σ M_ii e_i²)^½ in row space
        power = 2 if system.in_rows else 1
        noise = self._diagonal.pow(power).sum(1, keepdim=True).sqrt()
        self._noise = self._eps * (noise.max() if system.flat else noise)
        self._of_residual = self._eps * self._measure(system.right)
        if not system.in_rows:  # a product of A and Δ
            trace = self._diagonal.sum(1, keepdim=True)
            made_of = (trace * lengths.square()).sum((0, 1, 2) if system.flat else 1, keepdim=True)
            self._of_residual = self._eps * made_of.sqrt()
        self._sum = torch.zeros_like(self._of_residual)

    def _measure(self, x: Tensor) -> Tensor:
        """Lengths of vectors of independent entries."""
        return self._weigh(x) if self._system.in_rows else self._sum_squares(x).sqrt()

    def _weigh(self, x: Tensor) -> Tensor:
        return self._sum_squares(x * self._diagonal.sqrt()).sqrt()

    def _sum_squares(self, x: Tensor) -> Tensor:
        return x.square().sum((0, 1, 2) if self._system.flat else 1, keepdim=True)

    def add(
        self,
        alpha: Tensor,
        direction: Tensor,
        image: Tensor,
        curved: Tensor,
        curvature: Tensor,
        square: Tensor,
    ) -> None:
        """Add the error of a step of length ``alpha`` along ``direction``, before the step is taken."""
        weighed = self._weigh(direction)
        if self._system.in_rows:
            length, image_length = self._system.inner(image, direction).sqrt(), self._weigh(image)
        else:
            length, image_length = self._measure(direction), weighed
        of_curvature = divide_or_zero(self._eps * weighed * image_length, curvature)
        error = (of_curvature + divide_or_zero(self._of_residual, square.sqrt())).clamp_max(1.0)
        self._sum += alpha * length * error
        self.add_rest(square, (curvature <= 0) & (square > 0))
        self._of_residual += alpha * (self._measure(curved) * error + self._noise * weighed)

    def add_rest(self, square: Tensor, is_small: Tensor) -> None:
        """Add the error of taking small residuals for zero: at most the residual over λ."""
        rest = torch.where(is_small, torch.maximum(square.sqrt(), self._of_residual), 0)
        self._sum += divide_or_zero(rest, self._system.shift.expand_as(rest))

    def find(self, solution: Tensor) -> float:
        """Return the estimate for a solution."""
        if self._system.in_rows:
            size = (solution * (self._system.matrix @ solution)).sum().clamp_min(0).sqrt()
            self._sum += self._eps * self._weigh(solution)  # the product with A that is still to come
        else:
            size = torch.linalg.vector_norm(solution)
        error, whole = float(torch.linalg.vector_norm(self._sum)), float(size)
        return 0.0 if error == 0 and whole == 0 else error / whole if whole > 0 else float("inf")


def _iterate_officially(system: System, steps: int) -> Tensor:
    """Run the published iteration. Its constants are absolute: the result depends on the scale of Δ."""
    epsilon, matrix = 1e-6, system.matrix
    residual, solution = system.right.clone(), torch.zeros_like(system.right)
    direction, direction_image = residual.clone(), matrix @ residual
    square = system.inner(direction_image if system.in_rows else residual, residual)
    enough = 1e-4 * square.mean()  # the published tolerance, 1e-2, squared
    for step in range(steps):
        curved = torch.addcmul(direction_image, direction, system.shift)
        curvature = system.inner(direction_image if system.in_rows else direction, curved)
        alpha = divide_or_zero(square, curvature + epsilon)
        solution.addcmul_(direction, alpha)
        if step == steps - 1:
            break
        residual.addcmul_(curved, -alpha)
        image = matrix @ residual
        previous, square = square, system.inner(image if system.in_rows else residual, residual)
        if bool(square.max() < enough):
            break
        beta = divide_or_zero(square, previous + epsilon)
        if step == 0:  # the alias: the old direction *is* the new residual
            direction.copy_(residual)
            direction_image.copy_(image)
        direction.mul_(beta).add_(residual)
        direction_image.mul_(beta).add_(image)
    return solution
