"""How a weight is stored, and how it becomes the canonical matrix (g · m, d) of a linear map."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """A pair of reshapes; both are linear and inverse to each other.

    Attributes:
        name: for messages and keys.
        to_canonical: from the stored weight to (g · m, ...), whose other dimensions multiply to d.
        from_canonical: back, given the stored shape.
    """

    name: str
    to_canonical: Callable[[Tensor], Tensor]
    from_canonical: Callable[[Tensor, torch.Size], Tensor]


PLAIN = Layout("plain", lambda weight: weight, lambda update, shape: update.reshape(shape))
"""(m, d), or (g · m, C/g, *kernel)."""

TRANSPOSED = Layout("transposed", lambda weight: weight.t(), lambda update, shape: update.t())
"""(d, m), as ``x @ weight`` has it; an embedding's table is (entries, m)."""

ELEMENTWISE = Layout(
    "elementwise", lambda weight: weight.reshape(-1, 1), lambda update, shape: update.reshape(shape)
)
"""A norm's γ of any shape."""

BATCHED_IN_OUT = Layout(
    "batched and transposed",
    lambda weight: weight.mT.reshape(-1, weight.shape[1]),
    lambda update, shape: update.reshape(shape[0], shape[2], shape[1]).mT,
)
"""(experts, d, m), as ``torch.bmm(x, weight)`` has it."""


@lru_cache
def make_transposed_layout(groups: int) -> Layout:
    """Make the layout (C, m, *kernel) of a transposed convolution; taps are flipped to become canonical."""

    def to_canonical(weight: Tensor) -> Tensor:
        split = weight.reshape(groups, -1, *weight.shape[1:])  # (g, C/g, m, *kernel)
        turned = split.transpose(1, 2).flatten(0, 1)
        return turned.flip(list(range(2, turned.dim())))

    def from_canonical(update: Tensor, shape: torch.Size) -> Tensor:
        flipped = update.flip(list(range(2, update.dim())))
        split = flipped.reshape(groups, -1, *flipped.shape[1:])  # (g, m, C/g, *kernel)
        return split.transpose(1, 2).reshape(shape)

    return Layout(f"transposed convolution of {groups} groups", to_canonical, from_canonical)


@lru_cache
def make_permuted_layout(order: tuple[int, ...], first: int) -> Layout:
    """Return a weight whose axes an einsum names in any order.

    Args:
        order: the stored axes in the order experts, outputs, inputs.
        first: how many of them are experts and outputs.
    """
    inverse = tuple(order.index(axis) for axis in range(len(order)))

    def to_canonical(weight: Tensor) -> Tensor:
        turned = weight.permute(order)
        return turned.reshape(turned.shape[:first].numel(), -1)

    def from_canonical(update: Tensor, shape: torch.Size) -> Tensor:
        return update.reshape([shape[axis] for axis in order]).permute(inverse)

    return Layout(f"permuted {order}", to_canonical, from_canonical)
