"""The guarded solvers: one local least-squares problem at several prices.

All answer ``argmin_D ½‖[A,1] Dᵀ - Δ‖² + λ/2 ‖D‖² = G (AᵀA + λI)⁻¹`` or an approximation of it:

- `ridge`: exactly, by Cholesky, in the space of inputs (AᵀA) or of rows (AAᵀ), whichever is smaller;
- `ridge_centred`: the same with the bias solved apart, by centring rows and targets;
- `conjugate_gradients`: k steps from zero; `official_conjugate_gradients`: as ProxProp's published code;
- `normalised`: AAᵀ replaced by its diagonal (NLMS);
- `mean_square`: AᵀA replaced by its mean eigenvalue.

The key to speed is ``(AᵀA + λI)⁻¹Aᵀ = Aᵀ(AAᵀ + λI)⁻¹``: with fewer rows than columns the whole solve
is *another Δ*, and the product ``Δ'ᵀA`` is the one that backpropagation makes anyway.

Every solve ends: Cholesky; in float64 where rounding made the Gram indefinite; clamped eigenvalues
where even that fails; backpropagation's own move where the input is not finite. Each fallback is
counted in the layer's `Health`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from plywise import health
from plywise.layers import lower_product
from plywise.ply import Move, Ply

Damping = float | Tensor
"""λ: a number, or a tensor (g,) with one number for each group."""


def ridge(ply: Ply, damping: Damping) -> Move:
    """``G (AᵀA + λI)⁻¹`` exactly, the bias being a column of ones in A."""
    if ply.row_count > ply.columns:
        inverse = damped_inverse(ply, ply.gram, damping)
        if inverse is None:
            return ply.gradient()
        gradient = ply.matrix(ply.gradient())
        return _cast(ply, ply.move(gradient.to(inverse.dtype) @ inverse))
    if ply.kind.rows_are_inputs and ply.width < ply.outputs:
        return _ridge_through_rows(ply, damping)
    delta = _damped_solve(ply, ply.dual_gram, ply.delta_rows(), damping)
    return ply.gradient(None if delta is None else ply.from_delta_rows(delta))


def _ridge_through_rows(ply: Ply, damping: Damping) -> Move:
    """`ridge` with the inverse applied to A instead of Δ, for layers with more outputs than inputs."""
    inverse = damped_inverse(ply, ply.dual_gram, damping)
    if inverse is None:
        return ply.gradient()
    delta = ply.delta_rows(inverse.dtype)[0]
    rows = inverse[0] @ ply.kind.rows(ply.module, ply.a.to(inverse.dtype))[0]
    weight = (delta.T @ rows).reshape(ply.weight.shape)
    return _cast(ply, Move(weight, delta.T @ inverse[0].sum(1) if ply.has_bias else None))


def ridge_centred(ply: Ply, relative_damping: float) -> Move:
    """`ridge` on centred rows and targets, then the bias: ``b = mean(Δ) - D mean(A)``.

    The damping is ``relative_damping · ‖A - mean‖²_F / min(n, d)`` and never touches the bias, which
    keeps the move covariant under rescaled inputs. What centring leaves of constant rows is rounding,
    ``eps · ‖A‖²_F`` at most: added to the energy, it keeps that from becoming a step.
    """
    mean = ply.mean_row(ply.dtype)
    energy = ply.kind.trace(ply.module, ply.a.to(ply.dtype))
    centred = (energy - ply.row_count * mean.square().sum(1)).clamp_min(0)
    floor = torch.finfo(ply.dtype).eps * energy
    damping = (relative_damping * centred + floor) / min(ply.row_count, ply.width)
    delta = ply.delta_rows()
    if ply.row_count > ply.width:
        weight = _centred_in_inputs(ply, damping, delta)
    else:
        solved = _damped_solve(ply, _centred_dual(ply), delta - delta.mean(1, keepdim=True), damping)
        if solved is None:
            return ply.gradient()
        # Its columns sum to zero (up to rounding), so the mean of the rows drops out of the product.
        solved = solved - solved.mean(1, keepdim=True)
        move = Move(ply.weight_gradient(ply.from_delta_rows(solved)), None)
        weight = ply.matrix(move).to(ply.dtype)
    if weight is None:
        return ply.gradient()
    bias = delta.mean(1) - (weight @ mean.unsqueeze(2)).squeeze(2)
    return _cast(ply, Move(weight.reshape(ply.weight.shape), bias.reshape(-1)))


def _centred_in_inputs(ply: Ply, damping: Tensor, delta: Tensor) -> Tensor | None:
    def gram(dtype: torch.dtype) -> Tensor:
        mean = ply.mean_row(dtype)
        return ply.kind.gram(ply.module, ply.a.to(dtype)) - ply.row_count * outer(mean, mean)

    inverse = damped_inverse(ply, gram, damping)
    if inverse is None:
        return None
    mean = ply.mean_row(ply.dtype)
    gradient = ply.matrix(Move(ply.weight_gradient(ply.delta), None)).to(ply.dtype)
    return ((gradient - outer(delta.sum(1), mean)).to(inverse.dtype) @ inverse).to(ply.dtype)


def _centred_dual(ply: Ply) -> Callable[[torch.dtype], Tensor]:
    def gram(dtype: torch.dtype) -> Tensor:
        rows = ply.kind.rows(ply.module, ply.a.to(dtype))
        rows = rows - rows.mean(1, keepdim=True)
        return rows @ rows.mT

    return gram


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

    solution = torch.zeros_like(residual)
    image = matrix @ residual
    direction, direction_image = residual, image
    square = inner(image if in_rows else residual, residual)
    enough = 1e-4 * square.mean()  # the published tolerance, 1e-2, squared
    for step in range(steps):
        curved = direction_image + shift * direction
        curvature = inner(direction_image if in_rows else direction, curved)
        alpha = _divide(square, curvature + epsilon)
        solution = solution + alpha * direction
        if step == steps - 1:
            break
        residual = residual - alpha * curved
        image = matrix @ residual
        previous, square = square, inner(image if in_rows else residual, residual)
        if official and bool(square.max() < enough):
            break
        beta = _divide(square, previous + epsilon)
        if official and step == 0:  # the alias: the old direction *is* the new residual
            direction, direction_image = residual, image
        direction = residual + beta * direction
        direction_image = image + beta * direction_image
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
    weight = ply.weight.to(ply.dtype)
    wide = weight.shape[1] > weight.shape[0]

    def gram(dtype: torch.dtype) -> Tensor:
        w = ply.weight.to(dtype)
        return lower_product((w if wide else w.T).unsqueeze(0))

    damping = relative_damping * weight.square().sum() / min(weight.shape)
    inverse = damped_inverse(ply, gram, damping)
    if inverse is None:
        return ply.below()
    delta, weight = ply.delta.to(inverse.dtype), weight.to(inverse.dtype)
    matched = (delta @ inverse[0]) @ weight if wide else (delta @ weight) @ inverse[0]
    return matched.to(ply.delta.dtype)


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


def damped_inverse(ply: Ply, gram: Callable[[torch.dtype], Tensor], damping: Damping) -> Tensor | None:
    """``(gram + λI)⁻¹``, or None if the Gram is not finite (counted).

    In the layer's dtype, or in float64 where that was too coarse: then the product with it is so, too.
    """
    factor = _factor(ply, gram, damping)
    if factor is not None:
        return torch.cholesky_inverse(factor)
    return _eigenvalue_inverse(ply, gram, damping)


def _damped_solve(
    ply: Ply, gram: Callable[[torch.dtype], Tensor], right: Tensor, damping: Damping
) -> Tensor | None:
    """``(gram + λI)⁻¹ right``; None as in `damped_inverse`."""
    if 4 * right.shape[2] < right.shape[1]:  # few columns: two triangular solves cost less than an inverse
        factor = _factor(ply, gram, damping)
        if factor is not None:
            return torch.cholesky_solve(right.to(factor.dtype), factor).to(ply.dtype)
    inverse = damped_inverse(ply, gram, damping)
    return None if inverse is None else (inverse @ right.to(inverse.dtype)).to(ply.dtype)


def _factor(ply: Ply, gram: Callable[[torch.dtype], Tensor], damping: Damping) -> Tensor | None:
    """Cholesky factor of ``gram + λI`` in the layer's dtype or, where that is too coarse, in float64."""
    factor = _cholesky(gram(ply.dtype), damping, torch.finfo(ply.dtype).eps)
    if factor is None and ply.dtype != torch.float64:
        factor = _cholesky(gram(torch.float64), damping, 0.0)
        if factor is not None:
            ply.health.note(ply.name, health.FLOAT64)
    return factor


def _cholesky(gram: Tensor, damping: Damping, noise: float) -> Tensor | None:
    """Lower Cholesky factor of ``gram + λI``, or None where there is none.

    Nor is there one worth having if λ is below the rounding of the Gram, ``noise`` times its trace: the
    inverse would turn that rounding into a full-size step.
    """
    shift = _as_column(damping, gram).squeeze(2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    coarse = noise * diagonal.sum(1, keepdim=True) > shift
    diagonal.add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    return None if bool((info.unsqueeze(1).bool() | coarse).any()) else factor


def _eigenvalue_inverse(ply: Ply, gram: Callable[[torch.dtype], Tensor], damping: Damping) -> Tensor | None:
    matrix = mirrored(gram(torch.float64))
    if not bool(torch.isfinite(matrix).all()):
        ply.health.note(ply.name, health.IDENTITY)
        return None
    values, vectors = torch.linalg.eigh(matrix)
    # below the noise floor an eigenvalue is rounding: dividing by it would make noise a full-size step
    floor = values.amax(1, keepdim=True) * 1e-12
    values = values.clamp_min(0) + _as_column(damping, matrix).squeeze(2) + floor
    values = values.clamp_min(torch.finfo(torch.float32).tiny)  # so that 1 / value is finite in float32
    ply.health.note(ply.name, health.EIGENVALUES)
    return (vectors / values.unsqueeze(1)) @ vectors.mT


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
