"""Estimate the relative error of the answer of a damped system, from norms that are cheap.

A bound such as ``eps · trace / λ`` is a hundred times too large for pixels, and a smaller factor before it
would miss real failures. This estimate treats rounding as noise instead. Let ``D²`` be the diagonal of the
Gram, P the inverse of ``gram + λI``, X the answer, and u the unit roundoff:

- Entry (i, j) of the Gram, and of its Cholesky factorisation, is off by noise of size ``c u dᵢ dⱼ``. A sum
  of equal signs rounds more than a sum of mixed signs, so c grows with the mean squared cosine ρ² of two
  columns: ``c² = c₀² + c₁² ρ² / (1 + 3 ρ²)``. An error E of the Gram changes the answer by ``P E X``.
- Row i of ``right = RᵀΔ`` is off by noise of size ``c₀ u dᵢ ‖Δ‖`` and ``c₁ u ‖rightᵢ‖ / 2``. The part of Δ
  that matters here has the squared norm ``<X, right> = ‖R X‖² + λ‖X‖²``.

So the squared error of X is about ``u² ‖P D‖² (c² ‖D X‖² + c₀² <X, right> + c₁² ‖right‖² / (4 trace))``, in
Frobenius norms. For a dual system, the error of ``Rᵀ Y`` counts and not that of the answer Y. It is measured
in a norm that has the Gram as its metric. The squared norm of ``Rᵀ Y`` is ``<Y, right> - λ‖Y‖²``.

c₀ and c₁ were measured on a CPU on 8,000 systems with 4 to 1,000 unknowns: normal data, its ReLU, pixels,
smooth images, sparse binary data, scales that differ between columns, and offsets of up to 10,000 deviations.

The estimate does not see an error that plain backpropagation has too: the rounding of ``RᵀΔ`` where its
terms cancel, for instance because the rows have an offset and the columns of Δ sum to zero.

The formulas take the numbers of one group, or tensors for many. They are evaluated in float64. What has left
the range of float32 before is infinite or NaN, and no comparison accepts it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from plywise.numerics.damped_system import DampedSystem, Solution

MIXED_SIGNS = 0.35
"""c₀: the rounding error of a sum of products of mixed signs, in units of ``u dᵢ dⱼ``."""

EQUAL_SIGNS = 13.0
"""c₁: what equal signs add, for sums of `LONGEST_SUM` terms. It grows with the root of their number."""

SHORTEST_SUM, LONGEST_SUM = 96, 512
"""The range in which rounding grows with the length of sums. Longer ones are made of blocks."""

Numbers = float | Tensor
"""A number of one group, or a tensor with a number for each group."""


def get_unit_roundoff(like: Tensor) -> float:
    """Return the unit roundoff of products of tensors such as ``like``."""
    single = like.device.type == "cuda" and like.dtype == torch.float32
    if single and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-11  # TF32
    return float(torch.finfo(like.dtype).eps) / 2


def bound_square_error(system: DampedSystem, solution: Solution) -> Numbers:
    """Bound the estimate of all columns together, by fewer operations than `estimate_square_errors` takes.

    For a system that is not dual, it also bounds the estimate of each column.

    Args:
        system: the system.
        solution: its solution.

    Returns:
        A bound. It is NaN if the answer is not finite.
    """
    if system.dual:
        return _bound_for_dual(system, solution)
    energy, inverse = system.energy, solution.inverse
    images = solution.answers[..., system.right.shape[2] :]
    size = (images * images).sum((1, 2)) / images.shape[2] if inverse is None else _compute_norm(inverse)
    columns = [energy.amax(1), energy.sum(1), size, solution.answers.sum((1, 2)), solution.failed]
    (largest, trace, norm, total, failed), shift = _get_numbers([torch.stack(columns, 1)], system)
    mixed, equal = _get_square_factors(system)
    scaled_inverse = norm if inverse is None else largest * norm * norm
    return (mixed + equal / 4) * (largest + trace + shift) * scaled_inverse + failed + 0 * total


def _bound_for_dual(system: DampedSystem, solution: Solution) -> Numbers:
    """Bound the estimate for a dual system that was solved with probes."""
    answers, rights, columns = solution.answers, solution.rights, system.right.shape[2]
    products, squares = (answers * rights).sum(1), (answers * answers).sum(1)
    metric = products[:, columns:].sum(1) / (products.shape[1] - columns)
    parts = [products[:, :columns].sum(1), squares[:, :columns].sum(1), metric]
    table = torch.stack([*parts, system.energy.amax(1), solution.failed], 1)
    (product, size, spread, largest, failed), shift = _get_numbers([table], system)
    mixed, equal = _get_square_factors(system)
    worst = mixed + equal * _get_length_factor(system) / 4
    error = largest * size * (worst * spread + mixed)
    noise = 4 * get_unit_roundoff(system.matrix) * product
    return _divide(error, _compute_absolute(product - shift * size) + noise) + failed


def estimate_square_errors(
    system: DampedSystem, solution: Solution, parts: list[tuple[int, int]]
) -> list[Numbers]:
    """Estimate the squared relative errors of parts of an answer.

    Args:
        system: the system.
        solution: its solution.
        parts: the first column of each part, and the end of its columns.

    Returns:
        An estimate for each part. It is NaN or infinite where numbers left the range of the dtype or are not
        finite, and at least 1 where there is no Cholesky factor.
    """
    matrix, measured, shift = _measure(system, solution, parts)
    estimate = _estimate_for_dual if system.dual else _estimate
    return [estimate(system, solution, matrix, part, shift) for part in measured]


class _OfMatrix(NamedTuple):
    """Squared norms that all parts share: D² is the diagonal of the Gram, and P the inverse of the matrix.

    Attributes:
        trace: ``‖D‖²``.
        energies: ``‖D²‖²``.
        inverse: ``‖P‖²``, or ``‖P D W‖²`` with signs W; not for dual systems.
        scaled_inverse: ``‖D P‖²``, where P was made.
        metric: the trace of ``D P D``, for dual systems.
        norm: the norm of the matrix, or of the Gram before something was subtracted from it.
        failed: positive if there is no Cholesky factor, else 0.
    """

    trace: Numbers
    energies: Numbers
    inverse: Numbers
    scaled_inverse: Numbers
    metric: Numbers
    norm: Numbers
    failed: Numbers


class _OfPart(NamedTuple):
    """Squared norms of a part, for X the answer and B the right-hand sides.

    Attributes:
        answer: ``‖X‖²``.
        scaled_answer: ``‖D X‖²``.
        right: ``‖B‖²``.
        product: ``<X, B>``.
    """

    answer: Numbers
    scaled_answer: Numbers
    right: Numbers
    product: Numbers


def _estimate(
    system: DampedSystem, solution: Solution, matrix: _OfMatrix, part: _OfPart, shift: Numbers
) -> Numbers:
    """Estimate the squared relative error of the answer."""
    mixed, equal = _get_square_factors(system)
    error = _weigh_signs(system, matrix, shift) * part.scaled_answer
    error = error + mixed * part.product + _divide(equal * part.right, 4 * matrix.trace)
    probes = solution.answers.shape[2] - system.right.shape[2]
    error = error * (matrix.inverse / probes if solution.inverse is None else matrix.scaled_inverse)
    return _divide(error, part.answer) + matrix.failed


def _estimate_for_dual(
    system: DampedSystem, solution: Solution, matrix: _OfMatrix, part: _OfPart, shift: Numbers
) -> Numbers:
    """Estimate the squared relative error of the transposed rows times the answer."""
    mixed, _ = _get_square_factors(system)
    error = part.scaled_answer * (_weigh_signs(system, matrix, shift) * matrix.metric + mixed)
    if solution.inverse is not None:  # the rounding of its entries, times Δ
        error = error + 16 * mixed * matrix.scaled_inverse * part.right / system.size
    noise = 4 * get_unit_roundoff(system.matrix) * part.product  # of the difference below
    return _divide(error, _compute_absolute(part.product - shift * part.answer) + noise) + matrix.failed


def _measure(
    system: DampedSystem, solution: Solution, parts: list[tuple[int, int]]
) -> tuple[_OfMatrix, list[_OfPart], Numbers]:
    """Compute all norms on the device, and return them with λ."""
    energy, inverse, columns = system.energy, solution.inverse, system.right.shape[2]
    answers = [solution.answers[..., start:stop] for start, stop in parts]
    rights = [solution.rights[..., start:stop] for start, stop in parts]
    probes, images = solution.rights[..., columns:], solution.answers[..., columns:]
    simple = system.dual and inverse is None  # nothing else is needed then
    rows = [energy, *map(_sum_squares, answers)]
    if not simple:
        rows += [*map(_sum_squares, rights), _sum_squares(images if inverse is None else inverse)]
    norm = _compute_norm(system.matrix) if system.norm is None else system.norm
    products = [norm, solution.failed]
    products += [(answer * right).sum((1, 2)) for answer, right in zip(answers, rights, strict=True)]
    if simple:
        products.append((images * probes).sum((1, 2)) / probes.shape[2])
    elif inverse is not None and system.dual:
        products.append((inverse.diagonal(dim1=1, dim2=2) * energy).sum(1))
    stacked = torch.stack(rows, 1)
    tables = [stacked.sum(2), (stacked * energy.unsqueeze(1)).sum(2), torch.stack(products, 1)]
    numbers, shift = _get_numbers(tables, system)
    count, width = len(parts), len(rows)
    totals, scaled, others = numbers[:width], numbers[width : 2 * width], numbers[2 * width :]
    targets = [0.0] * count if simple else totals[1 + count : -1]
    metric = others[-1] if system.dual else 0.0
    matrix = _OfMatrix(totals[0], scaled[0], totals[-1], scaled[-1], metric, others[0], others[1])
    separate = zip(totals[1:], scaled[1:], targets, others[2:], strict=False)
    return matrix, [_OfPart(*part) for part in separate], shift


def _get_square_factors(system: DampedSystem) -> tuple[float, float]:
    """Return ``(c₀ u)²`` and ``(c₁ u)²``."""
    unit = get_unit_roundoff(system.matrix)
    return (MIXED_SIGNS * unit) * (MIXED_SIGNS * unit), (EQUAL_SIGNS * unit) * (EQUAL_SIGNS * unit)


def _weigh_signs(system: DampedSystem, matrix: _OfMatrix, shift: Numbers) -> Numbers:
    """Compute ``(c u)²`` for the Gram."""
    mixed, equal = _get_square_factors(system)
    diagonal = matrix.energies
    if system.norm is None:  # the norm is that of gram + λI
        diagonal = diagonal + shift * (2 * matrix.trace + shift * system.size)
    cosine = _compute_absolute(_divide(matrix.norm * matrix.norm - diagonal, matrix.trace * matrix.trace))
    return mixed + equal * _get_length_factor(system) * cosine / (1 + 3 * cosine)


def _get_length_factor(system: DampedSystem) -> float:
    """Return the length of the sums that are rounded, in units of `LONGEST_SUM`.

    The Gram of a dual system sums over many columns, but on a CPU small Grams of long sums are accurate, so
    the sums of the factorisation count. For other systems the number of rows is not known here.
    """
    if system.dual and system.matrix.device.type == "cpu":
        return min(max(system.size, SHORTEST_SUM) / LONGEST_SUM, 1.0)
    return 1.0


def _sum_squares(matrix: Tensor) -> Tensor:
    """Sum the squares of each row of matrices (g, k, c), whatever their layout."""
    return torch.linalg.vector_norm(matrix, dim=2).square()  # without a copy of the matrix


def _compute_norm(matrix: Tensor) -> Tensor:
    """Compute the Frobenius norms (g,) of contiguous matrices."""
    return torch.linalg.vector_norm(matrix.flatten(1), dim=1)


def _get_numbers(tables: list[Tensor], system: DampedSystem) -> tuple[list[Numbers], Numbers]:
    """Return the columns of tables (g, ...), and λ.

    One group is brought to the host at once. The columns of many stay tensors, in float64.
    """
    if isinstance(system.shift, Tensor):
        tables = [*tables, system.shift.expand(len(tables[0]), 1)]
    table = torch.cat(tables, 1)
    numbers: list[Numbers] = table[0].tolist() if len(table) == 1 else list(table.double().unbind(1))
    return (numbers[:-1], numbers[-1]) if isinstance(system.shift, Tensor) else (numbers, system.shift)


def _compute_absolute(value: Numbers) -> Numbers:
    """Compute the absolute value."""
    return value.abs() if isinstance(value, Tensor) else abs(value)


def _divide(numerator: Numbers, denominator: Numbers) -> Numbers:
    """Divide as IEEE 754 does, Python numbers too."""
    if isinstance(denominator, float) and denominator == 0:
        return math.nan if numerator == 0 else math.inf
    return numerator / denominator
