"""Solve one small damped least-squares problem in about fifteen calls of torch.

`plywise.numerics.least_squares` takes about a hundred calls, to centre the rows and to estimate errors. If a
layer is small, these calls take most of the time. Here the system is solved in float64 without these steps.
That costs less than an answer in float32 with its correction, and its error is only the rounding of float32.
A bound of that error decides whether the answer is used.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from plywise.numerics.cholesky import find_quick_size

LARGEST = 2**25
"""Multiplications in float64 up to which this took 0.45 to 0.94 of the time of the longer way.

Measured on one thread of an Intel Xeon on 16 shapes, from (128, 128, 128) to (2000, 32, 64) rows, inputs and
targets. With twice as many multiplications it took 1.0 to 1.4 of the longer way's time.
"""

TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-9}
"""The bound of an answer's relative error that is accepted, by the dtype of the rows."""

SAFETY = 4.0
"""The rounding of a Gram and of its factor over ``u ‖R‖²``; 3.2 was the most in 8,000 systems."""

LEAST = 1e-15
"""Below this norm of an answer, or of the Y or Δ from which it comes, squares may underflow in float32."""

KEPT_STARTS, KEPT_SIZE = 16, 256
"""How many start matrices of systems are kept, and up to which size."""

UNITS = {dtype: torch.finfo(dtype).eps / 2 for dtype in TOLERANCE}
UNIT = UNITS[torch.float64]


class SmallProblem(NamedTuple):
    """Minimise ``½‖R X - Δ‖² + λ/2 ‖X‖²``.

    Attributes:
        rows: the rows (n, d), float32 or float64.
        target: Δ (n, c), in the same dtype.
        has_ones: whether R has a column of ones after the rows: a bias.
        damping: λ, not negative.
        is_relative: whether ``damping`` is λ as a part of ``‖R‖²``.
    """

    rows: Tensor
    target: Tensor
    has_ones: bool
    damping: float
    is_relative: bool = False


class SmallAnswer(NamedTuple):
    """Xᵀ in the dtype of the rows: ``weight`` (c, d), and ``bias`` (c,) where R has a column of ones."""

    weight: Tensor
    bias: Tensor | None


class _Factor(NamedTuple):
    """The factor of a system; a number that is positive if there is none; λ where it is relative."""

    factor: Tensor
    failed: Tensor
    damping: Tensor | None


def is_small(rows: int, columns: int, targets: int) -> bool:
    """Return whether calls cost more than arithmetic in a problem of this size."""
    least, most = (rows, columns) if rows <= columns else (columns, rows)
    count = least * least * (most + targets) + (rows * columns * targets if rows > columns else 0)
    return count <= LARGEST and least > 0 < targets


def solve_small(problem: SmallProblem) -> SmallAnswer | None:
    """Solve a problem by a Cholesky factorisation of whichever system is smaller.

    - ``(RRᵀ + λI) Y = Δ`` with ``X = RᵀY``. Y is rounded to the rows' dtype, which changes X by at most
      ``u ‖R‖ ‖Y‖``. No singular value of ``Rᵀ(RRᵀ + λI)⁻¹`` is above ``1 / (2√λ)``.
    - ``(RᵀR + λI) X = RᵀΔ``, where no eigenvalue of the inverse is above ``1 / λ``.

    Args:
        problem: the problem.

    Returns:
        The answer; None where its error may be too large, or λ is zero.
    """
    rows, target, has_ones = problem[:3]
    count, width = rows.shape
    dual, wide = count <= width + has_ones, rows.double()
    if dual:
        found = _factorise(wide, count, has_ones, problem)
        other = torch.cholesky_solve(target.double(), found.factor).to(rows.dtype)
        answer = SmallAnswer(other.t().mm(rows), other.sum(0) if has_ones else None)
    else:
        if has_ones:
            wide = torch.constant_pad_nd(wide, [0, 1], 1.0)
        turned, other = wide.t(), target
        found = _factorise(turned, width + has_ones, False, problem)
        x = torch.cholesky_solve(turned.mm(target.double()), found.factor).t()
        answer = SmallAnswer(x[:, :width].to(rows.dtype), x[:, width].to(rows.dtype) if has_ones else None)
    return answer if _is_good(problem, answer, other, found, dual) else None


def _factorise(rows: Tensor, size: int, has_ones: bool, problem: SmallProblem) -> _Factor:
    """Factorise ``rows rowsᵀ + λI``; with ``has_ones`` 1 is added to each number of the product."""
    shift = 0.0 if problem.is_relative else problem.damping
    start, damping = _get_start(size, has_ones, shift, rows.device), None
    if len(start) == size:
        system = gram = torch.addmm(start, rows, rows.t())
    else:
        system = start.clone()
        gram = system[:size, :size].addmm_(rows, rows.t())
    if problem.is_relative:
        diagonal = gram.diagonal()
        damping = diagonal.sum().mul_(problem.damping)
        diagonal.add_(damping)
    factor, failed = torch.linalg.cholesky_ex(system)
    return _Factor(factor if len(start) == size else factor[:size, :size], failed, damping)


_STARTS: dict[tuple[int, bool, float, torch.device], Tensor] = {}


def _get_start(size: int, has_ones: bool, damping: float, device: torch.device) -> Tensor:
    """Make the matrix to which a Gram is added: λ on the diagonal, 1 everywhere if ``has_ones``, a border."""
    key = size, has_ones, damping, device
    start = _STARTS.get(key)
    if start is None:
        with torch.inference_mode(False):
            start = torch.eye(find_quick_size(size, device), dtype=torch.float64, device=device)
            start[:size, :size].mul_(damping).add_(has_ones)
        if type(start) is Tensor and size <= KEPT_SIZE:  # not one of a tracer
            if len(_STARTS) >= KEPT_STARTS:
                _STARTS.clear()
            _STARTS[key] = start
    return start


def _is_good(problem: SmallProblem, answer: SmallAnswer, other: Tensor, found: _Factor, dual: bool) -> bool:
    """Return whether the bound of an answer's error is small enough; NaN is not small.

    Args:
        problem: the problem.
        answer: its answer.
        other: Y if ``dual``, else Δ.
        found: the factor.
        dual: which system was solved.
    """
    dtype, bias = other.dtype, answer.weight if answer.bias is None else answer.bias
    norms = torch._foreach_norm([answer.weight, bias, other, problem.rows])
    numbers = [*norms, found.failed.to(dtype)]
    if found.damping is not None:
        numbers.append(found.damping.to(dtype))
    weight, offset, rest, rows, failed, *shift = torch.stack(numbers).tolist()
    damping = shift[0] if shift else problem.damping
    size = weight if answer.bias is None else math.hypot(weight, offset)
    energy = rows * rows + problem.has_ones * len(other)
    if failed or not (min(size, rest) > LEAST and size < math.inf and damping > 0 and energy < math.inf):
        return False
    gram = SAFETY * UNIT * (energy + damping)
    if dual:
        error = (UNITS[dtype] * energy**0.5 + gram / (2 * damping**0.5)) * rest / size
    else:
        error = (gram + SAFETY * UNIT * energy**0.5 * rest / size) / damping
    return error <= TOLERANCE[dtype]
