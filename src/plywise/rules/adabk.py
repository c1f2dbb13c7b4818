"""AdaBK: the gradient between the inverse roots of both covariances (SGDM_BK, AdamW_BK)."""

from dataclasses import dataclass
from typing import Literal

from plywise.numerics.inverse_roots import Solver
from plywise.rules._kronecker import KroneckerRule


@dataclass(frozen=True, eq=False)
class AdaBK(KroneckerRule):
    """AdaBK: SGDM_BK on SGD with momentum, AdamW_BK on AdamW.

    Idea: full-matrix Adagrad in its cheapest Kronecker form. The gradient is divided by the square roots of
        the covariances of a layer's inputs and of its output gradients, and keeps its size.
    Equation: D = c · (L + ε λ_L I)^-½ G (R + ε λ_R I)^-½, R the running mean of aaᵀ, L of ΔᵀΔ, λ their
        largest eigenvalues; c keeps ‖D‖ = ‖G‖. The layer below receives ΔW.
    Use when: as FeatureWhitening, if outputs differ in scale, too.
    Do not use when: a step is cheap: two sides cost twice as much as one.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. Of computed weights (weight norm, pruning)
        and of weights used in several ways, each use has statistics of its own, and backward makes the update
        by what was learned before. A side above 8192 stays as it is.
    Cost: twice that of FeatureWhitening, and a statistic of the output gradients.
    Status: variant: the true root, with a damping chosen for it. The published ten Newton-Schulz steps have
        not converged to the root: at ε = 1e-5 the smallest eigenvalues get 0.03 to 0.09 of their gain, so
        that the unfinished iteration acts as the damping (``solver="newton_schulz", damping=1e-5`` does
        this). The paper gathers every 200 steps and refreshes every 2000 (``cadence="paper"``).
    Source: Yong, Sun, Zhang, "A General Regret Bound of Preconditioned Gradient Method for DNN Training",
        CVPR 2023, Algorithm 2.
    Code: Yonghongwei/AdaBK.
    Results: the paper's, ResNet-18 on CIFAR-100, test accuracy: 79.30 % (SGDM_BK) against SGDM's 77.20, and
        78.66 (AdamW_BK) against AdamW's 77.23; not reproduced here. Ours: AdamW's best validation loss in 150
        (SGDM_BK) and 230 (AdamW_BK) of its 450 steps on Fashion-MNIST, 100 and 60 of 156 on CIFAR-10
        (benchmarks/README.md). In the arena no rule is ahead of the best tuned peer in time
        (benchmarks/arena/README.md).
    Limits: where rows are few, c is measured at refreshes only, unless ``cadence="paper"``. With a
        GradScaler, L weighs each step by the square of its loss scale.

    Args:
        decay: how much of the statistics stays at each gathering (α). Default 0.9. Range 0.5 to 0.999.
        damping: ε, relative to the largest eigenvalue of each side. Default 0.01. Range 1e-4 to 1.
        rank: keep only so many directions of each root and treat the others alike; None for all. Default
            None. Range 16 to 512.
        solver: ``"auto"`` and ``"eigh"`` by eigenvalues, ``"newton"`` by a converging iteration, or
            ``"newton_schulz"`` as published.
        sample: take every so many-th position along each axis of a convolution or sequence into R. Default 1.
            Range 1 to 4.
        stats_every: steps from one batch that enters the statistics to the next (T_s). Default 10. Range 1 to
            200.
        refresh_every: steps from one root to the next (T_ir), a multiple of ``stats_every``. Default 50.
            Range 1 to 2000.
        cadence: ``"spread"``: layers refresh in turn over a cycle of ``refresh_every`` steps, each gathering
            of the first cycle refreshes, and where rows are few c is measured at refreshes only. ``"paper"``:
            200 and 2000 steps, all layers refresh in the same step, and c is measured in each step.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # so this is AdamW_BK
        >>> rule = pw.AdaBK().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    decay: float = 0.9  # α
    damping: float = 0.01  # ε
    rank: int | None = None
    solver: Solver = "auto"
    sample: int = 1
    stats_every: int = 10  # T_s
    refresh_every: int = 50  # T_ir
    cadence: Literal["spread", "paper"] = "spread"

    left = right = 0.5
    relative_to = "max"
    paper_cadence = (200, 2000)
