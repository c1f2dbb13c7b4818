"""Back-matching propagation: backward values by matching, exactly or as a layer-wise adaptive rate."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.engine.rule import Rule, Size, require_choice, require_positive, require_whole
from plywise.engine.selection import MATRICES
from plywise.rules import _least_squares as solve
from plywise.rules._pseudo_inverse import PseudoInverse


@dataclass(frozen=True, eq=False)
class BackMatching(Rule):
    """Back-matching propagation.

    Idea: a layer's backward value should be the change that we want, not the derivative of the loss.
        Compute it, for the weights and for the layer below, by matching the wanted change of the output:
        a least-squares problem for each. Replacing every Gram matrix by a scalar turns that into SGD with
        a rate for each layer, which repairs backward values that differ vastly in size across layers.
    Equation: exact: D = G (AᵀA + εI)⁻¹, and the layer below hears Δ W (WᵀW + εI)⁻¹. Rate: D = G / (m_W · E),
        m_W = ‖A‖²_F/(B d), E = product of m_z over all layers above, m_z = ‖W‖²_F/d; the bias
        D = Δᵀ1 / (positions · E).
    Use when: layers are badly scaled against each other (rate mode is equivariant under rescaling of
        layers), at almost the cost of SGD.
    Do not use when: the network is well scaled (momentum SGD ties), or with Adam and RMSprop, which divide
        any factor of a layer out again.
    Layers: Linear, Conv1d, Conv2d and Conv3d (any stride, padding, dilation, groups), and what
        `register_layer` teaches. Other norms, embeddings, recurrent layers, nn.MultiheadAttention,
        parametrized weights and forwards of one's own keep their plain gradients; `explain` says why. Modules
        of batch norm, average pooling and dropout count by scalars of their own; in rate mode batch norm's
        parameters get a rate, too.
    Cost: rate: under 1 % of the arithmetic. Exact: two solves a layer.
    Status: after the paper, whose body could not be read: the least-squares problems are its own; the
        scalars, and the treatment of batch norm, ReLU, pooling, dropout and residual blocks, are derived
        here, and the cap is ours.
    Source: Zhang, Chen, Liu, "Train Feedforward Neural Network with Layer-wise Adaptive Rate via
        Approximating Back-matching Propagation", arXiv 1802.09750 (2018); of the same authors, "On the Local
        Hessian in Back-propagation", NeurIPS 2018.
    Code: none found.
    Results: the paper's are not known. Ours on the digits: final training loss 0.044 however layers are
        rescaled, where momentum SGD has 0.017, 0.160 and 0.129; exact mode 0.118 (benchmarks/README.md).
        VGG13 with batch norm, made small, 138 steps: 3.64 against SGD's 4.09 on CIFAR-100, 1.46 against 1.56,
        undecided, on CIFAR-10 (benchmarks/reproduce/back-matching.json). Hardly ever reaches a target of the
        arena (benchmarks/arena/README.md).
    Limits: without the cap the method fails on networks whose function is mis-scaled (too small an
        initialisation). Residual branches add in exact mode (no closed form); in rate mode a residual block
        needs a layer above it. Dropout, pooling and batch norm that are called as functions instead of
        modules count as 1.

    Args:
        mode: ``"rate"``, the layer-wise adaptive rate, or ``"exact"``, damped least squares.
        measure_every: steps from one measurement of E to the next, by the backward of a random vector.
            Default 10. Range 1 to 100.
        scalar: what replaces a Gram matrix in rate mode: ``"mean"`` eigenvalue (tr_n), ``"rank"``, the mean
            non-zero one (tr_rank; one sample then gives NLMS), or ``"cauchy"``, a line search for each
            layer (two more products; trained badly in our tests).
        cap: largest size of a move relative to its weight, ``‖D‖ ≤ cap ‖W‖``; None for no cap. Default 1.
            Range 0.01 to 10.
        eps: damping of the exact solves relative to the mean non-zero eigenvalue. Default 0.1. Range 1e-3 to
            10.
        reduction: how the loss is averaged over the samples, ``"mean"`` or ``"sum"``; the move is the same
            for both.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        >>> rule = pw.BackMatching().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    kinds = (*MATRICES, "norm")

    mode: Literal["rate", "exact"] = "rate"
    measure_every: int = 10
    scalar: Literal["mean", "rank", "cauchy"] = "mean"
    cap: float | None = 1.0
    eps: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_choice(self, "mode", self.mode, ("rate", "exact"))
        require_choice(self, "scalar", self.scalar, ("mean", "rank", "cauchy"))
        require_choice(self, "reduction", self.reduction, ("mean", "sum"))
        require_whole(self, measure_every=self.measure_every)
        require_positive(self, eps=self.eps, **({} if self.cap is None else {"cap": self.cap}))

    @property
    def needs_backward_scale(self) -> bool:  # type: ignore[override]
        """Rate mode divides by the measured size of a random backward value."""
        return self.mode == "rate"

    @property
    def alters_backward(self) -> bool:
        """Rate mode sends plain gradients down."""
        return self.mode == "exact"

    def module_hook(self) -> PseudoInverse | None:
        """In exact mode batch norm, pooling and dropout send their pseudo-inverse down."""
        return PseudoInverse() if self.mode == "exact" else None

    def update(self, call: LinearCall) -> Update:
        """``G / (m_W E)`` of the mean loss, or least squares on the summed loss."""
        if self.mode == "rate":
            of_mean = call.times(1 if self.reduction == "mean" else 1 / call.samples)
            return make_rate_update(of_mean, self.scalar)
        return solve_for_update(call.times(1 if self.reduction == "sum" else call.samples), self.eps)

    def input_gradient(self, call: LinearCall) -> Tensor:
        """Plain ``ΔW`` in rate mode (``E`` carries the scalars), the matched value in exact mode."""
        return call.input_gradient() if self.mode == "rate" else solve.matched_below(call, self.eps)

    def backward_value(self, call: LinearCall) -> Tensor:
        """``Δ/E``: the backward value that the recursion of the rate mode would carry."""
        return call.delta if call.energy is None else call.delta * find_rate(call.energy)

    def clip_update(self, weight: Tensor, update: Tensor) -> float:
        """The cap: make a layer's update smaller until ``‖D‖ ≤ cap ‖W‖``; a weight of zeros has no cap."""
        if self.cap is None:
            return 1.0
        size, limit = (
            float(torch.linalg.vector_norm(update)),
            self.cap * float(torch.linalg.vector_norm(weight)),
        )
        return min(1.0, limit / size) if size > 0 and limit > 0 else 1.0

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Rate: a pass over A, and a backward of the activations now and then. Exact: two solves."""
        if self.mode == "rate":
            return 2.0 * size.g * size.n * size.d * (1 + size.m / self.measure_every), 0.0
        k = min(size.d, size.m)
        match = k * k * max(size.d, size.m) + k**3 + 2.0 * size.n * k * k
        return size.exact_solve + size.g * match, 2.0 * size.g * (min(size.n, size.d) ** 2 + k * k)


def make_rate_update(call: LinearCall, scalar: str) -> Update:
    """``G / (m_W E)`` and ``Δᵀ1 / (positions · E)``; nothing where the layer's input is zero."""
    assert call.energy is not None
    rate = find_rate(call.energy)
    factor = _invert(find_curvature(call, scalar)) * rate
    # the smaller of both is scaled; in half precision Δ times a large factor may be out of range
    if call.delta.numel() < call.weight.numel() and call.delta.dtype == call.dtype:
        weight = call.weight_gradient(call.delta * factor)
    else:
        weight = call.weight_gradient(call.delta).to(call.dtype) * factor
    bias = call.bias_gradient(call.delta)
    positions = max(call.row_count // call.samples, 1)
    return Update(weight, None if bias is None else bias.to(call.dtype) * (rate / positions))


def find_rate(energy: Tensor) -> float:
    """``1 / E``, and 0 where nothing arrives (the gradient is 0 there, too)."""
    value = float(energy)  # it is on the CPU
    return 1 / value if value else 0.0


def find_curvature(call: LinearCall, scalar: str) -> Tensor:
    """``m_W``, the scalar in the place of ``AᵀA / samples``.

    ``"cauchy"`` is ``‖A Gᵀ‖² / (samples ‖G‖²)``, with which the step along G matches best.
    """
    if scalar != "cauchy":
        return solve.mean_square(call, by_rank=scalar == "rank")
    gradient = call.weight_gradient(call.delta.to(call.dtype))
    # only its direction counts, and squares have a range
    gradient = gradient * _invert(gradient.abs().amax())
    image = call.apply(call.cast_input(gradient.dtype), gradient)
    return image.square().sum() * _invert(gradient.square().sum()) / call.samples


def solve_for_update(call: LinearCall, eps: float) -> Update:
    """Damped least squares for the weights, on centred rows where there is a bias."""
    if call.has_bias:
        return solve.ridge_centred(call, eps)
    return solve.ridge(call, solve.relative_damping(call, eps))


def _invert(scalar: Tensor) -> Tensor:
    """``1 / scalar``, and 0 where there is nothing to divide by (a dead layer's gradient is 0, too)."""
    inverse = scalar.reciprocal()
    return torch.where(inverse.isinf(), 0, inverse)
