"""Look for NaN and infinities in many tensors; the host waits once for each device.

The norm of a tensor with a NaN or an infinity is not finite. The norm of finite numbers may overflow, so the
tensor itself is examined if its norm is not finite. A norm takes as long as a sum, and one call serves all
tensors.
"""

import math
from collections.abc import Sequence
from operator import is_not

import torch
from torch import Tensor

from plywise.engine.sharding import agree_on_all, find_local
from plywise.numerics.norms import compute_norms

SMALLEST, LARGEST = 1e-18, 1e18
"""For norms in this range, the squares of a tensor's numbers stay in the range of float32."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite. A finite sum shows it in less time."""
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def is_precise(norm: float) -> bool:
    """Return whether float32 held the squares that a norm was computed from."""
    return SMALLEST < norm < LARGEST


def measure_norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Return the Frobenius norms of tensors, in one vector on the first one's device; float32 at least.

    Args:
        tensors: the tensors.
        dtype: in which squares are added up. Default: each tensor's own, float32 at least.
    """
    first = tensors[0]
    is_alike = dtype is None and first.dtype.itemsize >= 4
    if is_alike and all(t.dtype is first.dtype and t.device == first.device for t in tensors):
        return torch.stack(compute_norms(tensors))
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(place)
    norms: dict[int, Tensor] = {}
    for (_, kind), places in by_kind.items():
        wide = dtype or torch.promote_types(kind, torch.float32)
        found = compute_norms([tensors[place] for place in places], wide)
        norms.update(zip(places, found, strict=True))
    widest = max((norm.dtype for norm in norms.values()), key=lambda kind: kind.itemsize)
    return torch.stack([norms[place].to(tensors[0].device, widest) for place in range(len(tensors))])


def read_norms(tensors: Sequence[Tensor]) -> list[float]:
    """Read the result of `measure_norms` as numbers, at once from each device."""
    norms = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors if not tensor.is_meta}:  # meta ones hold no numbers
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        for place, norm in zip(places, measure_norms([tensors[p] for p in places]).tolist(), strict=True):
            norms[place] = norm
    return norms


def find_finite(tensors: Sequence[Tensor], norms: Sequence[float] | None = None) -> list[bool]:
    """Return which of these tensors are finite; their norms may be known already."""
    norms = read_norms(tensors) if norms is None else norms
    return [
        math.isfinite(norm) or bool(torch.isfinite(tensor).all())
        for tensor, norm in zip(tensors, norms, strict=True)
    ]


def judge_gradients(gradients: Sequence[Tensor]) -> tuple[bool, list[float]]:
    """Return whether every gradient is finite, on all processes, and the norms of this process's parts."""
    numbers = list(map(find_numbers, gradients))
    norms = read_norms(numbers)
    finite = math.isfinite(sum(norms)) or all(find_finite(numbers, norms))
    if any(map(is_not, numbers, gradients)):  # of DTensors each process sees its own part
        parts = [gradient for gradient, own in zip(gradients, numbers, strict=True) if own is not gradient]
        finite = agree_on_all(finite, parts)
    return finite, norms


def find_numbers(gradient: Tensor) -> Tensor:
    """Return the real numbers of which (this process's part of) a gradient is made."""
    if type(gradient) is Tensor and gradient.layout is torch.strided and not gradient.dtype.is_complex:
        return gradient
    dense = gradient.coalesce().values() if gradient.is_sparse else find_local(gradient)
    return torch.view_as_real(dense) if dense.is_complex() else dense
