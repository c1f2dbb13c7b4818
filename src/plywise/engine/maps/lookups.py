"""Embeddings: rows of A are one-hot, or sums of one-hot rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plywise.engine.maps.base import LastAxisMap, LinearMap


@dataclass(frozen=True)
class Embedding(LastAxisMap):
    """A table lookup: ``a`` holds indices of any shape, the canonical weight is (m, entries).

    ``AᵀA`` is the diagonal of counts, so that every exact solve is a division.

    Attributes:
        entries: rows of the table, d.
        padding: the index whose row gets no gradient, or None.
    """

    entries: int
    padding: int | None = None
    kind: ClassVar[str] = "embedding"
    groups: ClassVar[int] = 1  # type: ignore[misc]
    diagonal: ClassVar[bool] = True

    def cast(self, a: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the indices: they stay indices."""
        return a

    def _one_hot(self, a: Tensor, dtype: torch.dtype) -> Tensor:
        rows = torch.zeros(a.numel(), self.entries, dtype=dtype, device=a.device)
        rows.scatter_(1, a.reshape(-1, 1), 1.0)
        if self.padding is not None:
            rows[:, self.padding] = 0
        return rows

    def rows(self, a: Tensor) -> Tensor:
        """Return one-hot rows, (1, n, entries), in float32."""
        return self._one_hot(a, torch.float32).unsqueeze(0)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Look up a row for each index; padding gives zeros."""
        found = weight.mT[a]
        return found if self.padding is None else found * (a != self.padding).unsqueeze(-1)

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA``: Δ summed by index."""
        flat, rows = a.reshape(-1), delta.reshape(-1, delta.shape[-1])
        sums = torch.zeros(self.entries, delta.shape[-1], dtype=delta.dtype, device=delta.device)
        sums.index_add_(0, flat, rows)
        if self.padding is not None:
            sums[self.padding] = 0
        return sums.t()

    def gram_diagonal(self, a: Tensor, like: Tensor) -> Tensor:
        """Return how often each index occurs, (1, entries)."""
        counts = torch.bincount(a.reshape(-1), minlength=self.entries).to(like.dtype)
        if self.padding is not None:
            counts[self.padding] = 0
        return counts.unsqueeze(0)

    def gram(self, a: Tensor) -> Tensor:
        """Return the diagonal of counts as a matrix."""
        return torch.diag_embed(self.gram_diagonal(a, torch.empty(0, device=a.device)))

    def sums(self, a: Tensor) -> Tensor:
        """Return the counts."""
        return self.gram_diagonal(a, torch.empty(0, device=a.device))

    def sample_positions(self, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """Return all rows: counting is cheap."""
        return self.gram(a), self.sums(a), a.numel()

    def square_norms(self, a: Tensor) -> Tensor:
        """Return 1 for each index, 0 for padding."""
        flat = a.reshape(1, -1)
        norms = torch.ones(flat.shape, device=a.device)
        return norms if self.padding is None else norms * (flat != self.padding)

    def matching_trace(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Return 1: indices have no gradient, so nothing is sent below."""
        return torch.ones((), device=delta.device)

    def sample_count(self, a: Tensor) -> int:
        """Return the first dimension of the indices."""
        return a.shape[0] if a.dim() else 1


@dataclass(frozen=True)
class EmbeddingBag(LinearMap):
    """Sums or means of table rows: ``a`` is the bags' own matrix (n, entries) of weights.

    Attributes:
        entries: rows of the table, d.
    """

    entries: int
    kind: ClassVar[str] = "embedding"
    groups: ClassVar[int] = 1  # type: ignore[misc]

    def rows(self, a: Tensor) -> Tensor:
        """Return the bags' weights, (1, n, entries)."""
        return a.unsqueeze(0)

    def delta_rows(self, delta: Tensor) -> Tensor:
        """Return Δ, (1, n, m)."""
        return delta.unsqueeze(0)

    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the rows: they are the output."""
        return rows.reshape(like.shape)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Return the bags' sums."""
        return a @ weight.mT
