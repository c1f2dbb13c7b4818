"""Checks of what a rule is and of what it answers, with errors for people who write rules."""

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.errors import AttachError


def read_settings(rule: Any) -> dict[str, Any]:
    """The hyper-parameters of a rule by name.

    Raises:
        AttachError: its class is no dataclass, or adds hyper-parameters to one without being one itself.
    """
    kind = type(rule)
    own = {name for name, hint in inspect.get_annotations(kind).items() if "ClassVar" not in str(hint)}
    if hasattr(kind, "__dataclass_fields__") and ("__dataclass_fields__" in kind.__dict__ or not own):
        return {f.name: getattr(rule, f.name) for f in fields(rule)}
    held = sorted({*own, *(name for name in vars(rule) if not name.startswith("_"))})
    names = f", with {', '.join(held)} as fields" if held else ""
    raise AttachError(
        f"{kind.__name__} is no dataclass, so plywise cannot read its hyper-parameters (to print, copy and "
        f"save them). Write @dataclass(frozen=True, eq=False) above the class{names}.",
        see="attach-rule",
    )


def check_update(rule: object, call: LinearCall, update: object) -> None:
    """Raise AttachError unless a rule's answer is an `Update` in the shapes of the call's weight and bias."""
    who = f"{type(rule).__name__}.update"
    if not isinstance(update, Update):
        raise AttachError(
            f"{who} must return a plywise.Update, not {type(update).__name__} (layer {call.name!r}). "
            "call.gradient() is one; call.update(matrix) makes one of a matrix (groups, outputs, columns).",
            see="attach-rule",
        )
    if update.weight is not None:
        _check_shape(f"{who} moves the weight", call, update.weight, call.weight.shape)
    if update.bias is not None:
        _check_shape(f"{who} moves the bias", call, update.bias, call.weight.shape[:1])


def check_input_gradient(rule: object, call: LinearCall, value: object) -> None:
    """Raise AttachError unless what a rule sends down is a tensor in the shape of what it stands for."""
    who = f"{type(rule).__name__}.input_gradient"
    if not isinstance(value, Tensor):
        raise AttachError(
            f"{who} must return a tensor, not {type(value).__name__} (layer {call.name!r}).",
            see="attach-rule",
        )
    like = call.a if call.map.sends_below else call.delta
    _check_shape(f"{who} answers", call, value, like.shape)


def _check_shape(what: str, call: LinearCall, value: Tensor, shape: Sequence[int]) -> None:
    if value.shape != shape:
        raise AttachError(
            f"{what} of layer {call.name!r} by a tensor of shape {tuple(value.shape)}, where "
            f"{tuple(shape)} is wanted. call.update(matrix) makes an update of a matrix "
            f"{(call.groups, call.outputs, call.columns)} (groups, outputs, inputs with the bias's column).",
            see="attach-rule",
        )
