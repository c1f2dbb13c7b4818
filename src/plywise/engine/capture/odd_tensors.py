"""Tensors in calls that a rule cannot read, and the reasons."""

from torch import Tensor

from plywise.engine.processes.followed_parameters import SPREAD
from plywise.engine.sites import PLAIN_TYPES


def is_expanded(weight: Tensor) -> bool:
    """Return whether a view shows the same numbers several times."""
    return any(size > 1 and not stride for size, stride in zip(weight.shape, weight.stride(), strict=True))


def explain_type(x: Tensor, weight: Tensor) -> str:
    """Return why a call with a tensor of another type is left to the optimizer."""
    name = type(weight if type(weight) not in PLAIN_TYPES else x).__name__
    if name == "DTensor":
        return SPREAD
    return f"its call mixes in a tensor of another type ({name}), which the rule cannot read"


def explain_values(x: Tensor, weight: Tensor) -> str:
    """Return why a call with a plain tensor of other values than real numbers in rows is left to it."""
    if weight.is_complex():
        return "its weight is complex"
    if weight.is_quantized:
        return "its weight is quantised"
    return f"its input is {'nested' if x.is_nested else f'sparse ({x.layout})'}"
