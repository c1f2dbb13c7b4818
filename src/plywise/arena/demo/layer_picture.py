"""The picture that back-matching starts from: how large the backward values are, layer by layer."""

from __future__ import annotations

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
WELL_SCALED = "Backprop, well scaled"
"""The line of the picture for the network as it was initialised."""


def layer_picture(
    make_model: Callable[[], nn.Sequential], rules: dict[str, Rule], x: Tensor, y: Tensor
) -> dict[str, Any]:
    """How large a change each layer's output is asked for, on a badly scaled copy of a network.

    For each rule and layer the root mean square of the backward value over that of the layer's output,
    relative to the last layer's. The network is at initialisation, its layers' weights multiplied by
    factors that cancel: it computes the same function.

    Args:
        make_model: makes the network, of linear layers and ReLU.
        rules: what to draw, by name. Plain training sends down what Backprop does.
        x: inputs of one batch.
        y: its labels.

    Returns:
        The ``layers`` of a study (see `plywise.arena.demo.report`).
    """
    series = []
    names: list[str] = []
    scales: list[float] = []
    for name, rule in {**rules, WELL_SCALED: Backprop()}.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make_model()
        if name != WELL_SCALED:
            scales = bad_scales(model)
            rescale(model, scales)
        sizes = backward_sizes(rule, model, x, y)
        names = [f"{layer} {_shape(model.get_submodule(layer))}" for layer in sizes]
        top = list(sizes.values())[-1]
        series.append({"name": name, "sizes": [size / top for size in sizes.values()]})
    return {"names": names, "series": series, "caption": _caption(scales)}


def bad_scales(model: nn.Sequential) -> list[float]:
    """A factor for each linear layer, their product 1."""
    count = sum(isinstance(module, nn.Linear) for module in model)
    scales = [BAD_SCALES[i % len(BAD_SCALES)] for i in range(count - 1)]
    return [*scales, 1 / math.prod(scales)]


def rescale(model: nn.Sequential, scales: list[float]) -> None:
    """Scale each linear layer's weight, and its bias so that only the output's size changes.

    ReLU lets a positive factor through: a layer's output grows by the product of the factors up to it.
    """
    total = 1.0
    linears = [module for module in model if isinstance(module, nn.Linear)]
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
        sizes[call.name] = _rms(rule.backward_value(call)) / _rms(call.module(call.a))

    rule.attach(model)
    with rule.observing(look):
        nn.functional.cross_entropy(model(x), y).backward()
    rule.detach()
    return dict(reversed(sizes.items()))


def _caption(scales: list[float]) -> str:
    factors = ", ".join(f"{scale:g}" for scale in scales)
    return (
        f"The network at initialisation, its layers' weights multiplied by {factors}: the function is the "
        "same, only the layers are badly scaled against each other. Up: the backward value at each layer's "
        "output over that output, relative to the last layer. Backpropagation's values follow the bad "
        f"scales; “{WELL_SCALED}” is the network before the multiplication. Rules that differ from "
        "backpropagation only in how the weights move send the same values down: their lines lie on one "
        "another."
    )


def _shape(module: nn.Module) -> str:
    return f"Linear {module.in_features}→{module.out_features}"


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
