"""Products with a weight: linear layers, ``@``, addmm, bmm, baddbmm."""

from typing import Any

import torch
from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.capture.captured_call import apply_captured
from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.layouts import BATCHED_IN_OUT, PLAIN, TRANSPOSED
from plywise.engine.maps.matmul import MATRIX_PRODUCT, TAPPED_PRODUCT, BatchedProduct
from plywise.engine.readers.common import Args, Kwargs, keep_input, pick_argument, tap

LINEAR = torch._C._nn.linear


def read_linear(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.linear(x, weight, bias)``."""
    if kwargs:
        args = tuple(pick_argument(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias")))
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else None
    site, map_ = None, MATRIX_PRODUCT if _is_dense(x) else TAPPED_PRODUCT
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        site = capture.find_site(weight, map_, PLAIN, bias, x)
    if site is None:
        return func(x, weight, bias)
    if not map_.sends_below:  # torch takes other products for such an input: its own graph sends it down
        return tap(capture, site, func, keep_input, x, weight, bias, is_product=True, restore=keep_input)
    return apply_captured(site, func, x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _capture_product(capture: Capture, func: Any, x: Any, weight: Any, run: Any) -> Any:
    """Capture ``x @ weight`` for a weight (d, m) or (experts, d, m); None for other tensors."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)) or capture.is_parameter(x):
        return None
    if weight.dim() == 3 == x.dim() and weight.shape[0] > 1 and not weight.stride(0):
        weight = weight[0]  # one matrix, expanded over the batch
    dense = _is_dense(x)
    if weight.dim() == 2 and x.dim() >= 1:
        map_: LinearMap = MATRIX_PRODUCT if dense else TAPPED_PRODUCT
        site = capture.find_site(weight, map_, TRANSPOSED, None, x, by_role=False)
    elif weight.dim() == 3 and x.dim() == 3 and x.shape[0] == weight.shape[0]:
        map_ = BatchedProduct(weight.shape[0], dense)
        site = capture.find_site(weight, map_, BATCHED_IN_OUT, None, x, by_role=False)
    else:
        return None
    if site is None:
        return None
    if not dense:
        return tap(capture, site, run, keep_input, x, weight, None, is_product=True, restore=keep_input)
    return apply_captured(site, run, x, weight, None)


def _is_dense(x: Tensor) -> bool:
    """Return whether torch multiplies with this input as it is; else its own graph sends the gradient."""
    return x.layout is torch.strided and x.is_contiguous()


def read_product(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``x @ weight``, ``weight @ x``, `torch.mm`, `torch.bmm`, `torch.matmul` and their methods."""
    if kwargs and kwargs.keys() <= {"input", "other", "mat2"}:
        names = ("input", "mat2" if "mat2" in kwargs else "other")
        args, kwargs = tuple(pick_argument(args, kwargs, i, n) for i, n in enumerate(names)), {}
    if not kwargs and len(args) == 2:
        first, second = args
        output = _capture_product(capture, func, first, second, _multiply)
        if output is not None:
            return output
        if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() == 2 <= second.dim():
            return _capture_from_left(capture, func, first, second)
    return func(*args, **kwargs)


def _capture_from_left(capture: Capture, func: Any, weight: Tensor, x: Tensor) -> Any:
    """Capture ``weight @ x`` as ``(xᵀ weightᵀ)ᵀ``: the columns of x are the rows of A."""
    site = None
    if not capture.is_parameter(x):
        site = capture.find_site(weight, MATRIX_PRODUCT, PLAIN, None, x, by_role=False)
    if site is None:
        return func(weight, x)
    return apply_captured(site, _multiply_columns, x.mT, weight, None).mT


def _multiply_columns(rows: Tensor, weight: Tensor, bias: None) -> Tensor:
    return (weight @ rows.mT).mT


def read_reversed_product(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``Tensor.__rmatmul__``: the arguments of ``@`` in the other order."""
    if len(args) == 2 and not kwargs and isinstance(args[1], Tensor):
        return read_product(capture, torch.matmul, (args[1], args[0]), {})
    return func(*args, **kwargs)


def read_addmm(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``torch.addmm(bias, x, weight)``, as GPT-2's Conv1D calls it."""
    if not kwargs and len(args) == 3 and args[0].dim() == 1 and args[2].dim() == 2:
        bias, x, weight = args
        site = None
        if not capture.is_parameter(x) and len(bias) == weight.shape[1]:
            site = capture.find_site(weight, MATRIX_PRODUCT, TRANSPOSED, bias, x, by_role=False)
        if site is not None:
            return apply_captured(site, _multiply, x, weight, bias)
    return func(*args, **kwargs)


def read_baddbmm(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``torch.baddbmm(bias, x, weight)`` with a bias (experts, 1, m)."""
    if not kwargs and len(args) == 3 and args[2].dim() == 3:
        bias, x, weight = args
        if tuple(bias.shape) == (weight.shape[0], 1, weight.shape[2]) and not capture.is_parameter(x):
            map_ = BatchedProduct(weight.shape[0])
            site = capture.find_site(weight, map_, BATCHED_IN_OUT, bias, x, by_role=False)
            if site is not None:
                return apply_captured(site, _add_batched, x, weight, bias)
    return func(*args, **kwargs)


def _add_batched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.bmm(weight) if bias is None else torch.baddbmm(bias, x, weight)
