"""Back-matching propagation: backward values by matching, exactly or as a layer-wise adaptive rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plywise import solve
from plywise.capture import ModelHook
from plywise.graph import EnergyMark, PseudoInverse
from plywise.ply import Move, Ply
from plywise.rule import Rule, Size, require_choice, require_positive


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

    mode: Literal["rate", "exact"] = "rate"
    scalar: Literal["mean", "rank", "cauchy"] = "mean"
    cap: float | None = 1.0
    eps: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_choice(self, "mode", self.mode, ("rate", "exact"))
        require_choice(self, "scalar", self.scalar, ("mean", "rank", "cauchy"))
        require_choice(self, "reduction", self.reduction, ("mean", "sum"))
        require_positive(self, eps=self.eps, **({} if self.cap is None else {"cap": self.cap}))

    @property
    def needs_energy(self) -> bool:  # type: ignore[override]
        """Rate mode multiplies the scalars of all layers above."""
        return self.mode == "rate"

    def marker(self) -> ModelHook:
        """Batch norm, pooling and dropout: their scalar in rate mode, their pseudo-inverse in exact."""
        return EnergyMark(self.reduction == "sum") if self.mode == "rate" else PseudoInverse()

    def move(self, ply: Ply) -> Move:
        """``G / (m_W E)`` of the mean loss, or least squares on the summed loss."""
        if self.mode == "rate":
            return rate_move(ply.times(1 if self.reduction == "mean" else 1 / ply.samples), self.scalar)
        return exact_move(ply.times(1 if self.reduction == "sum" else ply.samples), self.eps)

    def below(self, ply: Ply) -> Tensor:
        """Plain ``ΔW`` in rate mode (``E`` carries the scalars), the matched value in exact mode."""
        return ply.below() if self.mode == "rate" else solve.matched_below(ply, self.eps)

    def heard(self, ply: Ply) -> Tensor:
        """``Δ/E``: the backward value that the recursion of the rate mode would carry."""
        return ply.delta if ply.energy is None else _divided(ply.delta, ply.energy)

    def matching_scalar(self, ply: Ply) -> Tensor:
        """``m_z``, what replaces ``WᵀW``."""
        if self.scalar == "cauchy":
            below = ply.below()
            return _ratio(ply.kind.apply(ply.module, below, ply.weight.to(below.dtype)), below)
        if self.scalar == "rank":
            return rank_scalar(ply)
        return ply.kind.weight_energy(ply.module, ply.a, ply.delta, ply.weight)

    def shrink(self, weight: Tensor, move: Tensor) -> float:
        """The cap: shrink a layer's move until ``‖D‖ ≤ cap ‖W‖``."""
        if self.cap is None:
            return 1.0
        size = float(torch.linalg.vector_norm(move))
        return min(1.0, self.cap * float(torch.linalg.vector_norm(weight)) / size) if size > 0 else 1.0

    def price(self, size: Size) -> tuple[float, float]:
        """Rate: a pass over A and one over W. Exact: two solves."""
        if self.mode == "rate":
            return 2.0 * size.g * (size.n + size.m) * size.d, 0.0
        k = min(size.d, size.m)
        match = k * k * max(size.d, size.m) + k**3 + 2.0 * size.n * k * k
        return size.exact_solve + size.g * match, 2.0 * size.g * (min(size.n, size.d) ** 2 + k * k)


def rate_move(ply: Ply, scalar: str) -> Move:
    """``G / (m_W E)`` and ``Δᵀ1 / (positions · E)``; nothing where the layer's input is zero."""
    assert ply.energy is not None
    energy = ply.energy.to(ply.delta.device)
    if scalar == "cauchy":
        curvature = cauchy_scalar(ply)
    else:
        curvature = solve.mean_square(ply, by_rank=scalar == "rank")
    positions = max(ply.row_count // ply.samples, 1)
    one = torch.ones((), dtype=ply.dtype, device=energy.device)
    # Δ is smaller than G: scale it before the product
    weight = ply.weight_gradient((ply.delta * _divided(one, curvature * energy)).to(ply.delta.dtype))
    bias = ply.bias_gradient(ply.delta)
    return Move(weight, None if bias is None else bias * _divided(one, positions * energy))


def cauchy_scalar(ply: Ply) -> Tensor:
    """``‖A Gᵀ‖² / (B ‖G‖²)``: the step along G that matches best, for G = ΔᵀA."""
    gradient = ply.weight_gradient(ply.delta)
    image = ply.kind.apply(ply.module, ply.a.to(gradient.dtype), gradient)
    return _ratio(image, gradient) / ply.samples


def exact_move(ply: Ply, eps: float) -> Move:
    """Damped least squares for the weights, on centred rows where there is a bias."""
    if ply.has_bias:
        return solve.ridge_centred(ply, eps)
    return solve.ridge(ply, eps * ply.trace() / min(ply.row_count, ply.columns))


def rank_scalar(ply: Ply) -> Tensor:
    """Mean non-zero eigenvalue of ``WᵀW`` behind a mask that passes input j with its firing rate p_j."""
    if not ply.kind.rows_are_inputs:
        energy = ply.kind.weight_energy(ply.module, ply.a, ply.delta, ply.weight)
        inputs, outputs = math.prod(ply.a.shape[1:]), math.prod(ply.delta.shape[1:])
        return energy * inputs / min(inputs, outputs)
    fires = (ply.a.reshape(-1, ply.width) != 0).to(ply.dtype)
    rates = fires.sum(0) / max(len(fires), 1)
    energy = (rates * ply.weight.to(ply.dtype).square().sum(0)).sum()
    return energy / rates.sum().clamp(min=1e-12, max=ply.outputs)


def _ratio(image: Tensor, vector: Tensor) -> Tensor:
    """``‖image‖² / ‖vector‖²``, 0 for a zero vector."""
    return _divided(image.square().sum(), vector.square().sum())


def _divided(value: Tensor, by: Tensor) -> Tensor:
    """``value / by``, and 0 where there is nothing to divide by (a dead layer's gradient is 0 too)."""
    return torch.where(by > 0, value / by, torch.zeros_like(value))
