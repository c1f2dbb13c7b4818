"""Precondition: the gradient times inverse powers of its layer's covariances; each choice is a parameter."""

from dataclasses import dataclass
from typing import Literal

from plywise.engine.rule import require_choice
from plywise.numerics.inverse_roots import Relative, Solver
from plywise.rules._kronecker import KroneckerRule


@dataclass(frozen=True, eq=False)
class Precondition(KroneckerRule):
    """The family of whitening, AdaBK, K-FAC and Foof; each choice is a parameter.

    Idea: a layer's gradient G = ΔᵀA is large where its inputs or its output gradients vary much, even if the
        loss needs no large step there. Powers of both covariances, kept as running means, remove this.
    Equation: D = c · L^-left G R^-right, R = mean of aaᵀ + λI, L = mean of ΔᵀΔ + λI over batches (discounted
        by ``decay``), a with a trailing 1 for the bias; c keeps ‖D‖ = ‖G‖. The layer below receives ΔW.
    Use when: you want a member of the family that has no class here, or to find out which part of one
        matters.
    Do not use when: a named rule will do: FeatureWhitening (right=½), AdaBK (both ½), KFAC (both 1), Foof
        (right=1).
    Layers: every call of a linear map with a matrix of weights: linear layers, products, einsums,
        convolutions (plain and transposed), experts, bilinear maps, attention's projections. Embeddings
        and norms where ``attach(kinds=...)`` names them. Of computed weights (weight norm, pruning)
        and of weights used in several ways, each use has statistics of its own, and backward makes the update
        by what was learned before.
    Cost: per step 2nk² operations for the input side or 2mk² (n rows, m outputs, k inputs), whichever is
        less; statistics and roots once in ``stats_every`` and ``refresh_every`` steps. With ``rank`` r, 4nkr.
    Status: variant: it has no paper. With the settings of a named member it equals that member, by the same
        code.
    Source: the common form of Yong, Zhang, ECCV 2022 (whitening), Yong, Sun, Zhang, CVPR 2023 (AdaBK),
        Martens, Grosse, ICML 2015 (K-FAC) and Benzing, ICML 2022 (FOOF).
    Code: none found (of the form itself; its members name theirs).
    Results: not reproduced here: see the named members, whose figures are of their settings.
    Limits: c is exact in steps that refresh, and is kept until the next refresh. With a GradScaler, L weighs
        each step by the square of its loss scale. Replicas need DistributedDataParallel (or
        ``process_group``); fully_shard is refused.

    Args:
        left: power of L, the covariance of the output gradients (p); 0 for none. Default 0. Range 0 to 1.
        right: power of R, the covariance of the inputs (q); 0 for none. Default 1. Range 0.1 to 1.
        decay: how much of the statistic stays at each gathering; 1 forgets nothing. Default 0.95. Range 0.5
            to 0.999.
        statistic: the running ``"mean"`` over rows, or the discounted ``"sum"``.
        damping: λ, relative as ``relative_to`` says. Default 1. Range 1e-3 to 10.
        relative_to: the ``"mean"`` of the statistic's diagonal, its ``"max"`` eigenvalue, or ``"absolute"``.
        keep_norm: give each layer's move the size of its gradient. Without it convolutions, whose
            gradient sums over positions, need another rate than linear layers.
        solver: ``"auto"`` (Cholesky for a power of 1, eigenvalues otherwise), ``"cholesky"``, ``"eigh"``,
            ``"newton"``, or ``"newton_schulz"``, AdaBK's published iteration, which has not converged.
        rank: keep only so many directions of a root and treat the others alike; None for all. Default None.
            Range 16 to 512.
        sample: take every so many-th position along each axis of a convolution or sequence into R. With 2 on
            3×3 convolutions a batch's covariance is off by 0.4 % (MNIST) to 11 % (digits of 8×8), by about
            1 % over four batches, since the positions take turns. Default 1. Range 1 to 4.
        stats_every: steps from one batch that enters the statistics to the next. Default 5. Range 1 to 200.
        refresh_every: steps from one root to the next, a multiple of ``stats_every``. Default 5. Range 1 to
            2000.
        slowdown: both intervals grow with the square root of the steps taken until they are so many times as
            long, as those of `plywise.Foof` do. Default 1: they stay. Range 1 to 16.
        max_size: a side larger than this is left as it is. Default 8192. Range 512 to 16384.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> rule = pw.Precondition(left=0, right=1, stats_every=1, refresh_every=10).attach(model, optimizer)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 2)
        >>> loss.backward()
        >>> optimizer.step()
        >>> rule.detach()
    """

    left: float = 0.0  # p
    right: float = 1.0  # q
    decay: float = 0.95
    statistic: Literal["mean", "sum"] = "mean"
    damping: float = 1.0
    relative_to: Relative = "mean"
    keep_norm: bool = True
    solver: Solver = "auto"
    rank: int | None = None
    sample: int = 1
    stats_every: int = 5
    refresh_every: int = 5
    slowdown: int = 1
    max_size: int = 8192

    def __post_init__(self) -> None:
        require_choice(self, "statistic", self.statistic, ("mean", "sum"))
        super().__post_init__()
