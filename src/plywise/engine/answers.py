"""Checks of a rule's class and of its return values, with error messages for authors of rules."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.errors import AttachError


def read_settings(rule: Any) -> dict[str, Any]:
    """Return the hyper-parameters of a rule by name.

    Raises:
        AttachError: its class is not a dataclass, or adds hyper-parameters to one without being one itself.
    """
    kind = type(rule)
    own = {name for name, hint in inspect.get_annotations(kind).items() if "ClassVar" not in str(hint)}
    if hasattr(kind, "__dataclass_fields__") and ("__dataclass_fields__" in kind.__dict__ or not own):
        return {f.name: getattr(rule, f.name) for f in fields(rule)}
    held = sorted({*own, *(name for name in vars(rule) if not name.startswith("_"))})
    names = f", with {', '.join(held)} as fields" if held else ""
    raise AttachError(
        f"{kind.__name__} is not a dataclass, so plywise cannot read its hyper-parameters (to print, copy "
        f"and save them). Write @dataclass(frozen=True, eq=False) above the class{names}.",
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
    weight, bias, shape = update.weight, update.bias, call.weight.shape
    if weight is not None and weight.shape != shape:
        raise _name_shape(f"{who} moves the weight", call, weight, shape)
    if bias is not None and bias.shape != shape[:1]:
        raise _name_shape(f"{who} moves the bias", call, bias, shape[:1])


def check_input_gradient(rule: object, call: LinearCall, value: object) -> None:
    """Raise AttachError unless what a rule sends down is a tensor in the shape of what it stands for."""
    who = f"{type(rule).__name__}.input_gradient"
    if not isinstance(value, Tensor):
        raise AttachError(
            f"{who} must return a tensor, not {type(value).__name__} (layer {call.name!r}).",
            see="attach-rule",
        )
    like = call.a if call.map.sends_below else call.delta
    if value.shape != like.shape:
        raise AttachError(
            f"{who} returns a tensor of shape {tuple(value.shape)} for layer {call.name!r}, where "
            f"{tuple(like.shape)} is wanted. call.input_gradient() is what backpropagation sends down.",
            see="attach-rule",
        )


def _name_shape(what: str, call: LinearCall, value: Tensor, shape: Sequence[int]) -> AttachError:
    return AttachError(
        f"{what} of layer {call.name!r} by a tensor of shape {tuple(value.shape)}, where "
        f"{tuple(shape)} is wanted. call.update(matrix) makes an update of a matrix "
        f"{(call.groups, call.outputs, call.columns)} (groups, outputs, inputs with the bias's column).",
        see="attach-rule",
    )


def check_tensors(
    rule: object, method: str, layer: str, found: object, wanted: Mapping[str, Sequence[int]]
) -> None:
    """Raise AttachError unless a method of a rule with running state returned the tensors that it names.

    Not all that are learned need be there yet: `finish` may add some.

    Args:
        rule: the rule.
        method: the method: ``"gather"`` or ``"learn"``.
        layer: name of the layer.
        found: what it returned.
        wanted: the shapes by name, as `evidence_shapes` or `learned_shapes` says.
    """
    shapes = {key: tuple(size) for key, size in wanted.items()}
    named = f"{'evidence' if method == 'gather' else 'learned'}_shapes"
    if isinstance(found, Mapping):
        values = {key: tuple(getattr(value, "shape", ("no tensor",))) for key, value in found.items()}
        names = values.keys() | (shapes.keys() if method == "gather" else set())
        wrong = sorted(key for key in names if values.get(key) != shapes.get(key))
        if not wrong:
            return
        key = wrong[0]
        is_ = values.get(key, "missing")
        what = f"its {key!r} is {is_}, and should be {shapes.get(key, 'missing')}"
    else:
        what = f"it is a {type(found).__name__}, and should be a dict of tensors by name"
    raise AttachError(
        f"What {type(rule).__name__}.{method} returns for layer {layer!r} is not what {named} says: {what}.",
        see="attach-rule",
    )


def check_finish(rule: object, answer: object, gradient: Tensor) -> None:
    """Raise AttachError unless a rule's `finish` returned an update of the gradient's shape and a dict."""
    who = f"{type(rule).__name__}.finish"
    parts = answer if isinstance(answer, tuple) and len(answer) == 2 else (None, None)
    update, state = parts
    if not isinstance(update, Update) or not isinstance(state, Mapping):
        raise AttachError(
            f"{who} must return a plywise.Update and a dict of what changes in the state (perhaps empty), as "
            "in `return update, {}`.",
            see="attach-rule",
        )
    if update.weight is None or update.weight.shape != gradient.shape or update.bias is not None:
        found = None if update.weight is None else tuple(update.weight.shape)
        raise AttachError(
            f"{who} got a gradient of shape {tuple(gradient.shape)} (outputs, inputs with the bias's column) "
            f"and no bias; its update must be alike, not of shape {found}.",
            see="attach-rule",
        )
