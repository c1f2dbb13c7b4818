"""Feature whitening: the gradient as if the layer's inputs were white (W-SGDM, W-Adam)."""

from dataclasses import dataclass
from typing import Literal

from plywise.numerics.inverse_roots import Solver
from plywise.rules._kronecker import KroneckerRule


@dataclass(frozen=True, eq=False)
class FeatureWhitening(KroneckerRule):
    """Embedded feature whitening: W-SGDM on SGD with momentum, W-Adam(W) on Adam(W).

    Idea: correlated inputs make some directions of a layer's weights learn much faster than others. Whitening
        the inputs themselves would change the network; whitening the gradient does not.
    Equation: D = c · G (R + ε λ_max I)^-½, R the running mean of aaᵀ, a the inputs with a trailing 1, λ_max
        its largest eigenvalue; c keeps ‖D‖ = ‖G‖. The layer below receives ΔW.
    Use when: a network without, or with few, normalisation layers learns slowly with SGD or Adam; the
        optimizer's learning rate can stay, for updates keep the gradient's size.
    Do not use when: every layer's inputs are already nearly white, or layers are tens of thousands wide.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. Of computed weights (weight norm, pruning)
        and of weights used in several ways, each use has statistics of its own, and backward makes the update
        by what was learned before. A side above 8192 stays as it is.
    Cost: products of rank 128 with the smaller of rows and gradient in each step, some of the same size with
        the statistic at each refresh. With ``rank=None`` a k×k product in each step, and all eigenvalues.
    Status: variant: the low rank is ours and costs no steps in our comparison (``rank=None`` is the paper's);
        the paper gathers every 50 steps and refreshes every 500 (``cadence="paper"``). The published W-Adam
        also warms its rate up, which its paper does not say and this does not do.
    Source: Yong, Zhang, "An Embedded Feature Whitening Approach to Deep Neural Network Optimization", ECCV
        2022, Algorithms 1-3.
    Code: Yonghongwei/W-SGDM-and-W-Adam.
    Results: the paper's tables were not at hand; AdaBK's, by the same authors, have 79.28 % test accuracy
        (W-SGDM) against SGDM's 77.20 for ResNet-18 on CIFAR-100, not reproduced here. Ours, on AdamW: its
        best validation loss in 170 of its 450 steps on Fashion-MNIST, 50 of 156 on CIFAR-10
        (benchmarks/README.md). In the arena no rule is ahead of the best tuned peer in time
        (benchmarks/arena/README.md).
    Limits: where rows are few, c is measured at refreshes only; the paper measures it in each step
        (``cadence="paper"``).

    Args:
        decay: how much of the statistic stays at each gathering (α). Default 0.95. Range 0.5 to 0.999.
        damping: ε, relative to the largest eigenvalue. Default 1e-3. Range 1e-5 to 0.1.
        rank: keep this many leading directions of the root and treat the others alike; None for all. Layers
            with at most twice as many inputs keep all. Default 128. Range 16 to 512.
        solver: ``"auto"`` and ``"eigh"`` by eigenvalues, ``"newton"`` by a converging iteration,
            ``"newton_schulz"`` by ten steps of an iteration that has not converged by then.
        sample: take every so many-th position along each axis of a convolution or sequence into R. With 2 on
            3×3 convolutions a batch's covariance is off by 0.4 % (MNIST) to 11 % (digits of 8×8), by about
            1 % over four batches, since the positions take turns. Default 1. Range 1 to 4.
        stats_every: steps from one batch that enters the statistic to the next (T_xx). Default 10. Range 1 to
            50.
        refresh_every: steps from one root to the next (T_svd), a multiple of ``stats_every``. Default 50.
            Range 1 to 500.
        cadence: ``"spread"``: layers refresh in turn over a cycle of ``refresh_every`` steps, each gathering
            of the first cycle refreshes, and where rows are few c is measured at refreshes only. ``"paper"``:
            50 and 500 steps, all layers refresh in the same step, and c is measured in each step.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # so this is W-SGDM
        >>> rule = pw.FeatureWhitening().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    decay: float = 0.95  # α
    damping: float = 1e-3  # ε
    rank: int | None = 128
    solver: Solver = "auto"
    sample: int = 1
    stats_every: int = 10  # T_xx
    refresh_every: int = 50  # T_svd
    cadence: Literal["spread", "paper"] = "spread"

    right = 0.5
    relative_to = "max"
    paper_cadence = (50, 500)
