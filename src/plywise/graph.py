"""How large a backward value arrives at each layer: energies through autograd's graph.

Back-matching's layer-wise rate divides by the product of matching scalars between a layer and the loss.
Let ``E`` be the mean factor by which the squared size of a random vector changes on its way down from
the loss, ``‖J‖²_F / dim``. Through an operation with scalar ``m`` it is multiplied; where paths join
(a residual connection ``x + F(x)``) it adds: ``E(x) = E(y)·(1 + m_F)``. So it is carried by the same
graph as the backward values: whenever a layer's backward runs, it pushes its energy down to the next
layers, and by the time one of them runs, all that feeds it has been pushed.

Layers on top start with 1; a path that reaches a layer past all others (``x + F(x)`` with nothing above)
is not seen. Operations in between count as 1, except for slices and the modules that `EnergyMark` knows:
batch norm, average pooling and dropout. That is exact for reshapes and sums; a ReLU passes only its firing
rate of the energy, which only the scalar "rank" accounts for.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from plywise.capture import ModelHook, is_layer
from plywise.errors import PlywiseError

KEY = "plywise.matching scale"
ARRIVED = "plywise.energies from above"

SELECTIONS = {
    f"{name}Backward0"
    for name in ("Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Narrow", "Expand")
}
"""Operations that hand on a part of their input, or several copies of it."""

MARKED = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.dropout._DropoutNd,
)
"""Module types whose scalar is known."""


def matching_scale(module: nn.Module, x: Tensor, output: Tensor) -> Tensor | float:
    """``m`` of a marked module: its backward is ``m`` times its pseudo-inverse, ``Jᵀ = m J⁺``.

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


class EnergyMark(ModelHook):
    """Forward hook of a marked module: writes its mean scalar on its node in autograd's graph.

    Args:
        summed_loss: whether the loss is summed over samples instead of averaged.
    """

    def __init__(self, summed_loss: bool) -> None:
        self._summed_loss = summed_loss

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Note ``m`` for `push_energy`."""
        if torch.is_grad_enabled() and isinstance(output, Tensor) and output.grad_fn is not None:
            scale = matching_scale(module, args[0] if args else kwargs["input"], output)
            node: Any = output.grad_fn
            scale = scale.mean() if isinstance(scale, Tensor) else scale
            # dropout in eval mode hands on its input, whose node may be marked already
            node.metadata[KEY] = node.metadata.get(KEY, 1.0) * scale
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                # batch norm's γ and β: means over samples and positions, divided by the energy
                rows = math.prod(output.shape[2:]) * (len(output) if self._summed_loss else 1)
                metadata: dict[str, Any] = node.metadata  # not the node: the hook would keep it alive
                node.register_hook(lambda below, _: _matched_parameters(below, metadata, rows))


def _matched_parameters(
    below: tuple[Tensor | None, ...], metadata: dict[str, Any], rows: int
) -> tuple[Tensor | None, ...]:
    scale = max(rows, 1) * (sum(metadata.get(ARRIVED, {}).values()) or 1.0)
    return (below[0], *(None if part is None else part / scale for part in below[1:]))


class PseudoInverse(ModelHook):
    """Forward hook of a marked module: its input hears ``J⁺`` of the backward value instead of ``Jᵀ``.

    The gradients of the module's own parameters stay what they are.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Put a hook on the module's node, where the value for its input comes out."""
        x = args[0] if args else kwargs["input"]
        node = output.grad_fn if isinstance(output, Tensor) else None
        if node is None or not x.requires_grad:
            return
        scale = matching_scale(module, x, output)
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, *[1] * (x.dim() - 2))

        def rescale(below: tuple[Tensor | None, ...], above: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            return (None if below[0] is None else _divided(below[0], scale), *below[1:])

        node.register_hook(rescale)


def _divided(value: Tensor, scale: Tensor | float) -> Tensor:
    matched = torch.where(value == 0, value, value / scale)  # a dead channel (γ = 0) hears nothing
    return matched.to(value.dtype)


def energy_of(node: Any) -> Tensor | float:
    """Energy that arrives at a layer's output: the sum over the layers above; 1 at the top."""
    return sum(node.heard.values()) if node.heard else 1.0


def push_energy(node: Any, energy: Tensor | float) -> None:
    """Hand the energy below a layer to the layers that hear it next.

    Args:
        node: the layer's `LayerNode` context.
        energy: energy at the layer's input: that at its output times its own scalar.
    """
    arriving: dict[Any, Tensor | float] = {}
    for source in _next(node):
        arriving[source] = arriving.get(source, 0.0) + energy
    for current in _topological(node):
        value = arriving[current]
        if is_layer(current):
            # kept by source, so that a second backward through a retained graph replaces, not adds
            current.heard[id(node)] = value
            continue
        if "CheckpointFunctionBackward" in type(current).__name__:
            raise PlywiseError(
                f"Back-matching's rate needs the whole graph, but below layer {node.hook.name!r} a reentrant "
                "checkpoint hides a part of it. Use torch.utils.checkpoint with use_reentrant=False."
            )
        if KEY in current.metadata:
            current.metadata.setdefault(ARRIVED, {})[id(node)] = value
            value = value * current.metadata[KEY]
        elif type(current).__name__ in SELECTIONS:
            value = value * _share(current)
        for source in _next(current):
            arriving[source] = arriving.get(source, 0.0) + value


def _next(node: Any) -> list[Any]:
    return [source for source, _ in node.next_functions if source is not None]


def _share(node: Any) -> float:
    """Outputs per input of a selection: of n inputs it hands on k, so that ``‖J‖²_F / n = k/n``."""
    source, index = node.next_functions[0]
    if source is None or not source._input_metadata:
        return 1.0
    handed_on = [math.prod(output.shape) for output in node._input_metadata]
    return sum(handed_on) / len(handed_on) / max(math.prod(source._input_metadata[index].shape), 1)


def _topological(start: Any) -> list[Any]:
    """Nodes below ``start``, each after everything that feeds it; the walk stops at layers."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(source, False) for source in _next(start)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not is_layer(node):
                stack.extend((source, False) for source in _next(node))
    return order[::-1]
