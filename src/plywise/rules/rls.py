"""RLS: recursive least squares for each layer; rank-one corrections keep an inverse up to date."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.engine.contract import ROUNDING_ERROR, Evidence, LayerShape, Shapes, State
from plywise.engine.explain import Size
from plywise.engine.finite import measure_norms
from plywise.engine.rule import StatefulRule, require_positive
from plywise.numerics.precise_matrix import multiply_precisely, subtract_outer_product
from plywise.rules._kronecker import precondition_gradient

LARGEST_ENERGY = 1e4
"""Largest κ ū·Pū. A correction cancels all of P but one part in this, and float32 has seven digits."""

LARGEST_LOSS = 100.0
"""Largest κ ‖ū‖² max P up to which P is corrected in float32: 300 steps leave errors of 10⁻⁵ at most."""

PRODUCT_ROUNDING = 1.0
"""Errors of P and of products with it, in units of the precision of P's largest entry."""

SUM_ROUNDING = 0.3
"""Errors of G, in units of the precision of ``√n ‖Δ‖ ‖ū‖``."""


@dataclass(frozen=True, eq=False)
class RLS(StatefulRule):
    """Recursive least squares with the average approximation.

    Idea: each layer is an adaptive filter with a long memory. P, the inverse of the inputs' discounted
        autocorrelation, multiplies the gradient. Each step corrects P by a matrix of rank one, made from the
        mean input of the batch in place of all its rows.
    Equation: D = G P / h, h = λ + κ ū·Pū; then P ← (P - (κ/h) Pū (Pū)ᵀ) / λ, ū the mean of the rows
        [input, 1] over batch and positions. The layer below receives ΔW.
    Use when: a cubic cost is too much, and the inputs share a strong mean direction.
    Do not use when: correlations beyond the mean matter: Foof and FeatureWhitening use them.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. Recurrent layers after ``plywise.nn.unroll(model)``:
        each weight has one P, and ū is the mean over batch and time. Of computed weights (weight norm,
        pruning) and of weights used in several ways, each use has its own P, and h is computed from the
        call's own mean input.
    Cost: no inverse: 2k² operations for P and a product with the smaller of rows and gradient, in each step.
    Status: after the paper, whose body could not be read: the recursion is classical, with the paper's
        average approximation. Its abstract names two improved methods, which are not public: momentum and
        weight decay are left to the optimizer. The mean over time in recurrent layers, the defaults and the
        bounds on P are ours.
    Source: Zhang, Song, Zhou, Ou, Deng, Yang, "Revisiting Recursive Least Squares for Training Deep Neural
        Networks", arXiv 2109.03220 (2021).
    Code: none found.
    Results: the paper's could not be read. Ours: AdamW's best validation loss in 200 of its 450 steps on
        Fashion-MNIST, 120 of 156 on CIFAR-10 (benchmarks/README.md). Hardly ever reaches a target of the
        arena (benchmarks/arena/README.md).
    Limits: with λ < 1, P grows along directions that no input has any more (wind-up); its trace is held below
        k/δ. Where κ ū·Pū exceeds 10⁴, δ is raised until it does not; otherwise P would consist of rounding
        errors. In float32 updates are precise to 10⁻⁷ κ ū·Pū, relative to their size (up to 2·10⁻³);
        ``rule.health`` counts those that may be off by more than 10⁻⁴. Errors of P
        itself do not add up: P is corrected in float64 where inputs have an offset. Centre inputs that have a
        large offset. The optimizer's rate is the paper's η; our gradient is that of the
        mean loss.

    Args:
        forgetting: λ, how much of the autocorrelation stays at each step; at most 1. Default 1. Range 0.99 to
            1.
        gain: κ, the weight of a step's mean input (k in the paper). Default 0.1. Range 0.01 to 10.
        ridge: δ, the autocorrelation's diagonal at the start, P₀ = I/δ. Default 1. Range 0.01 to 100.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rule = pw.RLS().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    forgetting: float = 1.0  # λ
    gain: float = 0.1  # κ; k in the paper
    ridge: float = 1.0  # δ

    def __post_init__(self) -> None:
        require_positive(self, forgetting=self.forgetting, gain=self.gain, ridge=self.ridge)
        if self.forgetting > 1:
            raise ValueError(f"RLS: forgetting must be at most 1, not {self.forgetting!r}.")

    acts_alone: ClassVar[bool] = True

    later_statistics: ClassVar[frozenset[str]] = frozenset({"inverse.rest"})

    def update(self, call: LinearCall) -> Update:
        """Return ``G P`` of the steps before, divided by the call's own ``h`` if no step does that."""
        if call.memory:
            move = precondition_gradient(call, None, call.memory["inverse"])
        else:
            move = call.gradient(call.delta.to(call.dtype)).scaled(1 / self.ridge, 1 / self.ridge)
        if call.waits:
            return move
        _, energy, fit = self._measure(call.memory, self.gather(call.counted or call, 0))
        h = ((self.forgetting + energy * fit) / fit).to(call.dtype)
        if call.groups == 1:
            return move.scaled(1 / h, 1 / h)
        return call.update(call.matrix(move) / h.reshape(-1, 1, 1))

    def gather(self, call: LinearCall, turn: int) -> Evidence:
        """Return the sum of the rows."""
        a = call.cast_input(call.dtype)
        sums = call.map.sums(a).to(call.dtype)
        rows = sums.new_tensor(float(call.row_count))
        if call.has_bias:
            sums = torch.cat([sums, rows.expand(call.groups, 1)], 1)
        return {"rows": rows, "sum": sums, "rounding": self._estimate_rounding(call, sums / rows)}

    def _estimate_rounding(self, call: LinearCall, mean: Tensor) -> Tensor:
        """The error of ``G P`` and its norm: P all but cancels the part ``Δᵀ1 ū`` of G. Both are rounded."""
        if call.answer is None or call.answer.weight is None:
            return mean.new_zeros(2)
        parts = [part for part in (call.answer.weight, call.answer.bias) if part is not None]
        numbers = [call.map.bias_gradient(call.delta), call.delta, mean, *parts]
        total, delta, length, *sizes = measure_norms(numbers).double()
        error = (
            torch.hypot(total, SUM_ROUNDING * call.row_count**0.5 * delta)
            * length
            * self._measure_unit(call.memory, mean)
        )
        return torch.stack([error, torch.stack(sizes).norm()]).to(mean)

    def _measure_unit(self, memory: State, like: Tensor) -> Tensor | float:
        """Return the rounding of P's entries, in float64: what the largest of them loses."""
        unit = PRODUCT_ROUNDING * torch.finfo(like.dtype).eps
        if "inverse" not in memory:
            return unit / self.ridge
        return _read_diagonal(memory["inverse"]).amax().double() * unit

    def learn(self, memory: State, evidence: Evidence) -> State:
        """Return the rank-one correction of P.

        P keeps what it rounds. Where inputs have an offset, float32 would soon hold little but rounding
        errors: there, P is corrected in float64, and what float32 cannot hold of it is a second matrix.
        """
        image, energy, fit = self._measure(memory, evidence)
        matrix, rest = self._read_inverse(memory, evidence["sum"])
        size, h = matrix.shape[1], self.forgetting + energy * fit
        factor = fit / self.forgetting
        step = image * (fit * (self.gain / (h * self.forgetting)).sqrt()).unsqueeze(1)
        before = (_read_diagonal(matrix) + _read_diagonal(rest).to(step)) * factor.unsqueeze(1)
        after = before - step.square()
        if self.forgetting < 1:
            held = (size / self.ridge / after.sum(1)).clamp(max=1)
            factor, step, after = factor * held, step * held.sqrt().unsqueeze(1), after * held.unsqueeze(1)
        error = self._add_up_rounding(memory, evidence, fit / h, before / after)
        matrix, rest = subtract_outer_product(matrix, rest, factor, step)
        return {"inverse": matrix, "inverse.rest": rest, "h": (h / fit).to(matrix), ROUNDING_ERROR: error}

    def _add_up_rounding(
        self, memory: State, evidence: Evidence, fit_over_h: Tensor, losses: Tensor
    ) -> Tensor:
        """Return the relative errors of h, of ``G P`` and of the corrected P, a scalar.

        Args:
            memory: the state before this step.
            evidence: that of this step.
            fit_over_h: what ``κ ū·Pū`` is multiplied by in its part of h, (g,).
            losses: the diagonal of P before the correction, over that after it.
        """
        mean = (evidence["sum"] / evidence["rows"]).double()
        of_h = self.gain * mean.square().sum(1) * fit_over_h * self._measure_unit(memory, losses)
        error, size = evidence["rounding"].double()
        of_inverse = losses.max() * PRODUCT_ROUNDING * torch.finfo(losses.dtype).eps
        return of_h.max() + torch.where(size > 0, error / size, 0) + of_inverse

    def _measure(self, memory: State, evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
        """Pū, κ ū·Pū, and by what P has to be multiplied before it is corrected."""
        mean = evidence["sum"] / evidence["rows"]  # ū, (g, k)
        matrix, rest = self._read_inverse(memory, mean)
        if self._needs_float64(matrix, mean):
            mean = mean.double()
        image = multiply_precisely(matrix, rest, mean)
        energy = self.gain * (mean * image).sum(1).clamp_min(0)
        # inputs so large that ū would leave nothing of P but rounding: as if δ had been larger
        return image, energy, (LARGEST_ENERGY / energy).clamp_max(1)

    def _needs_float64(self, matrix: Tensor, mean: Tensor) -> bool:
        """Whether rounding errors of P would add up: what ū leaves of it is far below its largest entry."""
        if mean.dtype == torch.float64 or mean.device.type == "mps":  # which has no float64
            return False
        if mean.device.type != "cpu":
            return True  # to look would be to wait
        loss = self.gain * mean.square().sum(1) * _read_diagonal(matrix).amax(1)
        return bool((loss > LARGEST_LOSS).any())

    def _read_inverse(self, memory: State, sums: Tensor) -> tuple[Tensor, Tensor]:
        """P, and what its dtype cannot hold of it."""
        if "inverse" in memory:
            rest = memory.get("inverse.rest")
            return memory["inverse"], torch.zeros_like(memory["inverse"]) if rest is None else rest
        groups, size = sums.shape
        start = torch.eye(size, dtype=torch.float64, device="cpu") / self.ridge
        matrix = start.to(sums)
        rest = (start - matrix.to(start)).to(sums)
        return matrix.expand(groups, size, size), rest.expand(groups, size, size)

    def in_backward(self, memory: State, shape: LayerShape) -> bool:
        """Always: the step corrects P after the update."""
        return True

    def finish_stacked(self, memory: State, gradients: Tensor) -> tuple[Tensor, State]:
        """Divide by ``h``."""
        return gradients / memory["h"][..., None, None], {}

    def evidence_shapes(self, shape: LayerShape) -> Shapes:
        """Return the sum of the rows and their number."""
        return {"rows": (), "sum": (shape.groups, shape.columns), "rounding": (2,)}

    def learned_shapes(self, shape: LayerShape) -> Shapes:
        """P, what its dtype cannot hold of it, and what the last update was divided by."""
        square = (shape.groups, shape.columns, shape.columns)
        return {"inverse": square, "inverse.rest": square, "h": (shape.groups,)}

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Return the correction of P, and the product with it."""
        return size.g * (6.0 * size.d**2 + 2.0 * size.d**2 * min(size.n, size.m)), 2.0 * size.g * size.d**2


def _read_diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)
