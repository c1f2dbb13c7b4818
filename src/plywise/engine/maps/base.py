"""What a kind of linear map must provide: its rows of A, its rows of Δ, and its gradient.

A call is a *linear map* when its output is ``Z = A Wᵀ + b`` for some rows ``A`` made from its input. The
map object describes the geometry of one kind of call (the stride of a convolution, say). Everything else,
the rules, the solvers and the capture, uses ``A``, ``W`` and ``Δ`` only.

Shapes: ``g`` groups of independent maps, ``n`` rows, ``d`` inputs and ``m`` outputs of one group. The weight
is always *canonical* here: its first dimension is ``g · m``, the others multiply to ``d``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from plywise.numerics.norms import compute_norm
from plywise.numerics.products import centre_rows, compute_lower_product


class LinearMap(ABC):
    """How one call reads as the linear map ``Z = A Wᵀ + b``.

    Maps are immutable and hold no tensors. The statistics have a slow definition here, by `rows`; override
    a statistic where the map knows a cheaper way.
    """

    kind: ClassVar[str] = "linear"
    """The name by which ``attach(kinds=...)`` selects the map."""

    rows_are_inputs: ClassVar[bool] = False
    """Whether A is the input itself (reshaped), so that ``ΔW`` is the gradient at the input."""

    sends_below: ClassVar[bool] = False
    """Whether `input_gradient` makes the gradient at the input; otherwise autograd's own graph does."""

    diagonal: ClassVar[bool] = False
    """Whether ``AᵀA`` is diagonal (an embedding's rows are one-hot); `gram_diagonal` gives it."""

    degree: ClassVar[int] = 1
    """How A grows with the input: twice the input makes A ``2 ** degree`` times as large."""

    rounds_rows: ClassVar[bool] = False
    """Whether A is computed from the input with rounding, so that the input in float64 gives a better A."""

    longest_chain: ClassVar[int] = 512
    """Products that `precise_weight_gradient` adds up one after another: the blocks of a matrix product."""

    groups: int
    """Number of independent linear maps side by side, as in a grouped convolution; 1 for most maps."""

    def cast(self, a: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the input in another dtype; indices stay indices."""
        return a.to(dtype)

    @abstractmethod
    def rows(self, a: Tensor) -> Tensor:
        """Return the rows ``A`` of shape (g, n, d), without a column for the bias."""

    @abstractmethod
    def delta_rows(self, delta: Tensor) -> Tensor:
        """Return the gradient at the output as rows, (g, n, m), in the order of `rows`."""

    @abstractmethod
    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Turn rows of Δ back into the output's shape, that of ``like``: the inverse of `delta_rows`."""

    def centre_delta(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return Δ minus the mean of its rows, in the shape of the output, and the mean (g, m)."""
        rows, mean = centre_rows(self.delta_rows(delta))
        return self.from_delta_rows(rows, delta), mean

    def scale_rows(self, delta: Tensor, factors: Tensor) -> Tensor:
        """Return Δ with row i multiplied by ``factors[:, i]``, factors (g, n)."""
        return self.from_delta_rows(self.delta_rows(delta) * factors.unsqueeze(2), delta)

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` in the shape of the weight: the gradient that autograd computes."""
        rows = self.rows(self.cast(a, delta.dtype))
        return (self.delta_rows(delta).mT @ rows).reshape(weight.shape)

    def precise_weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` in chains of at most `longest_chain` sums, for solves, which multiply rounding."""
        return self.weight_gradient(a, delta, weight)

    def input_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW`` in the shape of ``a``, for maps that send it below themselves.

        A map that leaves this to autograd is captured beside autograd's own graph, so that a rule cannot
        replace the gradient at its input, only change Δ.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the gradient at its input to autograd")

    def centred_weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` of a Δ whose columns sum to zero, from centred rows.

        An offset of the inputs adds nothing to the product, and here it costs no digits either.
        """
        rows, _ = centre_rows(self.rows(a))
        return (self.delta_rows(delta).mT @ rows).reshape(weight.shape)

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """Compute ``Δᵀ1``, (g · m,): the gradient's sum over all rows."""
        return self.delta_rows(delta).sum(1).reshape(-1)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Compute ``A Wᵀ`` in the shape of the output, without the bias."""
        raise NotImplementedError(f"{type(self).__name__} has no forward of its own")

    def width(self, weight: Tensor) -> int:
        """Return ``d``, the number of inputs that one output of a group reads."""
        return weight.shape[1:].numel()

    def row_axes(self, delta: Tensor) -> int:
        """Return how many leading dimensions of input and output may count rows that a mask can leave out."""
        return 1

    def row_count(self, delta: Tensor) -> int:
        """Return ``n``, the number of rows in this batch, from the gradient at the output."""
        return delta.numel() // max(delta.shape[-1], 1)

    def sample_count(self, a: Tensor) -> int:
        """Return the number of samples: the first dimension of the input (1 for an input without a batch)."""
        return a.shape[0] if a.dim() > 1 else 1

    def gram(self, a: Tensor) -> Tensor:
        """Compute ``AᵀA``, (g, d, d); only its lower triangle is promised."""
        return compute_lower_product(self.rows(a).mT)

    def gram_diagonal(self, a: Tensor, like: Tensor) -> Tensor:
        """Return the diagonal of ``AᵀA``, (g, d), in the dtype of ``like``; for maps that are `diagonal`."""
        raise NotImplementedError(f"the Gram matrix of {type(self).__name__} is not diagonal")

    def centred_gram(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``(A - mean)ᵀ(A - mean)``, (g, d, d), lower triangle, and the mean row (g, d).

        The rows are centred before the product, so that an offset of the inputs costs no digits.
        """
        rows = self.rows(a)
        mean = rows.mean(1)
        return compute_lower_product((rows - mean.unsqueeze(1)).mT), mean

    def sums(self, a: Tensor) -> Tensor:
        """Return the column sums of ``A``, (g, d)."""
        return self.rows(a).sum(1)

    def sample_positions(self, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """Compute `gram` and `sums` of about every ``every``-th row along each axis of positions; count them.

        ``turn`` counts the samples taken: over the turns, every position is seen equally often. Maps
        without positions give all rows.
        """
        rows = self.rows(a)
        return compute_lower_product(rows.mT), rows.sum(1), rows.shape[1]

    def square_norms(self, a: Tensor) -> Tensor:
        """Compute ``‖a_i‖²`` of each row, (g, n)."""
        return torch.linalg.vector_norm(self.rows(a), dim=2).square()

    def trace(self, a: Tensor) -> Tensor:
        """Compute ``‖A‖²_F`` of each group, (g,)."""
        return self.square_norms(a).sum(1)

    def matching_trace(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``‖J‖²_F / dim(input)`` for ``J`` the map from one sample's input to its output, a scalar.

        It is the mean factor by which a random vector's squared size changes on its way down; for a
        linear layer ``‖W‖²_F / d``.
        """
        return compute_norm(weight).square() / self.width(weight)


class LastAxisMap(LinearMap):
    """A map of the last axis; all other axes, of any number, are rows."""

    def rows(self, a: Tensor) -> Tensor:
        """Return the input, (1, n, d)."""
        return a.reshape(1, -1, a.shape[-1])

    def delta_rows(self, delta: Tensor) -> Tensor:
        """Return Δ, (1, n, m)."""
        return delta.reshape(1, -1, delta.shape[-1])

    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape of the output."""
        return rows.reshape(like.shape)

    def scale_rows(self, delta: Tensor, factors: Tensor) -> Tensor:
        """Return Δ with row i multiplied by ``factors[0, i]``."""
        return delta * factors.reshape(*delta.shape[:-1], 1)

    def row_axes(self, delta: Tensor) -> int:
        """Return the number of all axes but the last."""
        return delta.dim() - 1


def thin_axes(sizes: Sequence[int], every: int, turn: int) -> list[slice]:
    """Choose every ``every``-th place of each axis, from an offset; ``turn`` runs through the offsets.

    An axis shorter than ``every`` is kept whole.
    """
    slices = []
    for size in sizes:
        step = every if size >= every else 1
        slices.append(slice(turn % step, None, step))
        turn //= step
    return slices
