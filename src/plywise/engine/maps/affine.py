"""The elementwise affine map of a norm, and the bilinear map."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plywise.engine.maps.base import LastAxisMap, LinearMap
from plywise.numerics.norms import compute_norm


@dataclass(frozen=True)
class ElementwiseAffine(LinearMap):
    """``z_j = γ_j x̂_j + β_j``: for each feature a map of one input, whose Gram with the bias is 2 x 2.

    ``a`` is the normalised input x̂. The canonical weight is (features, 1).

    Attributes:
        groups: number of features, g.
        axis: where the features are: 1 for (B, C, ...), -1 for features in the last axes.
    """

    groups: int
    axis: int
    kind: ClassVar[str] = "norm"

    def _sum_by_feature(self, x: Tensor) -> Tensor:
        """Return the sum of each feature's entries, (features,), without a copy and in autograd's order."""
        if self.axis == 1:
            return x.sum([0, *range(2, x.dim())]) if x.dim() > 1 else x
        axes = self.row_axes(x)
        return x.sum(list(range(axes))).reshape(-1) if axes else x.reshape(-1)

    def _features_first(self, x: Tensor) -> Tensor:
        if self.axis == 1:
            return x.transpose(0, 1).reshape(self.groups, -1) if x.dim() > 1 else x.reshape(self.groups, -1)
        return x.reshape(-1, self.groups).t()

    def rows(self, a: Tensor) -> Tensor:
        """Return x̂ by feature, (features, n, 1)."""
        return self._features_first(a).unsqueeze(2)

    def delta_rows(self, delta: Tensor) -> Tensor:
        """Return Δ by feature, (features, n, 1)."""
        return self._features_first(delta).unsqueeze(2)

    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape of the output."""
        flat = rows.squeeze(2)
        if self.axis == 1 and like.dim() > 1:
            batch, features, *rest = like.shape
            return flat.reshape(features, batch, *rest).transpose(0, 1)
        return flat.t().reshape(like.shape)

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``Σ δ x̂`` of each feature."""
        return self._sum_by_feature(delta * a).reshape(weight.shape)  # in autograd's order

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """Compute ``Σ δ`` of each feature."""
        return self._sum_by_feature(delta)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Compute ``γ x̂``."""
        if self.axis == 1 and a.dim() > 1:
            return a * weight.reshape(1, -1, *[1] * (a.dim() - 2))
        return (a.reshape(-1, self.groups) * weight.reshape(-1)).reshape(a.shape)

    def row_axes(self, delta: Tensor) -> int:
        """Return how many axes come before the features."""
        if self.axis == 1:
            return 1
        axes, features = delta.dim(), 1
        while axes and features < self.groups:
            axes -= 1
            features *= delta.shape[axes]
        return axes

    def row_count(self, delta: Tensor) -> int:
        """Count the entries of one feature."""
        return delta.numel() // max(self.groups, 1)

    def gram(self, a: Tensor) -> Tensor:
        """Compute ``Σ x̂²`` of each feature, (features, 1, 1)."""
        return self.trace(a)[:, None, None]

    def trace(self, a: Tensor) -> Tensor:
        """Compute ``Σ x̂²`` of each feature."""
        return self._sum_by_feature(a.square())

    def matching_trace(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Return the mean γ², the norm's own part of the factor."""
        return weight.square().mean()


@dataclass(frozen=True)
class Bilinear(LastAxisMap):
    """``z_k = x₁ᵀ W_k x₂ + b_k``: rows are the products of both inputs' entries, d = d₁ d₂.

    ``a`` is both inputs side by side, (..., d₁ + d₂), because products in float32 have lost what solves in
    float64 need: with an offset c in both inputs, they are rounded by c² times float32's precision.

    Attributes:
        split: d₁.
    """

    split: int
    kind: ClassVar[str] = "bilinear"
    degree: ClassVar[int] = 2
    rounds_rows: ClassVar[bool] = True
    groups: ClassVar[int] = 1  # type: ignore[misc]

    def rows(self, a: Tensor) -> Tensor:
        """Return the products, (1, n, d₁ d₂)."""
        flat = super().rows(a)
        first, second = flat[..., : self.split], flat[..., self.split :]
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Return the products times the flattened weights."""
        return (self.rows(a) @ weight.reshape(len(weight), -1).mT).reshape(*a.shape[:-1], len(weight))

    def matching_trace(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``‖W‖²_F / d``, d of the products."""
        return compute_norm(weight).square() / max(math.prod(weight.shape[1:]), 1)
