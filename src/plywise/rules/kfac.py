"""K-FAC: the natural gradient with a Kronecker-factored curvature, for comparison."""

from dataclasses import dataclass

from plywise.rules._kronecker import KroneckerRule


@dataclass(frozen=True, eq=False)
class KFAC(KroneckerRule):
    """K-FAC with the empirical Fisher, for comparison.

    Idea: approximate each layer's block of the Fisher matrix by the Kronecker product of the covariances of
        its inputs and output gradients, and take the natural gradient step.
    Equation: D = c · (L + ε tr(L)/m I)⁻¹ G (R + ε tr(R)/k I)⁻¹, R the running mean of aaᵀ, L of ΔᵀΔ: factored
        Tikhonov damping with the paper's π. c keeps ‖D‖ = ‖G‖ in place of the KL clip, or is 1. The layer
        below receives ΔW.
    Use when: to compare, or where curvature matters more than time (small networks, regression).
    Do not use when: gradients are noisy and a one-sided rule does as well at half the cost.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. Of computed weights (weight norm, pruning)
        and of weights used in several ways, each use has statistics of its own, and backward makes the update
        by what was learned before. A side above 8192 stays as it is.
    Cost: two statistics, two inverses a refresh, two products a step.
    Status: variant: the Fisher of the true labels, not of sampled ones; no rescaling by the exact
        curvature, no momentum of its own, no adaptive damping; the gradient's size is kept in place of the KL
        clip.
    Source: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
        2015, sections 3, 5 and 6.3; Grosse, Martens, ICML 2016, for convolutions.
    Code: tensorflow/kfac.
    Results: the paper's are not reproduced here. Ours: AdamW's best validation loss in 140 of its
        450 steps on Fashion-MNIST, 90 of 156 on CIFAR-10 (benchmarks/README.md). In the arena no rule is
        ahead of the best tuned peer in time (benchmarks/arena/README.md).
    Limits: two dense inverses for each layer: set ``rank`` for wide layers. c is measured at refreshes only.
        With a GradScaler, L weighs each step by the square of its loss scale.

    Args:
        decay: how much of the statistics stays at each gathering. Default 0.95. Range 0.5 to 0.999.
        damping: ε, relative to the mean of each side's diagonal. Default 1. Range 0.01 to 100.
        keep_norm: give each layer's move the size of its gradient. Default True.
        rank: keep only so many directions of each inverse and treat the others alike; None for all. Default
            None. Range 16 to 512.
        sample: take every so many-th position along each axis of a convolution or sequence into R. Default 1.
            Range 1 to 4.
        stats_every: steps from one batch that enters the statistics to the next. Default 10. Range 1 to 100.
        refresh_every: steps from one inverse to the next, a multiple of ``stats_every``. Default 10. Range 1
            to 100.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rule = pw.KFAC().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    decay: float = 0.95
    damping: float = 1.0
    keep_norm: bool = True
    rank: int | None = None
    sample: int = 1
    stats_every: int = 10
    refresh_every: int = 10

    left = 1.0
