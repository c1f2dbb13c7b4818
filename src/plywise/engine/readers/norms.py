"""The affine part of norms, of torch's own and of those that are written by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plywise.engine.capture.capture import Capture
from plywise.engine.capture.captured_call import apply_tapped
from plywise.engine.maps.affine import ElementwiseAffine
from plywise.engine.maps.layouts import ELEMENTWISE
from plywise.engine.readers.common import Args, Kwargs, keep_input, leave_graph, pick_argument, tap

Normalise = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
KeepMoments = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def _capture_norm(
    capture: Capture,
    axis: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Normalise,
    again: Normalise | None = None,
    keep_moments: KeepMoments | None = None,
) -> Tensor | None:
    """Capture γ and β of a norm.

    Args:
        capture: the capture.
        axis: where the features are, see `ElementwiseAffine`.
        x: the call's input.
        weight: γ.
        bias: β.
        normalise: the call itself.
        again: the same call without side effects, for the map's input.
        keep_moments: makes the call, and returns its output with the mean and the inverse deviation of each
            feature, so the map's input need not be normalised again; None if torch does not return these.
    """
    if weight is None or (not weight.is_leaf and capture.is_parameter(x)):
        return (
            None  # in the second case the norm is applied to another layer's weight (weight standardisation)
        )
    site = capture.find_site(weight, ElementwiseAffine(weight.numel(), axis), ELEMENTWISE, bias, x)
    if site is None:
        return None
    if bias is not None and bias.dim() > 1:
        site.bias_shape = bias.shape
    quiet = again or normalise
    bare = leave_graph(weight, bias)
    if keep_moments is not None:
        output, *moments = keep_moments(x, *bare)
        box = [output.detach(), _standardise, moments]
    else:
        output = normalise(x, *bare)
        box = [output.detach(), lambda a: quiet(a, None, None), ()]
    return apply_tapped(site, quiet, box, output, weight, bias, x)


def _standardise(x: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """Compute ``(x - mean) / deviation`` of each feature in axis 1."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    return (x - mean.reshape(shape)).mul_(inverse_deviation.reshape(shape)).to(x.dtype)


def read_layer_norm(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.layer_norm(x, shape, weight, bias, eps)``."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, eps = (
        pick_argument(args, kwargs, i, n, d)
        for i, (n, d) in enumerate(zip(names, (*[None] * 4, 1e-5), strict=True))
    )
    output = _capture_norm(capture, -1, x, weight, bias, lambda a, w, b: F.layer_norm(a, shape, w, b, eps))
    return func(*args, **kwargs) if output is None else output


def read_rms_norm(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.rms_norm(x, shape, weight, eps)``."""
    names = ("input", "normalized_shape", "weight", "eps")
    x, shape, weight, eps = (pick_argument(args, kwargs, i, n) for i, n in enumerate(names))
    output = _capture_norm(capture, -1, x, weight, None, lambda a, w, b: F.rms_norm(a, shape, w, eps))
    return func(*args, **kwargs) if output is None else output


def read_group_norm(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.group_norm(x, groups, weight, bias, eps)``."""
    names = ("input", "num_groups", "weight", "bias", "eps")
    x, groups, weight, bias, eps = (
        pick_argument(args, kwargs, i, n, d)
        for i, (n, d) in enumerate(zip(names, (*[None] * 4, 1e-5), strict=True))
    )
    output = _capture_norm(capture, 1, x, weight, bias, lambda a, w, b: F.group_norm(a, groups, w, b, eps))
    return func(*args, **kwargs) if output is None else output


def read_batch_norm(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``F.batch_norm`` and ``F.instance_norm``; running statistics are updated exactly once."""
    last = "use_input_stats" if func is F.instance_norm else "training"
    names = ("input", "running_mean", "running_var", "weight", "bias", last, "momentum", "eps")
    defaults = (*[None] * 5, func is F.instance_norm, 0.1, 1e-5)
    x, mean, var, weight, bias, training, momentum, eps = (
        pick_argument(args, kwargs, i, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))
    )
    kept = (None, None) if training else (mean, var)

    def normalise(a: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return func(a, mean, var, w, b, training, momentum, eps)

    def normalise_again(a: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return func(a, *kept, w, b, training, momentum, eps)

    def keep_moments(a: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        uses_cudnn = torch.backends.cudnn.enabled
        found = torch._batch_norm_impl_index(a, w, b, mean, var, training, momentum, eps, uses_cudnn)
        return found[0], found[1], found[2]

    # torch's checks of the arguments, and autocast, are in the function itself
    is_plain = func is F.batch_norm and training and x.dim() > 1 and _count_rows(x) > 1
    is_plain = is_plain and eps > 0 and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
    moments = keep_moments if is_plain else None
    output = _capture_norm(capture, 1, x, weight, bias, normalise, normalise_again, moments)
    return func(*args, **kwargs) if output is None else output


def _count_rows(x: Tensor) -> int:
    """Count the entries of one feature in axis 1."""
    return x.numel() // max(x.shape[1], 1)


def read_scale(capture: Capture, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Read ``weight * x`` with a weight for each feature, as norms and layer scales are written by hand."""
    if len(args) == 2 and not kwargs and all(isinstance(arg, Tensor) for arg in args):
        for weight, x in (args, args[::-1]):
            axis = _find_axis(capture, weight, x)
            if axis is not None and not capture.is_parameter(x):
                map_ = ElementwiseAffine(weight.numel(), axis)
                site = capture.find_site(weight, map_, ELEMENTWISE, None, x, by_role=False)
                if site is not None:
                    return tap(capture, site, lambda a, w, b: a * w, keep_input, x, weight, None)
    return func(*args, **kwargs)


def _find_axis(capture: Capture, weight: Tensor, x: Tensor) -> int | None:
    """Return where the features of a scale are: 1, or -1 for the last axes; None for no scale of x."""
    count, dims = weight.dim(), x.dim()
    if not 1 <= count <= dims >= 2 or weight.numel() < 2 or not x.is_floating_point():
        return None
    if not (weight.is_leaf or capture.is_parameter(weight)):
        return None
    wide = [axis for axis in range(-count, 0) if weight.shape[axis] > 1]
    if any(weight.shape[axis] != x.shape[axis] or not weight.stride(axis) for axis in wide):
        return None
    if wide[0] == -dims:
        return None
    if wide == list(range(wide[0], 0)):
        return -1
    return 1 if wide == [1 - dims] else None
