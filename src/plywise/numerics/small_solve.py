"""One small damped least-squares problem in some fifteen calls of torch.

`plywise.numerics.least_squares` takes about a hundred, to centre the rows and to estimate errors: most of the
time where a layer is small. Most problems are easier than that. Here the system is solved as it stands and
the answer corrected once, by the residual of the rows themselves and not of their Gram. The size of the
correction decides whether the answer is used.
"""

import torch
from torch import Tensor

LARGEST = 2**23
"""Operations of one product of the rows with an answer, above which calls are not what costs."""

LARGEST_CORRECTION = 1e-4
"""A larger correction, relative to the answer, may leave an error that is too large."""

LARGEST_NOISE = 3e-5
"""The rounding of the residual, as it changes the answer, that is accepted."""

LEAST = 1e-15
"""The norm of an answer below which squares may have left the range of float32."""


def is_small(rows: int, columns: int, targets: int) -> bool:
    """Whether calls cost more than arithmetic in a problem of this size."""
    return 0 < rows * columns * targets <= LARGEST


def solve_small(rows: Tensor, target: Tensor, damping: float | Tensor) -> Tensor | None:
    """Minimise ``½‖R X - Δ‖² + λ/2 ‖X‖²`` where that is easy.

    Whichever is smaller of two systems is solved by a Cholesky factorisation, twice: for the answer, and for
    what the first answer leaves of Δ.

    - ``(RRᵀ + λI) Y = Δ`` with ``X = RᵀY``; it leaves ``Δ - R X - λY``.
    - ``(RᵀR + λI) X = RᵀΔ``; it leaves ``Rᵀ(Δ - R X) - λX``.

    What is left has been rounded, by about ``u ‖R‖ ‖X‖``, and no singular value of ``(RᵀR + λI)⁻¹Rᵀ`` is
    above ``1 / (2√λ)``: so the error of the corrected answer is about ``u ‖R‖ / (2√λ)``, relative to X.

    Args:
        rows: R (n, k).
        target: Δ (n, c), in the same dtype.
        damping: λ, a number or a tensor of one number.

    Returns:
        Xᵀ (c, k); None where the correction or the rounding is too large, or λ is zero.
    """
    dual = rows.shape[0] <= rows.shape[1]
    matrix = rows.mm(rows.t()) if dual else rows.t().mm(rows)
    matrix.diagonal().add_(damping)
    factor = torch.linalg.cholesky_ex(matrix)[0]
    if dual:
        y = torch.cholesky_solve(target, factor)
        answer = y.t().mm(rows)
        left = torch.addmm(target, rows, answer.t(), alpha=-1).sub_(y * damping)
        correction = torch.cholesky_solve(left, factor).t().mm(rows)
    else:
        answer = torch.cholesky_solve(rows.t().mm(target), factor).t()
        left = torch.addmm(target, rows, answer.t(), alpha=-1)
        left = rows.t().mm(left).sub_(answer.t() * damping)
        correction = torch.cholesky_solve(left, factor).t()
    norms = torch._foreach_norm([correction, answer, rows])
    if isinstance(damping, Tensor):
        norms = (*norms, damping.reshape(()))
    corrected, size, energy, *shift = torch.stack(norms).tolist()
    root = (shift[0] if shift else damping) ** 0.5
    noise = torch.finfo(rows.dtype).eps / 2 * energy
    is_good = corrected <= LARGEST_CORRECTION * size and noise <= LARGEST_NOISE * 2 * root
    return answer + correction if is_good and LEAST < size < float("inf") and root > 0 else None
