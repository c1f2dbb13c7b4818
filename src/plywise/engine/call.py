"""What a rule gets of one captured call: the rows ``A``, the weights ``W``, the gradient ``Δ``.

A rule receives a `LinearCall`. It returns an `Update`, the change of W, and the gradient at the call's input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from plywise.engine.health import Health
from plywise.engine.maps.base import LinearMap
from plywise.numerics.products import compute_lower_product


@dataclass(frozen=True, slots=True)
class Update:
    """A layer's update: the values that ``weight.grad`` and ``bias.grad`` get.

    Attributes:
        weight: direction in the shape of the canonical weight, or None if the weight is frozen.
        bias: direction in the shape of the bias, or None without a (trainable) bias.
    """

    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, weight: Tensor | float, bias: Tensor | float) -> "Update":
        """Return this update with the weight's and the bias's part multiplied by a scalar each."""
        return Update(
            None if self.weight is None else self.weight * weight,
            None if self.bias is None else self.bias * bias,
        )

    def matrix(self, groups: int) -> Tensor:
        """Return this update as one matrix (g, m, k): the weight's columns, then the bias's."""
        assert self.weight is not None
        weight = self.weight.reshape(groups, self.weight.shape[0] // groups, -1)
        if self.bias is None:
            return weight
        return torch.cat([weight, self.bias.reshape(groups, -1, 1)], 2)

    @classmethod
    def of(cls, matrix: Tensor, shape: torch.Size, has_bias: bool) -> "Update":
        """Make an update from one matrix, the inverse of `matrix`, for a weight of this shape."""
        width = matrix.shape[2] - has_bias
        return cls(matrix[:, :, :width].reshape(shape), matrix[:, :, -1].reshape(-1) if has_bias else None)


@dataclass(slots=True)
class LinearCall:
    """One call of a linear map in one backward pass, as a rule gets it.

    Attributes:
        name: name of the layer: the module's path, or that of the parameter.
        map: the linear map that describes the call.
        a: input of the linear map.
        delta: gradient of the loss at the call's output.
        weight: the canonical weight (g · m, ...) that the forward used.
        has_bias: whether a trainable bias is added.
        health: where solvers count their fallbacks.
        module: the module that owns the weight, or None for a weight that no module owns.
        energy: mean square of a random backward value at this output (`plywise.engine.backward_scale`);
            None unless the rule asked for it.
        memory: the layer's running state (`plywise.engine.contract.StatefulRule`); empty for most rules.
        waits: whether the optimizer's step will make the update from the gradient, so that backward must
            leave the plain one.
        samples: samples in the batch, one number for all calls of a backward pass: the first dimension of
            the topmost call's input (1 for an unbatched linear input). A call below may have flattened
            tokens, which are not samples. Where it is not given, the first dimension of this call's input.
        is_topmost: whether it is a call of the layer that the running backward met first: the last layer.
        thin: gives a sample of the inputs by positions (see `LinearMap.sample_positions`), where rows that do
            not count have been taken out of ``a``, so that positions are not known any more.
        answer: the rule's update, once it has been made, so that what is gathered can tell its error.
        counted: for a rule with running state, this call without the rows that a mask leaves out; None if
            there is no mask. The gradient is that of all rows, and statistics are those of these.
    """

    name: str
    map: LinearMap
    a: Tensor
    delta: Tensor
    weight: Tensor
    has_bias: bool
    health: Health
    module: nn.Module | None = None
    energy: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    waits: bool = False
    samples: int = 0
    is_topmost: bool = False
    thin: Callable[[int, int], Tensor] | None = None
    answer: "Update | None" = None
    counted: "LinearCall | None" = None

    def __post_init__(self) -> None:
        if not self.samples:
            self.samples = self.map.sample_count(self.a)

    def times(self, scale: float) -> "LinearCall":
        """Return the same problem with Δ multiplied by ``scale``: cheaper than to scale an update.

        Half precision would round the product, or could not hold it, so Δ is then in the dtype of solves.
        """
        return self if scale == 1 else replace(self, delta=self.delta.to(self.dtype) * scale)

    # ---- sizes -------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """Independent linear maps side by side, g."""
        return self.map.groups

    @property
    def row_count(self) -> int:
        """Rows of A, n: samples × positions."""
        return self.map.row_count(self.delta)

    @property
    def width(self) -> int:
        """Columns of A without the bias, d."""
        return self.map.width(self.weight)

    @property
    def columns(self) -> int:
        """Columns of A with the bias's column of ones."""
        return self.width + self.has_bias

    @property
    def outputs(self) -> int:
        """Outputs of one group, m."""
        return self.weight.shape[0] // self.groups

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of statistics and solves: the call's own, float32 at least."""
        return torch.promote_types(self.delta.dtype, torch.float32)

    # ---- the two answers of backpropagation --------------------------------------------------

    def gradient(self, delta: Tensor | None = None) -> Update:
        """Compute ``ΔᵀA`` and ``Δᵀ1``: backpropagation's update, with another Δ if given."""
        delta = self.delta if delta is None else delta
        return Update(self.weight_gradient(delta), self.bias_gradient(delta))

    def precise_gradient(self, delta: Tensor) -> Update:
        """Compute `gradient` with less rounding, for solves, in the dtype of ``delta``."""
        weight = self.map.precise_weight_gradient(self.cast_input(delta.dtype), delta, self.weight)
        return Update(weight, self.bias_gradient(delta))

    def weight_gradient(self, delta: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` in the shape of the weight, in the dtype of ``delta``."""
        return self.map.weight_gradient(self.cast_input(delta.dtype), delta, self.weight)

    def bias_gradient(self, delta: Tensor) -> Tensor | None:
        """Compute ``Δᵀ1``, or None without a bias."""
        return self.map.bias_gradient(delta) if self.has_bias else None

    def input_gradient(self, delta: Tensor | None = None) -> Tensor:
        """Compute ``ΔW``: what backpropagation sends down, with another Δ if given."""
        delta = self.delta if delta is None else delta
        if not self.map.sends_below:
            return delta  # autograd's own graph goes on from it
        a, weight, dtype = self.a, self.weight, delta.dtype
        if a.dtype != dtype or weight.dtype != dtype:
            a, weight = a.to(dtype), weight.to(dtype)
        return self.map.input_gradient(a, delta, weight)

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Compute ``A Wᵀ`` of another input or another weight."""
        return self.map.apply(a, weight)

    def cast_input(self, dtype: torch.dtype) -> Tensor:
        """Return the input in this dtype; indices stay indices."""
        return self.a if self.a.dtype == dtype else self.map.cast(self.a, dtype)

    # ---- the call as matrices ----------------------------------------------------------------

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Compute ``[A, 1]``, (g, n, k): the rows, with a trailing 1 where there is a bias."""
        rows = self.map.rows(self.cast_input(dtype)).to(dtype)
        return _append_ones(rows) if self.has_bias else rows

    def delta_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """Compute ``Δ`` as rows, (g, n, m)."""
        return self.map.delta_rows(self.delta.to(dtype or self.dtype))

    def from_delta_rows(self, rows: Tensor) -> Tensor:
        """Return rows of another Δ in the shape of this call's output, in their dtype until they meet A."""
        return self.map.from_delta_rows(rows, self.delta)

    def scale_rows(self, factors: Tensor) -> Tensor:
        """Return Δ with row i multiplied by ``factors[:, i]``, in the dtype of solves."""
        return self.map.scale_rows(self.delta.to(self.dtype), factors)

    def matrix(self, update: Update) -> Tensor:
        """Return an update as one matrix (g, m, k): the weight's columns, then the bias's."""
        return update.matrix(self.groups)

    def update(self, matrix: Tensor) -> Update:
        """Make an update from one matrix, the inverse of `matrix`."""
        return Update.of(matrix, self.weight.shape, self.has_bias)

    # ---- statistics of the rows --------------------------------------------------------------

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Compute ``[A,1]ᵀ[A,1]``, (g, k, k); its lower triangle is promised."""
        return self._make_gram(self.cast_input(dtype), self.row_count, dtype)

    def _make_gram(self, a: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Compute `gram` of an input of ``count`` rows."""
        if not self.has_bias:
            return self.map.gram(a).to(dtype)
        if self.map.rows_are_inputs:  # to copy the rows costs less than to copy their Gram
            return compute_lower_product(_append_ones(self.map.rows(a).to(dtype)).mT)
        return self._add_border(self.map.gram(a).to(dtype), self.map.sums(a), count)

    def _add_border(self, gram: Tensor, sums: Tensor, count: int) -> Tensor:
        """Return the Gram with the row of the bias's column of ones below it."""
        size = gram.shape[1]
        whole = gram.new_empty(self.groups, size + 1, size + 1)
        whole[:, :size, :size] = gram
        whole[:, :size, size] = 0
        whole[:, size, :size] = sums
        whole[:, size, size] = count
        return whole

    def sampled_gram(self, dtype: torch.dtype, every: int, turn: int) -> tuple[Tensor, int]:
        """Compute `gram` of a sample of the rows; count these (see `LinearMap.sample_positions`)."""
        if self.thin is not None:
            a = self.map.cast(self.thin(every, turn), dtype)
            return self._make_gram(a, len(a), dtype), len(a)
        if self.map.rows_are_inputs and self.a.dim() == 2:  # it has no positions
            return self.gram(dtype), self.row_count
        gram, sums, rows = self.map.sample_positions(self.cast_input(dtype), every, turn)
        gram = gram.to(dtype)
        return (self._add_border(gram, sums, rows) if self.has_bias else gram), rows

    def dual_gram(self, dtype: torch.dtype) -> Tensor:
        """Compute ``[A,1][A,1]ᵀ``, (g, n, n); its lower triangle is promised."""
        gram = compute_lower_product(self.map.rows(self.cast_input(dtype)).to(dtype))
        return gram.add_(1) if self.has_bias else gram

    def mean_row(self, dtype: torch.dtype) -> Tensor:
        """Return the mean of the rows of A, (g, d)."""
        return self.map.sums(self.cast_input(dtype)).to(dtype) / self.row_count

    def square_norms(self) -> Tensor:
        """Compute ``‖[a_i, 1]‖²`` of each row, (g, n)."""
        norms = self.map.square_norms(self.cast_input(self.dtype)).to(self.dtype)
        return norms + 1 if self.has_bias else norms

    def trace(self, with_bias: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Compute ``‖[A,1]‖²_F``, (g,); without the column of ones if asked."""
        dtype = dtype or self.dtype
        trace = self.map.trace(self.cast_input(dtype)).to(dtype)
        return trace + self.row_count if self.has_bias and with_bias else trace

    def matching_trace(self) -> Tensor:
        """Compute ``‖J‖²_F / dim(input)`` of this call's map, see `LinearMap.matching_trace`."""
        return self.map.matching_trace(self.a, self.delta, self.weight)


def _append_ones(rows: Tensor) -> Tensor:
    """Return rows (g, n, d) with a trailing 1."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
