"""Measures how large backward values are, layer by layer: the observation behind back-matching."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plywise.engine.call import LinearCall
from plywise.engine.rule import Rule
from plywise.rules.backprop import Backprop

BAD_SCALES = (10.0, 0.1)
"""Factors of the layers' weights, repeated; the last layer's makes their product 1."""
SCALED_BADLY = "backward value over output, layers scaled by 10 and 0.1"
SCALED_WELL = "backward value over output"
"""What the picture calls the sizes of the rescaled network, and of the network as it was initialised."""


def layer_picture(
    make_model: Callable[[], nn.Module], rules: dict[str, Rule], x: Tensor, y: Tensor
) -> dict[str, dict[str, Any]]:
    """Measure the size of each layer's backward value, on a badly scaled copy of a network.

    For each rule and layer the root mean square of the backward value over that of the layer's output,
    relative to the last layer's. The network is at initialisation, and its layers' weights are multiplied by
    factors that cancel, so that it computes the same function. Plain training has Backprop's values.

    Args:
        make_model: makes the network, of linear layers and ReLU.
        rules: what to draw, by name.
        x: inputs of one batch.
        y: its labels.

    Returns:
        For each rule the ``names`` of the layers, and its values under `SCALED_BADLY`; Backprop's those of
        the network before the multiplication, too.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, rule in rules.items():
        kinds = (SCALED_BADLY, SCALED_WELL) if isinstance(rule, Backprop) else (SCALED_BADLY,)
        found[name] = {kind: _measure_sizes(rule, make_model, kind, x, y) for kind in kinds}
        found[name]["names"] = [
            f"{layer} Linear {module.in_features}→{module.out_features}"
            for layer, module in make_model().named_modules()
            if isinstance(module, nn.Linear)
        ]
    return found


def _measure_sizes(
    rule: Rule, make_model: Callable[[], nn.Module], kind: str, x: Tensor, y: Tensor
) -> list[float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model()
    if kind == SCALED_BADLY:
        rescale(model, bad_scales(model))
    sizes = list(backward_sizes(rule, model, x, y).values())
    return [size / sizes[-1] for size in sizes]


def bad_scales(model: nn.Module) -> list[float]:
    """Return a factor for each linear layer, their product 1."""
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    scales = [BAD_SCALES[i % len(BAD_SCALES)] for i in range(count - 1)]
    return [*scales, 1 / math.prod(scales)]


def rescale(model: nn.Module, scales: list[float]) -> None:
    """Scale each linear layer's weight, and its bias so that only the output's size changes.

    ReLU lets a positive factor through: a layer's output grows by the product of the factors up to it.
    """
    total = 1.0
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module, scale in zip(linears, scales, strict=True):
            total *= scale
            module.weight.mul_(scale)
            module.bias.mul_(total)


def backward_sizes(rule: Rule, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Size of the backward value at each layer's output, relative to the output; bottom layer first."""
    sizes: dict[str, float] = {}

    def look(call: LinearCall, *_: Any) -> None:
        assert call.module is not None
        sizes[call.name] = _compute_rms(rule.backward_value(call)) / _compute_rms(call.module(call.a))

    rule.attach(model)
    with rule.observing(look):
        nn.functional.cross_entropy(model(x), y).backward()
    rule.detach()
    return dict(reversed(sizes.items()))


def _compute_rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
