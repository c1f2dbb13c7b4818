"""Look for NaN and infinities in many tensors, with one look by the host for each device.

A norm with a NaN or an infinity in it is not finite. One of finite numbers may overflow, so a norm that is
not finite is looked into. It takes as long as a sum, and one call serves all tensors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plywise.engine.sharding import agree_on_all, find_local


def measure_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Frobenius norms of tensors, in one vector on the first one's device; float32 at least."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(place)
    if len(by_kind) == 1 and tensors[0].dtype.itemsize >= 4:
        return torch.stack(torch._foreach_norm(list(tensors)))
    norms: dict[int, Tensor] = {}
    for (_, dtype), places in by_kind.items():
        wide = torch.promote_types(dtype, torch.float32)
        found = torch._foreach_norm([tensors[place] for place in places], 2, dtype=wide)
        norms.update(zip(places, found, strict=True))
    dtype = max((norm.dtype for norm in norms.values()), key=lambda kind: kind.itemsize)
    return torch.stack([norms[place].to(tensors[0].device, dtype) for place in range(len(tensors))])


def read_norms(tensors: Sequence[Tensor]) -> list[float]:
    """`measure_norms` as numbers, read from each device at once."""
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    if len(by_device) == 1:
        return measure_norms(tensors).tolist()
    norms = [0.0] * len(tensors)
    for places in by_device.values():
        for place, norm in zip(places, measure_norms([tensors[p] for p in places]).tolist(), strict=True):
            norms[place] = norm
    return norms


def find_finite(tensors: Sequence[Tensor], norms: Sequence[float] | None = None) -> list[bool]:
    """Which of these tensors are finite; their norms may be known already."""
    norms = read_norms(tensors) if norms is None else norms
    return [
        math.isfinite(norm) or bool(torch.isfinite(tensor).all())
        for tensor, norm in zip(tensors, norms, strict=True)
    ]


def are_finite(gradients: Sequence[Tensor], norms: Sequence[float] | None = None) -> bool:
    """Whether every gradient is finite, on all processes; the norms of their `find_numbers` may be known."""
    finite = all(find_finite(list(map(find_numbers, gradients)), norms))
    return agree_on_all(finite, gradients)  # of DTensors each process sees its own part


def find_numbers(gradient: Tensor) -> Tensor:
    """The real numbers of which (this process's part of) a gradient is made."""
    dense = gradient.coalesce().values() if gradient.is_sparse else find_local(gradient)
    return torch.view_as_real(dense) if dense.is_complex() else dense
