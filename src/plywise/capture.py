"""How A and Δ reach a rule on an unmodified model.

A forward hook takes the output that the layer has just computed, lets go of the graph that autograd
built for it, and returns the same numbers as the output of a `torch.autograd.Function` whose backward
asks the rule for both of its answers. So

- nothing is computed twice and nothing is kept that autograd would not keep (the input, the weight);
- gradients arrive through autograd: accumulation, clipping, GradScaler and DDP see the rule's direction;
- a forward leaves no trace unless a backward passes through it: no state between the two, so that
  exceptions, no-grad forwards, recomputation and discarded graphs need no care.
"""

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from plywise.layers import LayerType
from plywise.ply import Move, Ply


class Listener(Protocol):
    """Whoever answers for a layer in backward."""

    def make_ply(self, node: "LayerNode", a: Tensor, delta: Tensor, weight: Tensor) -> Ply:
        """The layer's local problem."""

    def answer(self, ply: Ply, wants_move: bool, wants_below: bool) -> tuple[Move, Tensor | None]:
        """How the layer moves and what the layer below hears."""


class LayerNode(torch.autograd.Function):
    """A layer in autograd's graph: identity on the output computed already, the rule in backward.

    Public attributes of the node (the ``ctx`` of a call), used by `plywise.graph`: ``hook``, the
    `LayerHook`; ``heard``, energies pushed down to it by the nodes above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        box: list[Tensor],
        hook: "LayerHook",
        module: nn.Module,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Hand back the output in ``box``; keep what autograd would keep."""
        ctx.hook = hook
        ctx.module = module
        ctx.has_bias = bias is not None and bias.requires_grad  # a frozen bias is a constant
        ctx.heard = {}
        output = box.pop()  # through a container: a tensor argument handed back would count as a view
        ctx.save_for_backward(a if a.dtype == output.dtype else a.to(output.dtype), weight)
        ctx.input_dtype = a.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Ask the rule for the layer's move and for the value below."""
        a, weight = ctx.saved_tensors
        wants_below, wants_weight, wants_bias = _wanted(ctx)
        if delta.dim() < a.dim():
            delta = delta.unsqueeze(0)  # the convolution of a single sample
        listener = ctx.hook.listener
        with torch.autocast(delta.device.type, enabled=False):  # that is meant for the network
            ply = listener.make_ply(ctx, a, delta, weight)
            move, below = listener.answer(ply, wants_weight or wants_bias, wants_below)
        if wants_bias and not ply.has_bias:  # it is no part of the local problem: its plain gradient
            move = replace(move, bias=ply.kind.bias_gradient(ctx.module, delta))
        return (
            None,
            None,
            None,
            below.to(ctx.input_dtype) if below is not None else None,
            move.weight.to(weight.dtype) if wants_weight and move.weight is not None else None,
            move.bias.to(weight.dtype) if wants_bias and move.bias is not None else None,
        )


def _wanted(node: Any) -> list[bool]:
    """Whether this backward has a use for the gradients of input, weight and bias.

    Autograd says which inputs need a gradient at all. ``torch.autograd.grad`` and ``backward(inputs=...)``
    want only some of them, and the engine knows which; it drops the others, so none of them is computed.
    """
    # a missing bias is needed by nobody, and no edge stands for it
    return [
        needed and _is_executed(node.next_functions[place][0])
        for place, needed in enumerate(node.needs_input_grad[-3:])
    ]


def _is_executed(source: Any) -> bool:
    """Whether the running backward goes on to ``source``; true where the engine does not say."""
    try:
        return torch._C._will_engine_execute_node(source)
    except RuntimeError:  # the engine refuses leaves that torch.autograd.grad asks for: they are wanted
        return True


def is_layer(node: Any) -> bool:
    """Whether a node of autograd's graph is a `LayerNode`."""
    return getattr(type(node), "_forward_cls", None) is LayerNode


class ModelHook:
    """A hook of ours on a user's module, which copies of the module do not inherit.

    A copied or unpickled model carries a do-nothing of the standard library in its place.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # deepcopy and pickle of the model take this road. The fresh handle makes the unpickling process
        # number its own hooks after ours: hook ids are per process, and flags are kept by id.
        return getattr, (nullcontext(RemovableHandle(OrderedDict())), "__exit__")


class LayerHook(ModelHook):
    """The forward hook of one layer.

    It holds the listener (which outlives a forgotten handle: the rule lives as long as the model) and
    never the module.
    """

    def __init__(self, name: str, kind: LayerType, listener: Listener) -> None:
        self.name = name
        self.kind = kind
        self.listener = listener
        # torch.compile cannot trace a solver that looks at its data: it stops there and runs it as it is
        self._capture = torch.compiler.disable(_capture)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Replace the output of the layer by the output of a `LayerNode`."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None
        if (
            self.kind.weight_name not in module._parameters
            or next(iter(module._forward_hooks.values())) is not self
        ):
            # parametrized since, or a hook before ours may have changed the output: not ours any more, and
            # the watch on the weight says so
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return self._capture(self, module, x, output)


def _capture(hook: LayerHook, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    a = hook.kind.linear_input(module, x)
    weight = getattr(module, hook.kind.weight_name)
    bias = getattr(module, hook.kind.bias_name)
    # forward differentiation (dual numbers) is autograd's own: the rule answers in backward only
    output, tangent = forward_ad.unpack_dual(output)
    a = forward_ad.unpack_dual(a).primal
    # detach(): the output's numbers without the graph that autograd built for them
    node: Tensor = LayerNode.apply([output.detach()], hook, module, a, weight, bias)
    return node if tangent is None else forward_ad.make_dual(node, tangent)


def install(module: nn.Module, hook: LayerHook) -> RemovableHandle:
    """Register ``hook`` on ``module``, before hooks of others, so that they see the tensor that goes on."""
    return module.register_forward_hook(hook, prepend=True, with_kwargs=True)
