"""Pseudo-inverses of batch norm, average pooling and dropout, for exact back-matching."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plywise.engine.capture.capture import ModelHook
from plywise.numerics.products import divide_or_zero


class PseudoInverse(ModelHook):
    """Forward hook of a module that sends ``J⁺`` of the backward value to its input instead of ``Jᵀ``.

    The gradients of the module's own parameters stay what they are.

    Attributes:
        alters: whether the running backward pass sends altered values down at this node.
    """

    alters: Callable[[Any], bool]

    types = (
        nn.modules.batchnorm._BatchNorm,
        nn.modules.pooling._AvgPoolNd,
        nn.modules.pooling._AdaptiveAvgPoolNd,
        nn.modules.dropout._DropoutNd,
    )

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Put a hook on the module's node, where the value for its input comes out."""
        x = args[0] if args else kwargs["input"]
        node = output.grad_fn if isinstance(output, Tensor) else None
        if node is None or not x.requires_grad:
            return
        scale = find_matching_scale(module, x, output)
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, *[1] * (x.dim() - 2))

        def rescale(
            below: tuple[Tensor | None, ...], above: tuple[Tensor, ...]
        ) -> tuple[Tensor | None, ...] | None:
            # the node itself would keep this hook, and the hook the node, alive for ever
            if not self.alters(torch._C._current_autograd_node()):
                return None
            return (None if below[0] is None else _divide(below[0], scale), *below[1:])

        node.register_hook(rescale)


def find_matching_scale(module: nn.Module, x: Tensor, output: Tensor) -> Tensor | float:
    """``m`` of such a module: its backward is ``m`` times its pseudo-inverse, ``Jᵀ = m J⁺``.

    Batch norm has one for each channel, ``(γ/σ)²``; average pooling over P values 1/P; dropout with
    rate p ``1/(1-p)²``.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training or module.running_var is None:
            variance = x.detach().var([0, *range(2, x.dim())], correction=0)
        else:
            variance = module.running_var
        gain = 1.0 if module.weight is None else module.weight.detach().square()
        return gain / (variance + module.eps)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return (1 - module.p) ** -2 if module.training and 0 < module.p < 1 else 1.0
    return output.numel() / max(x.numel(), 1)


def _divide(value: Tensor, scale: Tensor | float) -> Tensor:
    if not isinstance(scale, Tensor):
        return value / scale
    return divide_or_zero(value, scale).to(value.dtype)  # a dead channel (γ = 0) gets nothing
