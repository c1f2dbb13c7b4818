"""How large a random backward value arrives: as the rule measures it, and exactly, by the dense Jacobian."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import plywise as pw
from plywise.engine.call import LinearCall


@contextmanager
def collect_scales(rule: pw.Rule) -> Iterator[dict[str, list[float]]]:
    """``E`` at each layer's calls, in the order of backward, of the passes inside the block."""
    scales: dict[str, list[float]] = {}

    def add(call: LinearCall, *_: object) -> None:
        if call.energy is not None:
            scales.setdefault(call.name, []).append(call.energy.item())

    with rule.observing(add):
        yield scales


def read_kept(state: dict[str, Any]) -> list[float]:
    """The values in a weight's part of an optimizer's state, in the order of backward."""
    key = "plywise.backward_scale"
    values = [state[f"{key}.{call}"] for call in range(state[f"{key}.count"])]
    assert f"{key}.{len(values)}" not in state
    return values


def find_scales(model: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """``E`` at each layer's calls as a first pass measures it."""
    rule = pw.BackMatching().attach(model)
    with collect_scales(rule) as scales:
        sum(out.square().sum() for out in as_tuple(model(x))).backward()
    rule.detach()
    model.zero_grad()
    return scales


def average_scales(model: nn.Module, x: Tensor, draws: int = 8) -> dict[str, float]:
    """``E`` at each layer that is called once, averaged over several random vectors."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = pw.BackMatching(measure_every=1).attach(model, optimizer)
    model(x).square().sum().backward()
    with collect_scales(rule) as scales:
        for _ in range(draws):
            optimizer.step()  # what it has measured is used in the next pass
            optimizer.zero_grad()
            model(x).square().sum().backward()
    rule.detach()
    return {name: sum(values) / draws for name, values in scales.items()}


def find_scale(model: nn.Module, x: Tensor, name: str) -> float:
    """``E`` at the output of a layer that is called once."""
    (scale,) = find_scales(model, x)[name]
    return scale


def compute_exactly(model: nn.Module, x: Tensor, name: str, rows_are_apart: bool = True) -> float:
    """``‖J‖²_F / dim`` of the map from a layer's output to the model's outputs.

    Args:
        model: a model whose outputs are its topmost layers'.
        x: its input.
        name: the layer.
        rows_are_apart: whether no sample depends on another one, so that all are differentiated at once.
    """
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: kept.append(out))
    outputs = as_tuple(model(x))
    handle.remove()
    (z,) = kept
    total = 0.0
    for output in outputs:
        entries = output.reshape(len(output), -1).sum(0) if rows_are_apart else output.reshape(-1)
        for entry in entries:
            (gradient,) = torch.autograd.grad(entry, z, retain_graph=True)
            total += gradient.square().sum().item()
    return total / z.numel()


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a model with one head or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def find_trace(layer: nn.Linear) -> float:
    """``‖W‖²_F / d``: the factor of a linear layer."""
    return (layer.weight.square().sum() / layer.in_features).item()


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)
