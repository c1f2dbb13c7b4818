"""Products with a weight that are written otherwise: tensordot, inner, `@` with a stack of matrices."""

import string
from functools import partial
from typing import Any

from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.readers.common import Args, Kwargs, pick_argument
from plywise.engine.readers.einsum import capture_contraction
from plywise.engine.readers.products import read_product


def read_matmul(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``x @ weight`` and ``weight @ x``, also with a weight (experts, d, m) and more dimensions of x."""
    if len(args) == 2 and not kwargs:
        for place in (1, 0):
            weight, x = args[place], args[1 - place]
            if not (isinstance(x, Tensor) and isinstance(weight, Tensor)) or not 3 <= weight.dim() <= x.dim():
                continue
            if capture.is_parameter(weight) and not capture.is_parameter(x):
                output = _capture_stack(capture, func, weight, x, place)
                if output is not None:
                    return output
    return read_product(capture, func, args, kwargs)


def _capture_stack(capture: Capture, func: Any, weight: Tensor, x: Tensor, place: int) -> Any:
    """Capture a product with a stack; leading dimensions of size 1 belong to no stack."""
    if place == 1 and x.dim() == 3 == weight.dim() and len(x) == len(weight):
        return None  # `read_product` takes it as it is, without copies
    ones = 0
    while weight.dim() > 2 and weight.shape[0] == 1:
        weight, ones = weight[0], ones + 1
    stack = "X" * (weight.dim() - 2)
    if len(stack) > 1 or (stack and x.shape[-3] != weight.shape[0]):
        return None
    rows = string.ascii_lowercase[: x.dim() - 2 - len(stack)] + stack
    equation = f"{stack}YZ,{rows}ZN->{rows}YN" if place == 0 else f"{rows}NZ,{stack}ZY->{rows}NY"

    def compute(*operands: Tensor) -> Tensor:
        whole = list(operands)
        whole[place] = whole[place][(None,) * ones]  # torch's own product, with the same bits
        result: Tensor = func(*whole)
        return result

    operands = (weight, x) if place == 0 else (x, weight)
    return capture_contraction(capture, equation, operands, compute, is_product=True)


def read_tensordot(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``torch.tensordot(x, weight, dims)`` of a number of axes, or of two lists of axes."""
    a, b = (pick_argument(args, kwargs, i, name) for i, name in enumerate("ab"))
    dims = pick_argument(args, kwargs, 2, "dims", 2)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and kwargs.get("out") is None:
        equation = _name_tensordot(a.dim(), b.dim(), dims)
        if equation is not None:
            output = capture_contraction(capture, equation, (a, b), partial(func, dims=dims))
            if output is not None:
                return output
    return func(*args, **kwargs)


def _name_tensordot(first: int, second: int, dims: Any) -> str | None:
    """Return the einsum of a tensordot; None where torch has to say what is wrong, or dims is a tensor."""
    if isinstance(dims, int) and 0 <= dims <= min(first, second):
        summed = [*range(first - dims, first)], [*range(dims)]
    elif isinstance(dims, list | tuple) and len(dims) == 2 and all(isinstance(d, list | tuple) for d in dims):
        summed = [int(d) for d in dims[0]], [int(d) for d in dims[1]]
    else:
        return None
    sizes = (first, second)
    fits = all(-n <= d < n for n, axes in zip(sizes, summed, strict=True) for d in axes)
    if len(summed[0]) != len(summed[1]) or not fits or first + second > len(string.ascii_letters):
        return None
    left, right = list(string.ascii_letters[:first]), list(string.ascii_letters[first : first + second])
    for i, j in zip(*summed, strict=True):
        right[j] = left[i]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return f"{''.join(left)},{''.join(right)}->{''.join(out)}"


def read_inner(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``torch.inner(x, weight)``: it sums over the last axes."""
    if len(args) == 2 and not kwargs and args[0].dim() and args[1].dim():
        equation = _name_tensordot(args[0].dim(), args[1].dim(), ([-1], [-1]))
        output = None if equation is None else capture_contraction(capture, equation, args, func)
        if output is not None:
            return output
    return func(*args, **kwargs)
