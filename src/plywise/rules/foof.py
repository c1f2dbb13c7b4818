"""Foof: least squares against a running covariance of the inputs."""

from dataclasses import dataclass

from plywise.rules._kronecker import KroneckerRule


@dataclass(frozen=True, eq=False)
class Foof(KroneckerRule):
    """After FOOF: gradient descent on neurons.

    Idea: move each neuron's outputs on the batch along their gradient, and find the weights that do this
        best. This is a least-squares problem with the inputs' covariance. It is K-FAC without its output
        side, which Benzing found to be the part that helps; against one batch's inputs it is ProxProp.
    Equation: D = c · G (R + ε tr(R)/k I)⁻¹, R the running mean of aaᵀ, a the inputs with a trailing 1; c
        keeps ‖D‖ = ‖G‖. The layer below receives ΔW.
    Use when: wide layers or convolutions train slowly, and a step may cost 1.2 to 1.8 times as much.
    Do not use when: layers are tens of thousands wide, or a step is so cheap that the added products dominate
        it.
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them; on the character transformer they change nothing
        beyond the noise of seeds (benchmarks/README.md). Of computed weights (weight norm, pruning)
        and of weights used in several ways, each use has statistics of its own, and backward makes the update
        by what was learned before. A side above 8192 stays as it is.
    Cost: products of rank 128 with the smaller of rows and gradient in each step, some of the same size with
        the statistic at each refresh. With ``rank=None`` a k×k product in each step and a Cholesky inverse.
    Status: after FOOF: the least-squares step is the paper's; the kept norm, the relative damping, the low
        rank and the thinned positions are ours.
    Source: Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization", ICML
        2022.
    Code: none found.
    Results: not reproduced here: the paper's settings were not at hand. Ours, on AdamW: its best validation
        loss in 180 of its 450 steps on Fashion-MNIST, 40 of 156 on CIFAR-10 (benchmarks/README.md). In the
        arena no rule is ahead of the best tuned peer in time (benchmarks/arena/README.md).
    Limits: c is measured at refreshes only. If updates do not keep the gradient's norm
        (Precondition(keep_norm=False)), convolutions diverge at rates that suit linear layers.

    Args:
        decay: how much of the statistic stays at each gathering. Default 0.95. Range 0.5 to 0.999.
        damping: ε, relative to the mean of the statistic's diagonal. Default 1. Range 0.01 to 100.
        rank: keep this many leading directions of the inverse and treat the others alike; None for all.
            Layers with at most twice as many inputs keep all. Default 128. Range 16 to 512.
        sample: take every so many-th position along each axis of a convolution or sequence into R. With 2 on
            3×3 convolutions a batch's covariance is off by 0.4 % (MNIST) to 11 % (digits of 8×8), by about
            1 % over four batches, since the positions take turns. Default 2. Range 1 to 4.
        stats_every: steps from one batch that enters the statistic to the next, at the start. Default 5.
            Range 1 to 100.
        refresh_every: steps from one inverse to the next, at the start; a multiple of ``stats_every``.
            Default 5. Range 1 to 100.
        slowdown: both intervals grow with the square root of the steps taken, since inputs change less and
            less: they are twice as long once 2 times ``refresh_every`` steps have been taken, 4 times as long
            after 8 times, and so on, until they are so many times as long. 1 keeps them. Default 8. Range 1
            to 16.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        >>> rule = pw.Foof().attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    decay: float = 0.95
    damping: float = 1.0
    rank: int | None = 128
    sample: int = 2
    stats_every: int = 5
    refresh_every: int = 5
    slowdown: int = 8
