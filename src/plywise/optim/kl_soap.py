"""KL-SOAP: SOAP in which the other sides whiten the statistics of a side."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise.optim.plain import Group
from plywise.optim.soap import SOAP, find_eigenvectors, get_decay
from plywise.optim.stacked import Shape, Stack, compute_adam_step

FIRST_VALUE = 0.1
"""The initial value of all eigenvalues."""
LEAST_BOUND, GREATEST_BOUND = 10, 4000
"""Inverse roots of eigenvalues are capped at the size of the side, clamped to this range."""


class KLSOAP(SOAP):
    """SOAP with the statistics that are nearest to the covariance of the gradient in KL divergence.

    Idea: L ⊗ R approximates the covariance of the gradient. The product that is nearest in the KL divergence
        of two Gaussians is a fixed point: the statistic of each side is that of the gradient whitened on the
        other side.
    Equation: L ← β L + (1 − β) G R⁻¹ Gᵀ/n with R⁻¹ = Q_R diag(1/λ_R) Q_Rᵀ, R ← β R + (1 − β) Gᵀ L⁻¹ G/m;
        X = Q_Lᵀ G Q_R, λ_L ← β λ_L + (1 − β) mean over columns of X²/λ_R, λ_R by rows; the step, from Adam's
        means without correction, and the refresh are SOAP's, its columns not sorted.
    Use when: SOAP works well.
    Do not use when: SOAP costs too much.
    Layers: the same as SOAP.
    Cost: that of SOAP, plus two products in each step and a vector for each side.
    Status: faithful to the authors' code for matrices, with its bounds on inverse roots. It keeps the
        precision of the weights, where their code casts to bfloat16. Weights of more dimensions follow the
        same equation, and 1-D weights move by Adam.
    Source: Lin et al., "Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization", 2025
        (arXiv 2509.03378).
    Code: yorkerlin/KL-Methods.
    Results: the paper's language models are not reproduced here.
    Limits: those of SOAP. The first steps are larger than Adam's, because the means are not corrected for
        their start at zero.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 3e-3. Range 1e-4 to 0.1.
        betas: Adam's decay rates. Default (0.9, 0.98).
        shampoo_beta: β of L, R and λ. None: the second of ``betas``.
        eps: added to the root of the second moment. Default 1e-8. Range 1e-12 to 1e-4.
        weight_decay: decoupled. Default 0.01. Range 0 to 1.
        precondition_frequency: steps between new bases. Default 10. Range 1 to 100.
        max_precondition_dim: dimensions above it have no basis. Default 10000. Range 64 to 10000.
        stagger: refresh sides in different steps of a cycle, as in SOAP. Default False.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import KLSOAP
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> optimizer = KLSOAP([weight], lr=0.05)
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight.abs().max().item() < 0.1
        True
    """

    ordered = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        *,
        stagger: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = (lr, betas, shampoo_beta, eps, weight_decay)
        bases = (precondition_frequency, max_precondition_dim)
        super().__init__(params, *adam, *bases, stagger=stagger, maximize=maximize)

    def get_shapes(self, group: Group, param: Tensor) -> Mapping[str, Shape] | None:
        """Return the shapes of SOAP's state, and of the inverse roots of the eigenvalues of each side."""
        shapes = super().get_shapes(group, param)
        if shapes is None:
            return None
        sides = [int(name.rpartition("_")[2]) for name in shapes if name.startswith("basis")]
        return {**shapes, **{f"root_{side}": (param.shape[side],) for side in sides}}

    def compute_step(self, group: Group, stack: Stack, inside: Tensor, step: int) -> Tensor:
        """Compute Adam's step in the bases; only parameters without bases get a bias correction."""
        if stack.flat:
            return super().compute_step(group, stack, inside, step)
        return compute_adam_step(stack.state, inside, group["betas"], group["eps"], None)

    def begin(self, group: Group, stack: Stack, gradient: Tensor) -> None:
        """Compute the first statistics, without whitening, and their eigenvectors."""
        for side in stack.turns:
            rows = gradient.movedim(side + 1, 1).flatten(2)
            gram = stack.state[f"gram_{side}"]
            gram.baddbmm_(rows, rows.mT, alpha=(1 - get_decay(group)) / rows.shape[2])
            stack.state[f"basis_{side}"].copy_(find_eigenvectors(gram))
            stack.state[f"root_{side}"].fill_(FIRST_VALUE**-0.5)

    def learn(self, group: Group, stack: Stack, gradient: Tensor, inside: Tensor) -> None:
        """Update statistics and eigenvalues of all sides, from the roots of the last step."""
        decay = get_decay(group)
        means = {}
        for side in stack.turns:
            white = self._whiten(stack, inside, side).movedim(side + 1, 1).flatten(2)
            means[side] = white.square().mean(2)
            rows = torch.bmm(stack.state[f"basis_{side}"], white)
            gram = stack.state[f"gram_{side}"]
            gram.baddbmm_(rows, rows.mT, beta=decay, alpha=(1 - decay) / rows.shape[2])
        for side, mean in means.items():
            root = stack.state[f"root_{side}"]
            values = root.square().reciprocal_().nan_to_num_(0.0, 0.0, 0.0).lerp_(mean, 1 - decay)
            bound = max(LEAST_BOUND, min(root.shape[1], GREATEST_BOUND))
            root.copy_(values.rsqrt_().nan_to_num_(0.0, 0.0, 0.0).clamp_(max=bound))

    @staticmethod
    def _whiten(stack: Stack, inside: Tensor, side: int) -> Tensor:
        """Multiply the gradient in the bases by the inverse roots of all sides but one."""
        for other in stack.turns:
            if other != side:
                ones = [1] * (len(stack.shape) - other - 1)
                before = [1] * other
                inside = inside * stack.state[f"root_{other}"].view(len(inside), *before, -1, *ones)
        return inside
