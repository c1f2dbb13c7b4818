"""Convolutions, plain and transposed, in one to three spatial dimensions."""

from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.capture.captured_call import apply_captured
from plywise.engine.maps.convolution import Convolution, TransposedConvolution
from plywise.engine.maps.layouts import PLAIN, make_transposed_layout
from plywise.engine.readers.common import Args, Kwargs, keep_input, pick_argument, tap


def _as_tuple(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


@lru_cache(maxsize=1024)
def _make_convolution(
    kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int
) -> Convolution | None:
    count = len(kernel)
    dilation = _as_tuple(dilation, count)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        if any(size % 2 for size in total):
            return None  # torch pads one more zero on one side: a call of its own
        padding = tuple(size // 2 for size in total)
    return Convolution(kernel, _as_tuple(stride, count), _as_tuple(padding, count), dilation, groups)


def _make_hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


CONVOLUTION_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def read_convolution(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.conv1d``, ``F.conv2d``, ``F.conv3d``."""
    defaults = (None, None, None, 1, 0, 1, 1)
    values = [
        _make_hashable(pick_argument(args, kwargs, i, n, d))
        for i, (n, d) in enumerate(zip(CONVOLUTION_NAMES, defaults, strict=True))
    ]
    x, weight, bias, *geometry = values
    map_ = _make_convolution(tuple(weight.shape[2:]), *geometry)
    if map_ is None:
        return _read_uneven_padding(capture, func, values)
    site = capture.find_site(weight, map_, PLAIN, bias, x)
    if site is None:
        return func(*args, **kwargs)

    def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return func(a, w, b, *geometry)

    if x.dim() == weight.dim() - 1:
        return apply_captured(site, run, x.unsqueeze(0), weight, bias).squeeze(0)
    return apply_captured(site, run, x, weight, bias)


def _read_uneven_padding(capture: Capture, func: Any, values: list[Any]) -> Any:
    """Read padding "same" with an even kernel, for which torch pads one more zero at the end: pad first."""
    x, weight, bias, stride, _, dilation, groups = values
    if not capture.is_parameter(weight):
        return func(x, weight, bias, *values[3:])
    sides: list[int] = []
    for k, d in zip(reversed(weight.shape[2:]), reversed(_as_tuple(dilation, weight.dim() - 2)), strict=True):
        total = d * (k - 1)
        sides += [total // 2, total - total // 2]
    return read_convolution(capture, func, (F.pad(x, sides), weight, bias, stride, 0, dilation, groups), {})


TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def read_transposed_convolution(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.conv_transpose1d``, ``F.conv_transpose2d``, ``F.conv_transpose3d``."""
    defaults = (None, None, None, 1, 0, 0, 1, 1)
    x, weight, bias, *geometry = [
        _make_hashable(pick_argument(args, kwargs, i, n, d))
        for i, (n, d) in enumerate(zip(TRANSPOSED_NAMES, defaults, strict=True))
    ]
    stride, padding, extra, groups, dilation = geometry
    count = weight.dim() - 2
    map_ = TransposedConvolution.of(
        tuple(weight.shape[2:]),
        _as_tuple(stride, count),
        _as_tuple(padding, count),
        _as_tuple(extra, count),
        _as_tuple(dilation, count),
        groups,
    )
    site = capture.find_site(weight, map_, make_transposed_layout(groups), bias, x)
    if site is None:
        return func(*args, **kwargs)

    def run(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return func(a, w, b, *geometry)

    if x.dim() == weight.dim() - 1:
        one = x.unsqueeze(0)
        return tap(capture, site, run, keep_input, one, weight, bias, restore=keep_input).squeeze(0)
    return tap(capture, site, run, keep_input, x, weight, bias, restore=keep_input)
