"""Gathers what a diagnosis says about one layer, batch by batch."""

import math
import statistics

import torch
from torch import Tensor, nn

from plywise.arena.diagnostics.covariance import MOST_GROUPS, Covariance
from plywise.engine.call import LinearCall

MOST_ROWS = 1024
"""Rows of a layer's inputs that one batch adds to the covariance; a convolution has thousands of them."""


class LayerRecord:
    """Sums over the calls of one layer, batch by batch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.width = 0
        self.calls, self.place = 0, 0
        self.rows = self.samples = self.entries = 0
        self.squares, self.reached = 0.0, False
        self.has_gradient: Tensor | None = None
        self.covariance = Covariance()
        self.gradient: Tensor | None = None  # of this batch: one layer may be called several times
        self.gradients: Tensor | None = None  # their sum over the batches
        self.norms: list[float] = []

    @property
    def weight(self) -> Tensor:
        """The layer's weight, which a lazy layer makes in its first forward."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    def add(self, call: LinearCall) -> None:
        """Add one call."""
        delta = call.delta.detach()
        self.calls += 1
        self.rows, self.samples = self.rows + call.row_count, self.samples + call.samples
        self.entries += delta.numel()
        self.squares += euclidean_norm(delta) ** 2
        has_gradient = call.map.bias_gradient(delta.abs()) != 0
        self.width = call.width
        self.has_gradient = has_gradient if self.has_gradient is None else self.has_gradient | has_gradient
        self.covariance.add(self._sampled_rows(call))
        if self.weight.requires_grad:
            gradient = call.weight_gradient(delta).detach().to(call.dtype)
            self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def _sampled_rows(self, call: LinearCall) -> Tensor:
        """Return some of the rows, (g, n, d), made of some samples only if all would make too many."""
        positions = max(1, call.row_count // max(1, call.samples))
        a = call.a if call.a.dim() > 1 else call.a[None]
        rows = call.map.rows(a[: max(1, MOST_ROWS // positions)].detach())
        return rows[:MOST_GROUPS, :: math.ceil(rows.shape[1] / MOST_ROWS) or 1]

    def end_batch(self, reached: set[int]) -> None:
        """The batch's gradient is complete; ``reached`` are the parameters that have one."""
        self.reached |= id(self.weight) in reached
        if self.gradient is not None:
            self.norms.append(euclidean_norm(self.gradient))
            self.gradients = self.gradient if self.gradients is None else self.gradients + self.gradient
            self.gradient = None

    def norm(self) -> float | None:
        """Norm of a sample's backward value."""
        return math.sqrt(self.squares / self.samples) if self.samples else None

    def noise(self) -> float | None:
        """Share of a gradient's mean square norm that is its variance, estimated without bias."""
        count = len(self.norms)
        if count < 2 or self.gradients is None or not any(self.norms):
            return None
        whole = statistics.fmean(norm**2 for norm in self.norms)
        mean = (euclidean_norm(self.gradients) / count) ** 2
        return min(1.0, max(0.0, whole - mean) * count / (count - 1) / whole)


def euclidean_norm(tensor: Tensor) -> float:
    """Euclidean norm; tiny gradients do not underflow on the way."""
    tensor = tensor.float()
    largest = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
    return float(largest) * float(torch.linalg.vector_norm(tensor / largest)) if float(largest) else 0.0
