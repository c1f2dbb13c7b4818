"""Conjugate gradients on the damped least-squares problem of a layer, ``M V = G`` with ``M = AᵀA + λI``.

The iterates are those in the space of the weights; with fewer rows than columns they are carried as
``V = AᵀY``, so that a step is one product with AAᵀ.

Along directions where M is small relative to its norm, float32 holds nothing but rounding errors. Small
problems are solved in float64 at once, which costs less than an estimate of the error. Of other problems a
few outputs are solved twice: in float32, and in float64 on a system that is moved by about as much as
rounding has moved it. How far the results are apart tells how much rounding matters. If that is too much,
all is iterated in float64, at first on the same system and, if that does not help, on a system that is made
in float64. Both are counted.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.numerics.events import FLOAT64, IDENTITY
from plywise.numerics.least_squares import TOLERANCE, find_power_of_two
from plywise.numerics.products import divide_or_zero, mirror_lower
from plywise.numerics.small_solve import is_small
from plywise.rules._least_squares import cast_update

SMALLEST, LARGEST = 1e-26, 1e30
"""Between these mean diagonals of a Gram, float32 holds all of its entries without overflow or underflow."""

OF_PRODUCT, OF_SUM = 0.2, 0.1
"""Rounding of a sum ``Σ x y`` of n products in chains of length b, in units of eps.

It is about ``OF_PRODUCT √(b/n) ‖x‖ ‖y‖ + OF_SUM √b |Σ x y|``. Measured on sums of 100 to 512,000 products:
0.12 to 0.17 where signs are random, and 0.05 to 0.44 where all signs are equal.
"""

OF_GRAM = 2.0
"""The same of a Gram's entry, as a part of the lengths of its two columns. Measured: 0.6 to 2.4."""

SAMPLE = 16
"""Outputs for which the moved system is solved: those with the largest right sides."""

AT_A_TIME = 128
"""Outputs that are iterated together, so that their vectors fit into the cache: up to half of the time."""


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

    def find_columns(self) -> Tensor:
        """Find the lengths of the columns of A, or of the rows; (g, k, 1)."""
        return self.matrix.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().unsqueeze(2)

    def to(self, dtype: torch.dtype) -> "System":
        """Return the system in a dtype."""
        return replace(
            self, matrix=self.matrix.to(dtype), right=self.right.to(dtype), shift=self.shift.to(dtype)
        )

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
        return _finish(call, _iterate(system, steps)[0], in_rows)
    # squares of what is small or large leave the range of float32
    unit = find_power_of_two(call.delta.to(dtype).reshape(1, 1, -1))
    scaled = replace(call, delta=call.delta / unit.to(call.delta.dtype))
    solution = _solve(scaled, in_rows, damping, steps, flat, dtype)
    if solution is None and dtype != torch.float64 and _is_finite(call):
        call.health.note(call.name, FLOAT64)
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
        call.health.note(call.name, IDENTITY)
        return call.gradient()
    if in_rows:
        return cast_update(call, call.gradient(call.from_delta_rows(solution)))
    return cast_update(call, call.update(solution.mT))


def _make_system(call: LinearCall, in_rows: bool, damping: float, flat: bool, dtype: torch.dtype) -> System:
    matrix = mirror_lower((call.dual_gram if in_rows else call.gram)(dtype))
    if in_rows:
        right = call.delta_rows(dtype)
    else:
        right = call.matrix(call.precise_gradient(call.delta.to(dtype))).to(dtype).mT
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
    precision: torch.dtype | None = dtype
    if dtype != torch.float64:
        noise = None if in_rows else _find_noise(call, scaled, scale.sqrt() / unit)
        rows = call.rows(dtype).double() / scale.sqrt() if in_rows else None
        precision = _find_precision(scaled, noise, rows, steps)
    if precision is None:
        return None
    if precision != dtype:
        call.health.note(call.name, FLOAT64)
    chosen = scaled.to(precision)
    parts = (chosen.right,) if flat else chosen.right.split(AT_A_TIME, 2)
    solutions = [_iterate(replace(chosen, right=part), steps)[0].to(dtype) for part in parts]
    return _multiply(torch.cat(solutions, 2), unit.double() / scale.double())


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply in float64 if float32 cannot hold a factor: Y may be out of range although ``AᵀY`` is not."""
    size = float(factor) * float(x.abs().max())
    return x * factor.to(x.dtype) if size == 0 or 1e-30 < size < 1e30 else x.double() * factor


def _iterate(system: System, steps: int) -> tuple[Tensor, Tensor]:
    """Run conjugate gradients; also bound the length of what small residuals would have added."""
    matrix, shift = system.matrix, system.shift
    residual, solution = system.right.clone(), torch.zeros_like(system.right)
    direction, direction_image = residual.clone(), matrix @ residual
    square = system.inner(direction_image if system.in_rows else residual, residual)
    eps = torch.finfo(square.dtype).eps
    # a smaller residual is rounding: divided by a small curvature it would become a step of any size
    floor = (32 * eps) ** 2 * square
    rest = torch.zeros_like(square)
    for step in range(steps):
        curved = torch.addcmul(direction_image, direction, shift)
        curvature = system.inner(direction_image if system.in_rows else direction, curved)
        alpha = divide_or_zero(square, curvature)
        rest = torch.where(curvature > 0, rest, rest.maximum(square))
        solution.addcmul_(direction, alpha)  # in place: each of these is as large as Δ
        if step == steps - 1:
            break
        residual.addcmul_(curved, -alpha)
        del curved
        image = matrix @ residual
        previous, square = square, system.inner(image if system.in_rows else residual, residual)
        is_small = square <= floor
        rest = torch.where(is_small, rest.maximum(square), rest)
        square = torch.where(is_small, 0, square)
        beta = divide_or_zero(square, previous)
        direction.mul_(beta).add_(residual)
        direction_image.mul_(beta).add_(image)
        del image
    return solution, divide_or_zero(rest.sqrt(), shift)


def _find_noise(call: LinearCall, system: System, unit: Tensor) -> Tensor:
    """Find how far rounding has moved the entries of ``AᵀΔ``, the right side."""
    squares = call.map.bias_gradient(call.delta.to(unit.dtype).square())
    lengths = squares.reshape(call.groups, 1, -1).sqrt() * unit
    rows, eps = max(call.row_count, 1), torch.finfo(unit.dtype).eps
    chain = min(call.map.longest_chain, rows)
    of_products = OF_PRODUCT * (chain / rows) ** 0.5 * system.find_columns() * lengths
    return eps * (of_products + OF_SUM * chain**0.5 * system.right.abs())


def _find_precision(
    system: System, noise: Tensor | None, rows: Tensor | None, steps: int
) -> torch.dtype | None:
    """Choose the dtype to iterate a system in that was made in float32; None if none is precise enough.

    Args:
        system: what is to be solved.
        noise: how far rounding has moved the entries of the right side; None: not at all.
        rows: A, (g, n, k), if vectors stand for ``Aᵀ`` times them.
        steps: of conjugate gradients.
    """
    # outputs do not depend on each other; after a single step, their sizes may differ by orders of magnitude
    if not system.flat and steps > 1 and system.right.shape[2] > SAMPLE:
        largest = system.right.square().sum((0, 1)).topk(SAMPLE, sorted=False).indices
        noise = None if noise is None else noise[..., largest]
        system = replace(system, right=system.right[..., largest])

    def find_lengths(x: Tensor) -> Tensor:
        total = (x if rows is None else rows.mT @ x).square()
        return total.sum((0, 1, 2) if system.flat else 1, keepdim=True).sqrt()

    other, _ = _iterate(_move(system, noise), steps)
    whole = torch.linalg.vector_norm(find_lengths(other))
    for precision in (torch.float32, torch.float64):
        solution, rest = _iterate(system.to(precision), steps)
        difference = other - solution.float()  # which is what will be used
        error = torch.linalg.vector_norm(find_lengths(difference) + rest)
        if rows is not None:  # the product with A is still to come
            error += torch.finfo(torch.float32).eps * (other * system.find_columns()).square().sum().sqrt()
        if error <= TOLERANCE / 2 * whole:  # half, since one draw may be a small one
            return precision
    return None


def _move(system: System, noise: Tensor | None) -> System:
    """Return the system in float64, moved at random by about as much as rounding has moved it in float32.

    The numbers are the same each time. It is in float64 because the iteration in float32 has errors of its
    own. The matrix stays positive, so that no direction is lost of which rounding has left nothing.
    """
    generator = torch.Generator().manual_seed(0)
    moved, eps = system.to(torch.float64), torch.finfo(system.matrix.dtype).eps
    random = torch.randn(*moved.matrix.shape[:2], 16, generator=generator).to(moved.matrix)
    moves = random * moved.find_columns()
    moved.matrix.baddbmm_(moves, moves.mT, alpha=OF_GRAM * eps / 4)  # each a sum of 16 products
    if noise is not None:
        moved.right.add_(noise * torch.randn(noise.shape, generator=generator).to(noise))
    return moved


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
