"""NorMuon: Muon with a running mean that gives all rows (neurons) the same size."""

import math
from collections.abc import Mapping

from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise.numerics.norms import compute_row_norms
from plywise.numerics.polar import COEFFICIENTS
from plywise.optim.muon import Muon
from plywise.optim.plain import Group
from plywise.optim.stacked import Shape, Stack, StackedOptimizer

ROW_EPS = 1e-10
"""Added to the root of a row's mean square."""


class NorMuon(Muon):
    """Muon with a second moment for each row of the orthogonalised matrix.

    Idea: the rows of Muon's steps differ in size, so some neurons move much more than others. Each row is
        divided by the root of a running mean of its squares, as Adam does for each weight.
    Equation: X as in Muon; v ← beta2 v + (1 − beta2) mean over columns of X²; Y = X / (√v + 1e-10);
        W ← (1 − lr weight_decay) W − 0.2 lr √(m n) Y / ‖Y‖.
    Use when: Muon works well.
    Do not use when: weights have one or few rows.
    Layers: the same as Muon; the others move by AdamW at the same ``lr``.
    Cost: that of Muon, plus a number for each row and four passes over the weights.
    Status: faithful to algorithm 1 of the paper: its step has a root mean square of 0.2, as large as AdamW's.
    Source: Li et al., "NorMuon: making Muon more efficient and scalable", 2025 (arXiv 2510.05491).
    Code: zichongli5/NorMuon, which keeps the norm of X instead.
    Results: the paper's language models are not reproduced here.
    Limits: those of Muon.

    Args:
        params: parameters or parameter groups; a group may say ``use_muon=False``.
        lr: learning rate. Default 1e-3. Range 1e-4 to 0.1.
        weight_decay: decoupled. Default 0.1. Range 0 to 1.
        momentum: the part of the momentum that is kept in a step. Default 0.95. Range 0.8 to 0.99.
        beta2: the part of v that is kept in a step. Default 0.95. Range 0.9 to 0.999.
        nesterov: look ahead by one step of momentum. Default True.
        ns_steps: iterations. Default 5. Range 1 to 10.
        use_muon: whether matrices move by NorMuon; for groups. Default True.
        transposed: whether matrices are stored as (in, out), as for `Muon`; for groups. Default False.
        betas: AdamW's decay rates. Default (0.9, 0.999).
        adamw_eps: AdamW's ε. Default 1e-8. Range 1e-12 to 1e-4.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import NorMuon
        >>> weight = torch.nn.Parameter(torch.zeros(3, 4))
        >>> weight.grad = torch.arange(12.0).reshape(3, 4)
        >>> NorMuon([weight], lr=1.0).step()
        >>> round(weight.square().mean().sqrt().item(), 3)
        0.2
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        *,
        use_muon: bool = True,
        transposed: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        iteration = {"ns_coefficients": COEFFICIENTS, "eps": 1e-7, "ns_steps": ns_steps, "ns_dtype": None}
        adamw = {"use_muon": use_muon, "betas": betas, "adamw_eps": adamw_eps}
        more = {"beta2": beta2, "adjust_lr_fn": None, "transposed": transposed, "maximize": maximize}
        # not that of Muon, which has other settings
        StackedOptimizer.__init__(self, params, {**settings, **iteration, **adamw, **more})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        super().check(group)
        self.require_range("beta2", group["beta2"], 0, 1)

    def get_shapes(self, group: Group, param: Tensor) -> Mapping[str, Shape] | None:
        """Return the shapes of Muon's state, and of a number for each row."""
        shapes = super().get_shapes(group, param)
        if shapes is None:
            return None
        first = param.shape[0]
        return {**shapes, "row_square": (param.numel() // first if group["transposed"] else first, 1)}

    def compute_step(self, group: Group, stack: Stack, polar: Tensor) -> tuple[Tensor, float]:
        """Compute the step at rate 1, (k, m, n), and a factor, from the k orthogonal matrices ``polar``."""
        polar = polar.to(stack.params[0].dtype)
        squares = stack.state["row_square"]
        squares.lerp_(polar.square().mean(2, keepdim=True), 1 - group["beta2"])
        even = polar / squares.sqrt().add_(ROW_EPS)
        norms = compute_row_norms(even.flatten(1)).clamp_(min=ROW_EPS)[:, None, None]
        return even.div_(norms), 0.2 * math.sqrt(polar[0].numel())
