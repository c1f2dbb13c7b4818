"""The guarded solvers: one local least-squares problem at several prices.

All answer ``argmin_D ½‖[A,1] Dᵀ - Δ‖² + λ/2 ‖D‖² = G (AᵀA + λI)⁻¹`` or an approximation of it:

- `ridge`: exactly, by Cholesky, in the space of inputs (AᵀA) or of rows (AAᵀ), whichever is smaller;
- `ridge_centred`: the same with the bias solved apart, by centring rows and targets;
- `conjugate_gradients`: k steps from zero; `official_conjugate_gradients`: as ProxProp's published code;
- `normalised`: AAᵀ replaced by its diagonal (NLMS);
- `mean_square`: AᵀA replaced by its mean eigenvalue.

The key to speed is ``(AᵀA + λI)⁻¹Aᵀ = Aᵀ(AAᵀ + λI)⁻¹``: with fewer rows than columns the whole solve
is *another Δ*, and the product ``Δ'ᵀA`` is the one that backpropagation makes anyway.

Every solve ends (`_guarded`): Cholesky; all in float64 where rounding made the Gram indefinite, or could;
clamped eigenvalues where even that fails; backpropagation's own move where the input is not finite. Each
fallback is counted in the layer's `Health`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from plywise import health
from plywise.layers import lower_product
from plywise.ply import Move, Ply

Damping = float | Tensor
"""λ: a number, or a tensor (g,) with one number for each group."""


InverseTimes = Callable[[Tensor, Damping, Tensor], Tensor | None]
"""``(gram + λI)⁻¹ right`` of a Gram (g, k, k) whose lower triangle counts, or None where that fails."""


def ridge(ply: Ply, damping: Damping) -> Move:
    """``G (AᵀA + λI)⁻¹`` exactly, the bias being a column of ones in A."""
    move = _guarded(ply, lambda p, inverse_times: _ridge(p, damping, inverse_times))
    return ply.gradient() if move is None else _cast(ply, move)


def _ridge(ply: Ply, damping: Damping, inverse_times: InverseTimes) -> Move | None:
    if ply.row_count > ply.columns:
        gradient = ply.matrix(ply.gradient()).to(ply.dtype)
        solved = inverse_times(ply.gram(ply.dtype), damping, gradient.mT)
        return None if solved is None else ply.move(solved.mT)
    gram = ply.dual_gram(ply.dtype)
    if ply.kind.rows_are_inputs and ply.width < ply.outputs:  # the inverse costs less on A than on Δ
        rows, delta = inverse_times(gram, damping, ply.rows(ply.dtype)), ply.delta_rows()[0]
        if rows is None:
            return None
        weight = (delta.T @ rows[0, :, : ply.width]).reshape(ply.weight.shape)
        return Move(weight, delta.T @ rows[0, :, -1] if ply.has_bias else None)
    emended = inverse_times(gram, damping, ply.delta_rows())
    return None if emended is None else ply.gradient(ply.from_delta_rows(emended))


def ridge_centred(ply: Ply, relative_damping: float) -> Move:
    """`ridge` on centred rows and targets, then the bias: ``b = mean(Δ) - D mean(A)``.

    The damping is ``relative_damping · ‖A - mean‖²_F / min(n, d)`` and never touches the bias, which
    keeps the move covariant under rescaled inputs. What centring leaves of constant rows is rounding, of
    size ``eps · ‖A‖``; a floor of ``16 eps ‖A‖²`` keeps it from becoming a step.
    """
    dtype = ply.dtype
    energy = ply.kind.trace(ply.module, ply.a.to(dtype))
    floor = 16 * torch.finfo(dtype).eps * energy
    mean, mean_delta = ply.mean_row(dtype), ply.delta_rows().mean(1)
    weight: Tensor | None
    if not ply.kind.rows_are_inputs:
        centred = (energy - ply.row_count * mean.square().sum(1)).clamp_min(0)
        damping = relative_damping * centred / min(ply.row_count, ply.width) + floor
        weight = _guarded(ply, lambda p, inverse_times: _ridge_of_patches(p, damping, inverse_times))
    else:
        a, delta = ply.a.to(dtype) - mean[0], ply.delta.to(dtype) - mean_delta[0]
        local = replace(ply, a=a, delta=delta, has_bias=False)
        damping = relative_damping * local.trace() / min(ply.row_count, ply.width) + floor
        move = _guarded(local, lambda p, inverse_times: _ridge(p, damping, inverse_times))
        weight = None if move is None else ply.matrix(Move(move.weight, None))
    if weight is None:
        return ply.gradient()
    weight = weight.to(dtype)
    bias = mean_delta - (weight @ mean.unsqueeze(2)).squeeze(2)
    return _cast(ply, Move(weight.reshape(ply.weight.shape), bias.reshape(-1)))


def _ridge_of_patches(ply: Ply, damping: Damping, inverse_times: InverseTimes) -> Tensor | None:
    """The weight's matrix in `ridge_centred`, for rows that cannot be centred before they are made."""
    n, dtype, delta = ply.row_count, ply.dtype, ply.delta_rows()
    mean, mean_delta = ply.mean_row(dtype), delta.mean(1)
    if n > ply.width:
        gram = ply.kind.gram(ply.module, ply.a.to(dtype)) - n * outer(mean, mean)
        gradient = ply.matrix(Move(ply.weight_gradient(ply.delta), None)).to(dtype)
        solved = inverse_times(gram, damping, (gradient - n * outer(mean_delta, mean)).mT)
        return None if solved is None else solved.mT
    rows = ply.kind.rows(ply.module, ply.a.to(dtype))
    gram = lower_product(rows - rows.mean(1, keepdim=True))
    emended = inverse_times(gram, damping, delta - mean_delta.unsqueeze(1))
    if emended is None:
        return None
    # Its columns sum to zero (up to rounding), so the mean of the rows drops out of the product.
    emended = emended - emended.mean(1, keepdim=True)
    return ply.matrix(Move(ply.weight_gradient(ply.from_delta_rows(emended)), None))


def conjugate_gradients(ply: Ply, damping: Damping, steps: int) -> Move:
    """``steps`` of textbook conjugate gradients on ``M V = G``, ``M = AᵀA + λI``, from zero.

    Each output has its own scalars (block CG). The iterates are those in the space of the weights; with
    fewer rows than columns they are carried as ``V = AᵀY``, so that a step is one product with AAᵀ.
    """
    return _krylov(ply, damping, steps, official=False)


def official_conjugate_gradients(ply: Ply, damping: Damping, steps: int) -> Move:
    """The iteration of ProxProp's published code, kept so that the paper's tables can be reproduced.

    It differs from the textbook (and from the paper): the first direction is aliased with the residual,
    so that the second comes out too long by ``1 + β``; 1e-6 is added to both denominators, which is not
    small against the squared gradients of a mean loss; it stops once the worst residual is 1 % of the
    mean first one; and a convolution is one flat system, not one for each output.
    """
    return _krylov(ply, damping, steps, official=True)


def _krylov(ply: Ply, damping: Damping, steps: int, official: bool) -> Move:
    in_rows = ply.row_count <= ply.columns
    matrix = mirrored((ply.dual_gram if in_rows else ply.gram)(ply.dtype))
    residual = ply.delta_rows() if in_rows else ply.matrix(ply.gradient()).to(ply.dtype).mT
    shift = _as_column(damping, matrix)
    epsilon = 1e-6 if official else 0.0
    flat = official and not ply.kind.rows_are_inputs

    def inner(x: Tensor, y: Tensor) -> Tensor:
        # In row space V = AᵀY, so that <V, V> = <Y, AAᵀY>: callers pass the product with AAᵀ as x.
        product = (x * y).sum((0, 1, 2) if flat else 1, keepdim=True)
        return product.clamp_min(0)

    # in place from here on: each of these is as large as Δ
    residual, solution = residual.clone(), torch.zeros_like(residual)
    direction, direction_image = residual.clone(), matrix @ residual
    square = inner(direction_image if in_rows else residual, residual)
    enough = 1e-4 * square.mean()  # the published tolerance, 1e-2, squared
    for step in range(steps):
        curved = torch.addcmul(direction_image, direction, shift)
        curvature = inner(direction_image if in_rows else direction, curved)
        alpha = _divide(square, curvature + epsilon)
        solution.addcmul_(direction, alpha)
        if step == steps - 1:
            break
        residual.addcmul_(curved, -alpha)
        del curved
        image = matrix @ residual
        previous, square = square, inner(image if in_rows else residual, residual)
        if official and bool(square.max() < enough):
            break
        beta = _divide(square, previous + epsilon)
        if official and step == 0:  # the alias: the old direction *is* the new residual
            direction.copy_(residual)
            direction_image.copy_(image)
        direction.mul_(beta).add_(residual)
        direction_image.mul_(beta).add_(image)
        del image
    if not bool(torch.isfinite(solution).all()):
        ply.health.note(ply.name, health.IDENTITY)
        return ply.gradient()
    if in_rows:
        return ply.gradient(ply.from_delta_rows(solution))
    return _cast(ply, ply.move(solution.mT))


def normalised(ply: Ply, relative_damping: float) -> Move:
    """Each row's δ divided by its own ``‖a_i‖² + ε``, ε relative to the mean squared norm (NLMS)."""
    norms = ply.square_norms()
    norms = norms + relative_damping * norms.mean(1, keepdim=True)
    factors = _divide(torch.ones_like(norms), norms)
    delta = ply.kind.scale_rows(ply.module, ply.delta.to(ply.dtype), factors)
    return ply.gradient(delta.to(ply.delta.dtype))


def mean_square(ply: Ply, by_rank: bool = False) -> Tensor:
    """``AᵀA / samples`` as one scalar: its mean eigenvalue (mean non-zero one if ``by_rank``).

    The trace is that of A without the bias, averaged over groups.
    """
    size = min(ply.row_count, ply.width) if by_rank else ply.width
    return ply.kind.trace(ply.module, ply.a.to(ply.dtype)).mean() / (ply.samples * size)


def matched_below(ply: Ply, relative_damping: float, steps: int = 8) -> Tensor:
    """``argmin_X ‖J X - Δ‖² + ε‖X‖²``, J the layer's map: the input's change that explains Δ.

    Closed form ``Δ W (WᵀW + εI)⁻¹`` in the smaller of inputs and outputs where A is the input itself;
    ``steps`` of conjugate gradients on the normal equations for a convolution. ε is relative to the mean
    non-zero eigenvalue of ``JᵀJ``.
    """
    if not ply.kind.rows_are_inputs:
        return _matched_by_conjugate_gradients(ply, relative_damping, steps)
    damping = relative_damping * ply.weight.to(ply.dtype).square().sum() / min(ply.weight.shape)
    matched = _guarded(ply, lambda p, inverse_times: _matched(p, damping, inverse_times))
    return ply.below() if matched is None else matched.to(ply.delta.dtype)


def _matched(ply: Ply, damping: Damping, inverse_times: InverseTimes) -> Tensor | None:
    weight, delta = ply.weight.to(ply.dtype), ply.delta_rows()
    outputs, inputs = weight.shape
    if inputs > outputs:
        solved = inverse_times(lower_product(weight.unsqueeze(0)), damping, delta.mT)
        return None if solved is None else (solved[0].T @ weight).reshape(ply.a.shape)
    solved = inverse_times(lower_product(weight.T.unsqueeze(0)), damping, (delta[0] @ weight).T.unsqueeze(0))
    return None if solved is None else solved[0].T.reshape(ply.a.shape)


def _matched_by_conjugate_gradients(ply: Ply, relative_damping: float, steps: int) -> Tensor:
    a, delta, weight = (t.to(ply.dtype) for t in (ply.a, ply.delta, ply.weight))
    kind, module = ply.kind, ply.module
    inputs, outputs = math.prod(a.shape[1:]), math.prod(delta.shape[1:])
    energy = kind.weight_energy(module, a, delta, weight) * inputs / min(inputs, outputs)
    shift = relative_damping * energy

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(list(range(1, x.dim())), keepdim=True)

    residual = kind.input_gradient(module, a, delta, weight)
    solution, direction = torch.zeros_like(residual), residual
    square = inner(residual, residual)
    for _ in range(steps):
        image = kind.apply(module, direction, weight)
        curved = kind.input_gradient(module, a, image, weight) + shift * direction
        alpha = _divide(square, inner(direction, curved))
        solution = solution + alpha * direction
        residual = residual - alpha * curved
        previous, square = square, inner(residual, residual)
        direction = residual + _divide(square, previous) * direction
    return solution.to(ply.delta.dtype)


Answer = TypeVar("Answer")


def _guarded(ply: Ply, solve: Callable[[Ply, InverseTimes], Answer | None]) -> Answer | None:
    """``solve`` with Cholesky, then in float64, then by eigenvalues; None if A or W is not finite."""
    answer = solve(ply, _by_cholesky)
    if answer is not None:
        return answer
    if not all(bool(torch.isfinite(t).all()) for t in (ply.a, ply.weight)):
        ply.health.note(ply.name, health.IDENTITY)
        return None
    double = ply.a.double(), ply.delta.double(), ply.weight.double()
    wide = replace(ply, a=double[0], delta=double[1], weight=double[2])
    answer = solve(wide, _by_cholesky)
    ply.health.note(ply.name, health.FLOAT64 if answer is not None else health.EIGENVALUES)
    return solve(wide, _by_eigenvalues) if answer is None else answer


def _by_cholesky(gram: Tensor, damping: Damping, right: Tensor) -> Tensor | None:
    """`InverseTimes` by the Cholesky factor of ``gram + λI``.

    None where there is no factor, nor one worth having: with λ below the rounding of the Gram, the inverse
    would turn that rounding into a full-size step. Rounding is taken as 1/16 of ``eps · trace``: the whole
    of it would have to fall on one direction.
    """
    shift = _as_column(damping, gram).squeeze(2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    rounding = (
        0.0 if gram.dtype == torch.float64 else torch.finfo(gram.dtype).eps / 16
    )  # no wider type is left
    coarse = rounding * diagonal.sum(1, keepdim=True) > shift
    diagonal.add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool((info.unsqueeze(1).bool() | coarse).any()):
        return None
    if 4 * right.shape[2] < right.shape[1]:  # two triangular solves of few columns cost less than an inverse
        return torch.cholesky_solve(right, factor)
    return torch.cholesky_inverse(factor) @ right


def _by_eigenvalues(gram: Tensor, damping: Damping, right: Tensor) -> Tensor:
    """`InverseTimes` by eigenvalues, clamped from below: it always ends."""
    values, vectors = torch.linalg.eigh(mirrored(gram))
    # below the noise floor an eigenvalue is rounding: dividing by it would make noise a full-size step
    floor = values.amax(1, keepdim=True) * 1e-12
    values = values.clamp_min(0) + _as_column(damping, gram).squeeze(2) + floor
    values = values.clamp_min(torch.finfo(torch.float32).tiny)  # so that 1 / value is finite in float32
    return (vectors / values.unsqueeze(1)) @ (vectors.mT @ right)


def _cast(ply: Ply, move: Move) -> Move:
    """A move in the dtype that autograd would have returned it in."""
    return Move(*(None if part is None else part.to(ply.delta.dtype) for part in (move.weight, move.bias)))


def _as_column(damping: Damping, like: Tensor) -> Tensor:
    """λ as (g or 1, 1, 1), not so small that 1/λ is infinite."""
    column = torch.as_tensor(damping, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
    return column.clamp_min(torch.finfo(torch.float32).tiny)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0 where the denominator is 0: no curvature, no signal, no step."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle is given."""
    return lower.tril() + lower.tril(-1).mT


def outer(x: Tensor, y: Tensor) -> Tensor:
    """``x yᵀ`` for each group, from (g, m) and (g, k)."""
    return x.unsqueeze(2) * y.unsqueeze(1)
