"""One layer's local problem in one backward pass: the rows ``A``, the weights ``W``, the gradient ``Δ``.

A rule receives a `Ply` and answers with a `Move`, how W moves, and with what the layer below hears.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from plywise.health import Health
from plywise.layers import LayerType, lower_product


@dataclass(frozen=True)
class Move:
    """How a layer's parameters move: what stands in ``weight.grad`` and ``bias.grad`` afterwards.

    Attributes:
        weight: direction in the shape of the weight, or None if the weight is frozen.
        bias: direction in the shape of the bias, or None without a (trainable) bias.
    """

    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, weight: Tensor | float, bias: Tensor | float) -> "Move":
        """This move with the weight's and the bias's part multiplied by a scalar each."""
        return Move(
            None if self.weight is None else self.weight * weight,
            None if self.bias is None else self.bias * bias,
        )

    def matrix(self, groups: int) -> Tensor:
        """This move as one matrix (g, m, k): the weight's columns, then the bias's."""
        assert self.weight is not None
        weight = self.weight.reshape(groups, self.weight.shape[0] // groups, -1)
        if self.bias is None:
            return weight
        return torch.cat([weight, self.bias.reshape(groups, -1, 1)], 2)

    @classmethod
    def of(cls, matrix: Tensor, shape: torch.Size, has_bias: bool) -> "Move":
        """Inverse of `matrix`, for a weight of this shape."""
        width = matrix.shape[2] - has_bias
        return cls(matrix[:, :, :width].reshape(shape), matrix[:, :, -1].reshape(-1) if has_bias else None)


@dataclass
class Ply:
    """What a layer sees in one backward pass.

    Attributes:
        name: qualified name of the layer in the model.
        kind: how the layer reads as a linear map.
        module: the layer.
        a: input of the linear map, as the layer got it (see `LayerType.linear_input`).
        delta: gradient of the loss at the layer's output.
        weight: the weight that the forward used.
        has_bias: whether a bias is added.
        health: where solvers count their fallbacks.
        energy: product of the layers' matching scalars from the loss down to this layer's output
            (`plywise.graph`); None unless the rule asked for it.
        memory: what the layer remembers of earlier steps (`plywise.memory`); empty for most rules.
        waits: whether the optimizer's step will make the move from the gradient, so that backward shall
            leave the plain one.
    """

    name: str
    kind: LayerType
    module: nn.Module
    a: Tensor
    delta: Tensor
    weight: Tensor
    has_bias: bool
    health: Health
    energy: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    waits: bool = False

    def times(self, scale: float) -> "Ply":
        """The same problem with Δ multiplied by ``scale`` (cheaper than scaling a move: Δ is smaller)."""
        return self if scale == 1 else replace(self, delta=self.delta * scale)

    # ---- sizes -------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """Independent linear maps side by side, g."""
        return self.kind.groups(self.module)

    @property
    def samples(self) -> int:
        """Samples in the batch: the first dimension of the input (1 for an unbatched linear input)."""
        return self.a.shape[0] if self.a.dim() > 1 else 1

    @property
    def row_count(self) -> int:
        """Rows of A, n: samples × positions."""
        return self.kind.row_count(self.module, self.delta)

    @property
    def width(self) -> int:
        """Columns of A without the bias, d."""
        return self.kind.width(self.module, self.weight)

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
        """Dtype of statistics and solves: the layer's own, float32 at least."""
        return torch.promote_types(self.delta.dtype, torch.float32)

    # ---- the two answers of backpropagation --------------------------------------------------

    def gradient(self, delta: Tensor | None = None) -> Move:
        """``ΔᵀA`` and ``Δᵀ1``: backpropagation's move, with another Δ if given."""
        delta = self.delta if delta is None else delta
        return Move(self.weight_gradient(delta), self.bias_gradient(delta))

    def weight_gradient(self, delta: Tensor) -> Tensor:
        """``ΔᵀA`` in the shape of the weight."""
        return self.kind.weight_gradient(self.module, self.a.to(delta.dtype), delta, self.weight)

    def bias_gradient(self, delta: Tensor) -> Tensor | None:
        """``Δᵀ1``, or None without a bias."""
        return self.kind.bias_gradient(self.module, delta) if self.has_bias else None

    def below(self, delta: Tensor | None = None) -> Tensor:
        """``ΔW``: what backpropagation sends down, with another Δ if given."""
        delta = self.delta if delta is None else delta
        weight, a = self.weight.to(delta.dtype), self.a.to(delta.dtype)
        return self.kind.input_gradient(self.module, a, delta, weight)

    # ---- the layer as matrices ---------------------------------------------------------------

    def rows(self, dtype: torch.dtype) -> Tensor:
        """``[A, 1]``, (g, n, k): the rows, with a trailing 1 where there is a bias."""
        rows = self.kind.rows(self.module, self.a.to(dtype))
        if not self.has_bias:
            return rows
        return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)

    def delta_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """``Δ`` as rows, (g, n, m)."""
        return self.kind.delta_rows(self.module, self.delta.to(dtype or self.dtype))

    def from_delta_rows(self, rows: Tensor) -> Tensor:
        """Rows of another Δ in the shape and dtype of this layer's output."""
        return self.kind.from_delta_rows(self.module, rows, self.delta).to(self.delta.dtype)

    def matrix(self, move: Move) -> Tensor:
        """A move as one matrix (g, m, k): the weight's columns, then the bias's."""
        return move.matrix(self.groups)

    def move(self, matrix: Tensor) -> Move:
        """Inverse of `matrix`."""
        return Move.of(matrix, self.weight.shape, self.has_bias)

    # ---- statistics of the rows --------------------------------------------------------------

    def gram(self, dtype: torch.dtype) -> Tensor:
        """``[A,1]ᵀ[A,1]``, (g, k, k); its lower triangle is promised."""
        a = self.a.to(dtype)
        gram = self.kind.gram(self.module, a)
        return self._bordered(gram, self.kind.sums(self.module, a), self.row_count) if self.has_bias else gram

    def _bordered(self, gram: Tensor, sums: Tensor, rows: int) -> Tensor:
        """The Gram with the row of the bias's column of ones below it."""
        border = torch.cat([sums, sums.new_full((self.groups, 1), rows)], 1).unsqueeze(1)
        return torch.cat([torch.nn.functional.pad(gram, (0, 1)), border], 1)

    def sampled_gram(self, dtype: torch.dtype, every: int, turn: int) -> tuple[Tensor, int]:
        """`gram` of a sample of the rows, and how many they are (see `LayerType.sample`)."""
        gram, sums, rows = self.kind.sample(self.module, self.a.to(dtype), every, turn)
        return (self._bordered(gram, sums, rows) if self.has_bias else gram), rows

    def dual_gram(self, dtype: torch.dtype) -> Tensor:
        """``[A,1][A,1]ᵀ``, (g, n, n); its lower triangle is promised."""
        gram = lower_product(self.kind.rows(self.module, self.a.to(dtype)))
        return gram.add_(1) if self.has_bias else gram

    def mean_row(self, dtype: torch.dtype) -> Tensor:
        """Mean of the rows of A, (g, d)."""
        return self.kind.sums(self.module, self.a.to(dtype)) / self.row_count

    def square_norms(self) -> Tensor:
        """``‖[a_i, 1]‖²`` of each row, (g, n)."""
        return self.kind.square_norms(self.module, self.a.to(self.dtype)) + int(self.has_bias)

    def trace(self) -> Tensor:
        """``‖[A,1]‖²_F``, (g,)."""
        trace = self.kind.trace(self.module, self.a.to(self.dtype))
        return trace + self.row_count if self.has_bias else trace
