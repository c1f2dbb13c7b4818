"""AdaBK: the gradient between the inverse roots of both covariances (SGDM_BK, AdamW_BK)."""

from dataclasses import dataclass

from plywise.kronecker import Kronecker, KroneckerRule
from plywise.roots import Solver


@dataclass(frozen=True, eq=False)
class AdaBK(KroneckerRule):
    """AdaBK: SGDM_BK on SGD with momentum, AdamW_BK on AdamW.

    Idea: full-matrix Adagrad in its cheapest Kronecker form: the square roots of the covariances of a layer's
        inputs and output gradients, each layer's move keeping its gradient's size.
    Equation: D = c · (L + ε λ_L I)^-½ G (R + ε λ_R I)^-½, R the running mean of aaᵀ, L of ΔᵀΔ, λ their
        largest eigenvalues; c keeps ‖D‖ = ‖G‖. The layer below hears ΔW.
    Use when: as FeatureWhitening, where outputs differ in scale too.
    Do not use when: steps are short: two sides cost twice.
    Cost: twice that of FeatureWhitening, and a statistic of the output gradients.
    Source: Yong, Sun, Zhang, "A General Regret Bound of Preconditioned Gradient Method for DNN Training",
        CVPR 2023, Algorithm 2.
    Limits: between refreshes c is the last refresh's. The published ten Newton-Schulz steps are not the root
        they are written for: at ε = 1e-5 the smallest eigenvalues get 0.03 to 0.09 of their gain, so that
        the iteration, not ε, is the damping. ``solver="newton_schulz", damping=1e-5`` reproduces that; the
        default is the true root with a damping fit for it. The paper refreshes every 2000 steps, with 200
        between statistics. With a GradScaler, L counts steps by the square of their loss scale.

    Args:
        decay: how much of the statistics stays at each gathering (α). Default 0.9.
        damping: ε, relative to the largest eigenvalue of each side. Default 0.01.
        rank: keep only so many directions of each root and treat the others alike; None for all.
        solver: ``"auto"`` and ``"eigh"`` by eigenvalues, ``"newton"`` by a converging iteration, or
            ``"newton_schulz"`` as published.
        sample: take every so many-th position along each axis of a convolution or sequence into R.
        stats_every: steps from one batch that enters the statistics to the next (T_s). Default 10.
        refresh_every: steps from one root to the next (T_ir), a multiple of ``stats_every``. Default 50.

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

    def __post_init__(self) -> None:
        self.check()

    @property
    def plan(self) -> Kronecker:
        """Both powers ½."""
        return Kronecker(
            left=0.5,
            right=0.5,
            decay=self.decay,
            damping=self.damping,
            relative_to="max",
            solver=self.solver,
            rank=self.rank,
            sample=self.sample,
        )
