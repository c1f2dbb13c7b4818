"""Solvers of the local least-squares problem of a layer, from exact and expensive to approximate and cheap.

All answer ``argmin_D ½‖[A,1] Dᵀ - Δ‖² + λ/2 ‖D‖² = G (AᵀA + λI)⁻¹`` or an approximation of it:

- `ridge`: exactly, by Cholesky, in the space of inputs (AᵀA) or of rows (AAᵀ), whichever is smaller;
- `ridge_centred`: the same with the bias solved apart, by centring rows and targets;
- by conjugate gradients, see `plywise.rules._conjugate_gradients`;
- `normalised`: AAᵀ replaced by its diagonal (NLMS);
- `mean_square`: AᵀA replaced by its mean eigenvalue.

The key to speed is ``(AᵀA + λI)⁻¹Aᵀ = Aᵀ(AAᵀ + λI)⁻¹``. With fewer rows than columns, the solve only replaces
Δ by another matrix Δ', and the product ``Δ'ᵀA`` is the one that backpropagation computes anyway.

Every solve ends, see `plywise.numerics.least_squares`; each fallback is counted in the layer's `Health`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.engine.finite import is_precise
from plywise.numerics.events import FLOAT64, IDENTITY
from plywise.numerics.least_squares import (
    CentredSystem,
    find_power_of_two,
    solve_damped,
    solve_damped_with_bias,
)
from plywise.numerics.products import centre_rows, compute_lower_product, divide_or_zero
from plywise.numerics.small_solve import SmallProblem, is_small, solve_small

Damping = float | Tensor | Callable[[Tensor], Tensor]
"""λ: a number, a tensor (g,) with one number for each group, or a function that computes it from the Gram."""

Centred = Callable[[torch.dtype], tuple[Tensor, Tensor]]
"""A function that returns the rows of a call without their mean, and the mean, in a given dtype."""


LARGEST_OFFSET = {torch.float32: 1e4, torch.float64: 1e20}
"""The energy of a column's mean over that of the centred column, above which a product loses the latter."""

SMALL_OFFSET = 10.0
"""The same, up to which a convolution's gradient is computed without centring: 4e-5 off at most."""

MOST_CANCELLED = 20.0
"""How many times as large as an update what its bias is the difference of may be, in float32."""

MOST_ROUNDED = 2e-5
"""The largest relative error of an update that the rounding of Y to float32 may make."""

ORDINARY = 1e-16, 1e16
"""Energies of rows between which a row's δ over its squared norm stays in the range of float32."""


@dataclass(frozen=True)
class RelativeDamping:
    """``eps`` times the mean non-zero eigenvalue of ``[A,1]ᵀ[A,1]``, in the dtype of the Gram at hand."""

    call: LinearCall
    eps: float

    @property
    def size(self) -> int:
        """The number of non-zero eigenvalues."""
        return max(min(self.call.row_count, self.call.columns), 1)

    def __call__(self, gram: Tensor) -> Tensor:
        """λ of each group."""
        return self.eps * self.call.trace(dtype=gram.dtype) / self.size


def ridge(call: LinearCall, damping: Damping) -> Update:
    """``G (AᵀA + λI)⁻¹`` exactly, the bias being a column of ones in A."""
    if call.map.diagonal:
        return _divide_columns(call, damping)
    small = _solve_small(call, damping)
    if small is not None:
        return small
    dual, note = call.row_count <= call.columns, partial(call.health.note, call.name)
    if call.has_bias:
        rows = cache(partial(_centre_rows, call))
        build = partial(_build_dual_with_bias, call, rows) if dual else partial(_build_with_bias, call)
        solved = solve_damped_with_bias(build, damping, _choose_dtype(call), note, dual=dual)
        if solved is None:
            return call.gradient()
        update = _expand_with_bias(call, rows, *solved) if dual else _join(call, *solved)
        if dual and solved[0].dtype != torch.float64 and _is_lost(call, update, *rows(call.dtype)):
            note(FLOAT64)
            solved = solve_damped_with_bias(build, damping, torch.float64, note, dual=True)
            update = call.gradient() if solved is None else _expand_with_bias(call, rows, *solved)
        return cast_update(call, update)
    answer = solve_damped(partial(_build, call, dual), damping, call.dtype, note, dual=dual)
    if answer is None:
        return call.gradient()
    update = call.gradient(call.from_delta_rows(answer)) if dual else call.update(answer.mT)
    return cast_update(call, update)


def _solve_small(call: LinearCall, damping: Damping) -> Update | None:
    """Solve `ridge` for a small call whose rows are its inputs; λ is a number or relative to their energy."""
    relative = isinstance(damping, RelativeDamping)
    fits = call.map.rows_are_inputs and call.groups == 1 and (relative or isinstance(damping, float | int))
    if not fits or not is_small(call.row_count, call.columns, call.outputs):
        return None
    dtype, delta = call.dtype, call.delta
    if delta.device.type == "mps":  # it has no float64
        return None
    rows, target = call.cast_input(dtype), delta.to(dtype)
    if delta.dim() != 2:
        rows, target = rows.reshape(-1, rows.shape[-1]), target.reshape(-1, target.shape[-1])
    value = damping.eps / damping.size if isinstance(damping, RelativeDamping) else damping
    answer = solve_small(SmallProblem(rows, target, call.has_bias, value, relative))  # type: ignore[arg-type]
    if answer is None:
        return None
    weight, shape = answer.weight, call.weight.shape
    return cast_update(call, Update(weight if weight.shape == shape else weight.view(shape), answer.bias))


def _divide_columns(call: LinearCall, damping: Damping) -> Update:
    """`ridge` where ``AᵀA`` is diagonal: an embedding's counts."""
    gradient = call.weight_gradient(call.delta).to(call.dtype)
    counts = call.map.gram_diagonal(call.a, gradient)
    shift = damping(counts) if callable(damping) else damping
    total = counts + torch.as_tensor(shift).to(gradient).reshape(-1, 1)
    return cast_update(call, Update(divide_or_zero(gradient, total.expand_as(gradient)), None))


def _build(call: LinearCall, dual: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the system without a bias, in a dtype."""
    if dual:
        return call.dual_gram(dtype), call.delta_rows(dtype)
    return call.gram(dtype), call.matrix(call.precise_gradient(call.delta.to(dtype))).mT


def _centre_delta(call: LinearCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of Δ without their mean, and the mean."""
    return centre_rows(call.delta_rows(dtype))


def _centre_rows(call: LinearCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of A without their mean, and the mean."""
    return centre_rows(call.map.rows(call.cast_input(dtype)).to(dtype))


def _choose_dtype(call: LinearCall) -> torch.dtype:
    """Return the dtype in which a centred problem is solved first.

    It is float64, and counted, where the rows are rounded as they are made, by more than their spread allows.
    """
    dtype = call.dtype
    if not call.map.rounds_rows or dtype == torch.float64 or call.delta.device.type == "mps":
        return dtype
    rows, mean = _centre_rows(call, dtype)
    spread = LARGEST_OFFSET[dtype] * rows.square().sum(1)
    if bool((call.row_count * mean.square() > spread).any()):
        call.health.note(call.name, FLOAT64)
        return torch.float64
    return dtype


def _build_centred(call: LinearCall, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``CᵀC``, ``CᵀΔ`` of centred rows C and gradients, and both means."""
    if call.map.rows_are_inputs:
        return _multiply_out(call, dtype)
    delta, mean_delta = call.map.centre_delta(call.delta.to(dtype))
    a = call.cast_input(dtype)
    gram, mean = call.map.centred_gram(a)
    # the columns of Δ sum to zero, so that the mean of the rows drops out of the product
    offset, spread = call.row_count * mean.square(), gram.diagonal(dim1=1, dim2=2)
    if dtype == torch.float64 and bool((offset > LARGEST_OFFSET[dtype] * spread).any()):
        return _multiply_out(call, dtype)
    has_offset = bool((offset > SMALL_OFFSET * spread).any())
    find = call.map.centred_weight_gradient if has_offset else call.map.precise_weight_gradient
    gradient = find(a, delta, call.weight).to(dtype)
    return gram.to(dtype), call.matrix(Update(gradient, None)).mT, mean.to(dtype), mean_delta


def _multiply_out(call: LinearCall, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do as `_build_centred`, from the rows themselves."""
    delta, mean_delta = _centre_delta(call, dtype)
    rows, mean = _centre_rows(call, dtype)
    return compute_lower_product(rows.mT), rows.mT @ delta, mean, mean_delta


def _build_with_bias(call: LinearCall, dtype: torch.dtype) -> CentredSystem:
    gram, right, mean, mean_delta = _build_centred(call, dtype)
    return CentredSystem(gram, right, mean, mean_delta, call.row_count)


def _build_dual_with_bias(call: LinearCall, centred: Centred, dtype: torch.dtype) -> CentredSystem:
    delta, mean_delta = _centre_delta(call, dtype)
    rows, mean = centred(dtype)
    projected = (rows @ mean.unsqueeze(2)).squeeze(2)
    return CentredSystem(compute_lower_product(rows), delta, mean, mean_delta, call.row_count, projected)


def _join(call: LinearCall, x: Tensor, bias: Tensor) -> Update:
    return Update(x.mT.reshape(call.weight.shape), bias.reshape(-1))


def _expand_with_bias(call: LinearCall, centred: Centred, y: Tensor, bias: Tensor) -> Update:
    """``X = CᵀY + mean bᵀ`` of a dual solution: in float32, where to round Y changes X little."""
    if y.dtype != call.dtype and not call.map.rounds_rows:
        narrow = y.to(call.dtype)
        update = _expand_with_bias(call, centred, narrow, bias.to(call.dtype))
        rows, mean = centred(call.dtype)
        sizes = torch.stack(torch._foreach_norm([rows, narrow, call.matrix(update)])).tolist()
        error = sizes[0] * sizes[1] * torch.finfo(call.dtype).eps / 2
        fits = all(map(is_precise, sizes)) and error <= MOST_ROUNDED * sizes[2]
        if fits and not _is_lost(call, update, rows, mean):
            return update
    x = _multiply_centred(call, centred, y)
    mean = centred(y.dtype)[1] if call.map.rows_are_inputs else call.mean_row(y.dtype)
    matrix = x.reshape(call.groups, call.outputs, -1).baddbmm_(bias.unsqueeze(2), mean.unsqueeze(1))
    return Update(matrix.reshape(x.shape), bias.reshape(-1))


def _is_lost(call: LinearCall, update: Update, centred: Tensor, mean: Tensor) -> bool:
    """Whether ``X = CᵀY + mean bᵀ`` has lost most digits, since its two parts cancel: as `_is_difference`."""
    of_rows, of_mean = torch.stack(torch._foreach_norm([centred, mean])).tolist()
    if of_rows * of_rows * LARGEST_OFFSET[torch.float32] > call.row_count * of_mean * of_mean:
        return False
    whole = call.matrix(update)
    return of_mean * float(whole[:, :, -1].norm()) > MOST_CANCELLED * float(whole.norm())


def _multiply_centred(call: LinearCall, centred: Centred, y: Tensor) -> Tensor:
    """``YᵀC`` in the shape of the weight, C the centred rows; a tensor of its own."""
    return (y.mT @ centred(y.dtype)[0]).reshape(call.weight.shape)


def ridge_centred(call: LinearCall, relative: float) -> Update:
    """`ridge` on centred rows and targets, then the bias: ``b = mean(Δ) - D mean(A)``.

    The damping is ``relative · ‖A - mean‖²_F / min(n, d)`` and never touches the bias, which keeps the update
    covariant under rescaled inputs. Of constant rows, centring leaves rounding errors of size ``eps · ‖A‖``.
    The square of this size is the smallest damping, so that rounding errors do not become a step.
    """
    matrix = _solve_centred(call, relative, _choose_dtype(call))
    bias = None if matrix is None else _find_bias(call, matrix)
    if matrix is not None and matrix.dtype != torch.float64 and bias is None:
        call.health.note(call.name, FLOAT64)
        matrix = _solve_centred(call, relative, torch.float64)
        bias = None if matrix is None else _find_bias(call, matrix)
    if matrix is None or bias is None:
        return call.gradient()
    return cast_update(call, Update(matrix.reshape(call.weight.shape), bias.reshape(-1)))


def _find_bias(call: LinearCall, matrix: Tensor) -> Tensor | None:
    """``mean(Δ) - D mean(A)``; None where float32 has lost most of its digits."""
    mean, mean_delta = call.mean_row(matrix.dtype), call.delta_rows(matrix.dtype).mean(1)
    bias = mean_delta - (matrix @ mean.unsqueeze(2)).squeeze(2)
    return None if matrix.dtype != torch.float64 and _is_difference(bias, matrix, mean) else bias


def _is_difference(bias: Tensor, matrix: Tensor, mean: Tensor) -> bool:
    """Return whether ``mean(Δ) - D mean(A)`` has lost most digits, and is not a small part of the update."""
    of_bias, of_matrix, of_mean = torch.stack(torch._foreach_norm([bias, matrix, mean])).tolist()
    return of_matrix * of_mean > MOST_CANCELLED * math.hypot(of_bias, of_matrix)


def _solve_centred(call: LinearCall, relative: float, dtype: torch.dtype) -> Tensor | None:
    """Return the weights' part of `ridge_centred` as a matrix (g, m, d), or None."""
    dual, size = call.row_count <= call.width, max(min(call.row_count, call.width), 1)
    rows = cache(partial(_centre_rows, call))

    def damping(gram: Tensor) -> Tensor:
        energy = gram.diagonal(dim1=1, dim2=2).sum(1)
        whole = call.trace(with_bias=False, dtype=gram.dtype)
        return relative * energy / size + (16 * torch.finfo(call.dtype).eps) ** 2 * whole

    def build(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dual:
            return compute_lower_product(rows(dtype)[0]), _centre_delta(call, dtype)[0]
        return _build_centred(call, dtype)[:2]

    note = partial(call.health.note, call.name)
    answer = solve_damped(build, damping, dtype, note, dual=dual)
    if answer is None:
        return None
    return call.matrix(Update(_multiply_centred(call, rows, answer), None)) if dual else answer.mT


def normalised(call: LinearCall, relative: float) -> Update:
    """Each row's δ divided by its own ``‖a_i‖² + ε``, ε relative to the mean squared norm (NLMS)."""
    norms = call.square_norms()
    total = float(norms.sum())
    if norms.numel() and call.a.is_floating_point() and not ORDINARY[0] < total < ORDINARY[1]:
        return _normalise_scaled(call, relative)
    if call.groups == 1 and total > 0:  # and so no sum below is zero
        factors = (norms + relative * total / norms.numel()).reciprocal_()
    else:
        norms = norms + relative * norms.mean(1, keepdim=True)
        factors = divide_or_zero(torch.ones_like(norms), norms)
    return call.gradient(call.scale_rows(factors))


def _normalise_scaled(call: LinearCall, relative: float) -> Update:
    """`normalised` where the squares leave the range of the dtype: with inputs divided by a power of two."""
    a = call.cast_input(call.dtype)
    scale = find_power_of_two(a.reshape(1, 1, -1)).to(call.dtype).clamp_min(1.0 if call.has_bias else 0.0)[0]
    small = replace(call, a=a / scale, has_bias=False)
    scale = scale**call.map.degree
    norms = small.square_norms() + (scale**-2 if call.has_bias else 0)
    norms = norms + relative * norms.mean(1, keepdim=True)
    factors = divide_or_zero(torch.ones_like(norms), norms)
    scaled = small.scale_rows(factors)
    weight = small.weight_gradient(scaled) / scale
    bias = call.map.bias_gradient(scaled) / scale / scale if call.has_bias else None
    if not all(bool(torch.isfinite(part).all()) for part in (weight, bias) if part is not None):
        call.health.note(call.name, IDENTITY)  # no float32 is that large
        return call.gradient()
    return Update(weight, bias)


def mean_square(call: LinearCall, by_rank: bool = False) -> Tensor:
    """``AᵀA / samples`` as one scalar: its mean eigenvalue (mean non-zero one if ``by_rank``).

    The trace is that of A without the bias, averaged over groups.
    """
    size = min(call.row_count, call.width) if by_rank else call.width
    return call.trace(with_bias=False).mean() / (call.samples * size)


def matched_below(call: LinearCall, relative: float, steps: int = 8) -> Tensor:
    """Return ``argmin_X ‖J X - Δ‖² + ε‖X‖²``, J the layer's map: the change of the input that produces Δ.

    Closed form ``Δ W (WᵀW + εI)⁻¹`` in the smaller of inputs and outputs where A is the input itself;
    ``steps`` of conjugate gradients on the normal equations for a convolution. ε is relative to the mean
    non-zero eigenvalue of ``JᵀJ``.
    """
    if not call.map.sends_below:
        return call.delta  # autograd's own graph sends it down
    if not call.map.rows_are_inputs:
        return _matched_by_conjugate_gradients(call, relative, steps)
    weights = call.weight.reshape(call.groups, call.outputs, call.width)
    wide = call.width > call.outputs

    def damping(gram: Tensor) -> Tensor:
        energy = weights.to(gram.dtype).square().sum((1, 2))
        return relative * energy / min(call.outputs, call.width)

    def build(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight, delta = weights.to(dtype), call.delta_rows(dtype)
        if wide:
            return compute_lower_product(weight), delta.mT
        return compute_lower_product(weight.mT), (delta @ weight).mT

    note = partial(call.health.note, call.name)
    answer = solve_damped(build, damping, call.dtype, note, dual=wide)
    if answer is None:
        return call.input_gradient()
    matched = answer.mT @ weights.to(answer.dtype) if wide else answer.mT
    return matched.reshape(call.a.shape).to(call.delta.dtype)


def _matched_by_conjugate_gradients(call: LinearCall, relative: float, steps: int) -> Tensor:
    a, delta, weight = (t.to(call.dtype) for t in (call.a, call.delta, call.weight))
    mapped = call.map
    inputs, outputs = math.prod(a.shape[1:]), math.prod(delta.shape[1:])
    energy = mapped.matching_trace(a, delta, weight) * inputs / min(inputs, outputs)
    shift = relative * energy

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(list(range(1, x.dim())), keepdim=True)

    residual = mapped.input_gradient(a, delta, weight)
    solution, direction = torch.zeros_like(residual), residual
    square = inner(residual, residual)
    for _ in range(steps):
        image = mapped.apply(direction, weight)
        curved = mapped.input_gradient(a, image, weight) + shift * direction
        alpha = divide_or_zero(square, inner(direction, curved))
        solution = solution + alpha * direction
        residual = residual - alpha * curved
        previous, square = square, inner(residual, residual)
        direction = residual + divide_or_zero(square, previous) * direction
    return solution.to(call.delta.dtype)


def cast_update(call: LinearCall, update: Update) -> Update:
    """An update in the dtype of the weights (under autocast, float32); G where that dtype cannot hold it."""
    dtype = call.weight.dtype
    if all(part is None or part.dtype is dtype for part in (update.weight, update.bias)):
        return update
    parts = [None if part is None else part.to(dtype) for part in (update.weight, update.bias)]
    wider = [part for part in (update.weight, update.bias) if part is not None and part.dtype != dtype]
    if wider and not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        call.health.note(call.name, IDENTITY)
        return call.gradient()
    return Update(*parts)
