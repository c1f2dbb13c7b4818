"""Products of inputs with a weight matrix: linear layers, matmul, addmm, einsum, batched experts."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from plywise.engine.maps.base import LastAxisMap, LinearMap, thin_axes
from plywise.numerics.norms import compute_norm


@dataclass(frozen=True)
class MatrixProduct(LastAxisMap):
    """``z = a Wᵀ + b`` with inputs of any leading shape: (d), (B, d), (B, T, d), ...

    Attributes:
        sends_below: whether the map makes the gradient at its input, or autograd's own graph does. It can
            differ from call to call of one site, by the strides of the input, so it is not compared.
    """

    sends_below: bool = field(default=True, compare=False)  # type: ignore[misc]
    kind: ClassVar[str] = "linear"
    groups: ClassVar[int] = 1  # type: ignore[misc]
    rows_are_inputs: ClassVar[bool] = True

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA``."""
        if delta.dim() != 2:
            delta, a = delta.reshape(-1, delta.shape[-1]), a.reshape(-1, a.shape[-1])
        return delta.t().mm(a)

    def input_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW``."""
        if delta.dim() == 2:
            return delta.mm(weight)
        return delta.reshape(-1, delta.shape[-1]).mm(weight).reshape(a.shape)

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """Compute ``Δᵀ1``, (m,)."""
        return delta.sum(0) if delta.dim() == 2 else delta.reshape(-1, delta.shape[-1]).sum(0)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Compute ``a Wᵀ``."""
        return a @ weight.mT

    def sample_positions(self, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """Sample positions: the axes between the batch and the features (tokens, patches)."""
        a = a[(slice(None), *thin_axes(a.shape[1:-1], every, turn))] if a.dim() > 2 else a
        return self.gram(a), self.sums(a), a.numel() // max(a.shape[-1], 1)

    def trace(self, a: Tensor) -> Tensor:
        """Compute ``‖A‖²_F``, (1,)."""
        return compute_norm(a).square().reshape(1)


@dataclass(frozen=True)
class BatchedProduct(LinearMap):
    """``g`` products side by side, as experts compute them: a (g, n, d) with W (g, m, d) to (g, n, m).

    Attributes:
        groups: number of experts.
        sends_below: as for `MatrixProduct`.
    """

    groups: int
    sends_below: bool = field(default=True, compare=False)  # type: ignore[misc]
    kind: ClassVar[str] = "experts"
    rows_are_inputs: ClassVar[bool] = True

    def rows(self, a: Tensor) -> Tensor:
        """Return the input itself, (g, n, d)."""
        return a

    def delta_rows(self, delta: Tensor) -> Tensor:
        """Return Δ itself, (g, n, m)."""
        return delta

    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the rows: they are the output."""
        return rows

    def input_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW`` of each expert."""
        return delta.bmm(weight.reshape(self.groups, delta.shape[2], -1))

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Compute ``a Wᵀ`` of each expert."""
        return a.bmm(weight.reshape(self.groups, -1, a.shape[2]).mT)

    def row_axes(self, delta: Tensor) -> int:
        """Return 0: the map does not know which token is where."""
        return 0

    def row_count(self, delta: Tensor) -> int:
        """Count the rows of one expert."""
        return delta.shape[1]

    def sample_count(self, a: Tensor) -> int:
        """Count the rows of one expert: its tokens count as samples."""
        return max(a.shape[1], 1)


MATRIX_PRODUCT = MatrixProduct()
"""The map of all matrix products."""

TAPPED_PRODUCT = MatrixProduct(sends_below=False)
"""The same beside autograd's own graph."""
