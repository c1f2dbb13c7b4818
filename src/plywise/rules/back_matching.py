"""Back-matching propagation: backward values from least squares, exactly or as a layer-wise adaptive rate."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.engine.rule import Rule, Size, require_choice, require_positive, require_whole
from plywise.engine.selection import MATRICES
from plywise.rules import _least_squares as solve
from plywise.rules._pseudo_inverse import PseudoInverse

FAINT = 1e12
"""If ``1 / E`` exceeds this, the update is computed in float64, for it may be out of float32's range."""

LARGEST = 1e15
"""Largest entry of such an update."""


@dataclass(frozen=True, eq=False)
class BackMatching(Rule):
    """Back-matching propagation.

    Idea: a layer's backward value should be the wanted change of its output, not the derivative of the loss.
        Two least-squares problems find the changes of the weights and of the input that produce the wanted
        change of the output. If a scalar replaces each Gram matrix, this becomes SGD with a rate for each
        layer, which helps where backward values differ vastly in size across layers.
    Equation: exact: D = G (AᵀA + εI)⁻¹, and Δ W (WᵀW + εI)⁻¹ is sent down. Rate: D = G / (m_W · E), where
        m_W = ‖A‖²_F/(B d) and E is the mean square of what arrives at the layer's output when a random vector
        of unit variance goes backward from the topmost layers; for a chain of wide linear layers that is the
        product of ‖W‖²_F/d over the layers above. The bias D = Δᵀ1 / (positions · E).
    Use when: layers are badly scaled against each other (rate mode is equivariant under rescaling of layers),
        or gradients vanish in lower layers (deep sigmoid or tanh networks).
    Do not use when: the network is well scaled (momentum SGD is as good), or with Adam and RMSprop, which
        cancel any factor of a layer.
    Layers: rate mode: linear maps whose weight is a matrix (linear layers, convolutions, attention's
        projections, experts), and norms. The effect of operations in between is measured with a random
        vector. Exact: embeddings, too. It refuses, by name, a parameter below that it cannot take (a class
        token, a position): freeze it. Modules of batch norm, average pooling and dropout send their
        pseudo-inverse down, other operations what backpropagation does. `explain` says what is handled, and
        why.
    Cost: rate mode: 1.6 times the CPU time of SGD's step on 784-256-256-10 with 128 samples, and on a small
        convolutional network; the measurement takes a twentieth of SGD's step. Exact: two solves a
        layer, 4.5 and 5 times. On 64-64-64-10, where Python is most of a step, 3 and 9 times. One thread.
    Status: after the paper, whose body could not be read: the least-squares problems are its own; the
        scalars, their measurement, and the treatment of norms, pooling, dropout and residual blocks are
        derived here, and the cap is ours.
    Source: Zhang, Chen, Liu, "Train Feedforward Neural Network with Layer-wise Adaptive Rate via
        Approximating Back-matching Propagation", arXiv 1802.09750 (2018); of the same authors, "On the Local
        Hessian in Back-propagation", NeurIPS 2018.
    Code: none found.
    Results: the paper's are not known. Ours on the digits, with momentum (networks and tuning of
        benchmarks/bad_scaling.py): final training loss 0.016, 0.018 and 0.016 however layers are rescaled,
        where momentum SGD has 0.017, 0.160 and 0.129; exact mode 0.118. Three sigmoid layers of 64, 10
        epochs: 0.17, where momentum SGD stays at 2.30. With the table of scalars of version 0.1: VGG13 with
        batch norm, made small, 138 steps: 3.64 against SGD's 4.09 on CIFAR-100, 1.46 against 1.56, undecided,
        on CIFAR-10 (benchmarks/reproduce/back-matching.json); hardly ever a target of the arena
        (benchmarks/arena/README.md).
    Limits: without the cap the method fails on networks whose function is mis-scaled (too small an
        initialisation). Random vectors begin at the topmost layers that the rule handles. A path to the loss
        without such a layer (a residual block on top) counts as 0. A topmost layer that is called in each
        step of a loop costs one backward for each call. Hooks on activations, and `retain_grad`, see the
        random vector in a pass that measures. Attached without the optimizer, each pass measures. Computed
        weights (weight norm, pruning) have no cap: their update goes on to other parameters. A reentrant
        checkpoint is refused. In exact mode residual branches add (no closed form), and the gradient at the
        model's input is plain only where no updates are wanted: `torch.autograd.grad(output, x)`, frozen
        weights, `rule.paused()`, or ``create_graph=True``.

    Args:
        mode: ``"rate"``, the layer-wise adaptive rate, or ``"exact"``, damped least squares.
        measure_every: steps from one measurement of E to the next, in rate mode. Default 10. Range 1 to 100.
        scalar: what replaces AᵀA in rate mode: its ``"mean"`` eigenvalue (tr_n), ``"rank"``, the mean
            non-zero one (tr_rank; one sample then gives NLMS), or ``"cauchy"``, a line search for each
            layer (two more products; trained badly in our tests).
        cap: largest size of an update relative to its weight, ``‖D‖ ≤ cap ‖W‖``, where W is not zero; None
            for no cap. Default 1. Range 0.01 to 10.
        eps: damping of the exact solves relative to the mean non-zero eigenvalue. Default 0.1. Range 1e-3 to
            10.
        reduction: how the loss is averaged over the samples, ``"mean"`` or ``"sum"``; the update is the same
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
        """Return plain ``ΔW`` in rate mode (``E`` holds the scalars), the matched value in exact mode."""
        return call.input_gradient() if self.mode == "rate" else solve.matched_below(call, self.eps)

    def backward_value(self, call: LinearCall) -> Tensor:
        """``Δ/E``: the backward value that the recursion of the rate mode would carry."""
        return call.delta if call.energy is None else call.delta * find_rate(call.energy)

    def clips_updates(self) -> bool:
        """Return whether there is a cap."""
        return self.cap is not None

    def clip_update(self, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """Apply the cap: shrink layers' updates until ``‖D‖ ≤ cap ‖W‖``; a weight of zeros has no cap."""
        if self.cap is None:
            return torch.ones_like(update_norm)
        limit = self.cap * weight_norm
        return torch.where((update_norm > 0) & (limit > 0), (limit / update_norm).clamp(max=1), 1)

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
    if rate > FAINT:
        return _make_faint_update(call, scalar, rate)
    factor = _invert(find_curvature(call, scalar)) * rate
    positions = max(call.row_count // call.samples, 1)
    # the smaller of both is scaled; in half precision Δ times a large factor may be out of range
    if call.delta.numel() < call.weight.numel() and call.delta.dtype == call.dtype:
        bias = call.bias_gradient(call.delta)
        of_bias = None if bias is None else bias * (rate / positions)
        return Update(call.weight_gradient(call.delta * factor), of_bias)
    plain, unit = _compute_gradient(call)
    return plain.scaled(factor / unit, rate / positions / unit)


def _compute_gradient(call: LinearCall) -> tuple[Update, Tensor | float]:
    """Compute the plain gradient in the dtype of solves, times a power of two, and return that too.

    Products of small numbers are below the range of float16, and sums of large ones above it. So Δ is
    multiplied by a power of two first.
    """
    unit: Tensor | float = 1.0
    if call.delta.dtype != torch.float16:
        plain = call.gradient()
    else:
        wide = call.delta.to(call.dtype)
        bound = call.trace().sum().sqrt().clamp_min(1) * torch.linalg.vector_norm(wide)
        unit = torch.exp2(14 - torch.log2(bound.clamp_min(1e-30)).ceil())
        plain = call.gradient((wide * unit).to(call.delta.dtype))
    assert plain.weight is not None
    bias = None if plain.bias is None else plain.bias.to(call.dtype)
    return Update(plain.weight.to(call.dtype), bias), unit


def _make_faint_update(call: LinearCall, scalar: str, rate: float) -> Update:
    """Make the update where almost nothing arrives, in float64, with squares that can be summed.

    The cap makes it smaller in any case, so that only its direction matters.
    """
    plain, unit = _compute_gradient(call)
    assert plain.weight is not None
    rate /= float(unit)  # beyond float32's range
    weight = plain.weight.double() * _invert(find_curvature(call, scalar).double()) * rate
    positions = max(call.row_count // call.samples, 1)
    of_bias = None if plain.bias is None else plain.bias.double() * (rate / positions)
    parts = [weight] if of_bias is None else [weight, of_bias]
    largest = torch.stack([part.abs().amax() for part in parts]).amax()
    factor = (LARGEST * _invert(largest)).clamp(max=1)
    return Update(
        (weight * factor).to(call.dtype), None if of_bias is None else (of_bias * factor).to(call.dtype)
    )


def find_rate(energy: Tensor) -> float:
    """Return ``1 / E``, and 0 where nothing arrives (the gradient is 0 there, too)."""
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
    return solve.ridge(call, solve.RelativeDamping(call, eps))


def _invert(scalar: Tensor) -> Tensor:
    """``1 / scalar``, and 0 where there is nothing to divide by (a dead layer's gradient is 0, too)."""
    inverse = scalar.reciprocal()
    return torch.where(inverse.isinf(), 0, inverse)
