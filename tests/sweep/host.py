"""A module between linear layers: a projection onto each tensor it reads, and a layer after each output."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .database import Sample, copy_arguments, make_module
from .passes import UnusableError, is_finite, quiet, run_pass, seeded

WIDEST_FLATTENED = 64
"""A projection of a sample's entries is no wider than this; beyond it the last dimension is projected."""


class Host(nn.Module):
    """``after(inner(before(x)))``, called with the arguments that ``inner`` takes.

    Args:
        inner: the module under test.
        before: the layer that makes each tensor that ``inner`` reads, by its place among the arguments.
        after: the layer that reads each output, by its place among the outputs.
        flat: whether a layer reads all entries of a sample in one row, or only the last dimension.
    """

    def __init__(
        self, inner: nn.Module, before: dict[int, nn.Linear], after: dict[int, nn.Linear], flat: bool
    ) -> None:
        super().__init__()
        self.before = nn.ModuleDict({str(place): layer for place, layer in before.items()})
        self.inner = inner
        self.after = nn.ModuleDict({str(place): layer for place, layer in after.items()})
        self.flat = flat

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        leaves, form = tree_flatten((args, kwargs))
        projected: dict[int, Tensor] = {}
        for place, layer in self.before.items():
            leaf = leaves[int(place)]
            rows = as_rows(leaf, self.flat and layer.in_features != width_of(leaf, False))
            projected[id(leaf)] = layer(rows).reshape(leaf.shape)
        args, kwargs = tree_unflatten([projected.get(id(leaf), leaf) for leaf in leaves], form)
        outputs, _ = tree_flatten(self.inner(*args, **kwargs))
        if not self.after:
            return tuple(output for output in outputs if isinstance(output, Tensor))
        return tuple(layer(as_rows(outputs[int(place)], self.flat)) for place, layer in self.after.items())


def as_rows(tensor: Tensor, flat: bool) -> Tensor:
    """The tensor as a linear layer reads it."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.flatten(1) if flat else tensor


def width_of(tensor: Tensor, flat: bool) -> int:
    """Entries in one row of `as_rows`."""
    return as_rows(tensor, flat).shape[-1]


def make_host(sample: Sample, *, alone: bool = False) -> Host:
    """The sample's module between linear layers, or with one only after it if plain torch fails otherwise.

    With ``alone``, no layer is put before it or after it.

    Raises:
        UnusableError: plain torch cannot run the module itself.
    """
    inner = make_module(sample)
    args, kwargs = copy_arguments(sample)
    flat = sample.index % 2 == 0
    with seeded(13), quiet():
        try:
            outputs, _ = tree_flatten(inner(*args, **kwargs))  # makes the weights of a lazy module, too
        except Exception as error:
            raise UnusableError(f"plain forward raises {type(error).__name__}") from error
        if alone:
            return Host(inner, {}, {}, flat).train(sample.training)
        after = {place: make_after(output, flat) for place, output in enumerate(outputs) if is_read(output)}
        for noise in (0.1, 0.0):
            # without noise the module reads its own inputs to the last bit: losses of probabilities need that
            host = Host(inner, make_before((args, kwargs), flat, noise), after, flat)
            if runs(host, args, kwargs):
                return host.train(sample.training)
    return Host(inner, {}, after, flat).train(sample.training)


def is_read(output: Any) -> bool:
    """Whether a linear layer can read this output."""
    return isinstance(output, Tensor) and output.is_floating_point() and output.numel() > 0


def make_after(output: Tensor, flat: bool) -> nn.Linear:
    return nn.Linear(width_of(output, flat), 2, dtype=output.dtype)


def make_before(arguments: Any, flat: bool, noise: float) -> dict[int, nn.Linear]:
    """A layer near the identity for each tensor with a gradient, one for a tensor that stands there twice."""
    leaves, _ = tree_flatten(arguments)
    before: dict[int, nn.Linear] = {}
    met: set[int] = set()
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.numel() and id(leaf) not in met:
            met.add(id(leaf))
            wide = width_of(leaf, flat)
            width = wide if wide <= WIDEST_FLATTENED else width_of(leaf, False)
            before[place] = make_near_identity(width, leaf.dtype, noise)
    return before


def make_near_identity(width: int, dtype: torch.dtype, noise: float) -> nn.Linear:
    layer = nn.Linear(width, width, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width, dtype=dtype) + noise * torch.randn(width, width, dtype=dtype))
        layer.bias.copy_(noise * torch.randn(width, dtype=dtype))
    return layer


def runs(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether plain torch runs the model forward and backward with finite gradients."""
    try:
        return is_finite(run_pass(model, args, kwargs))
    except Exception:
        return False
