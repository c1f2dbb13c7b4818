"""Muon: set all singular values of the momentum to about 1, for all matrices of a shape at once."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import require_choice, require_whole
from plywise.numerics.polar import COEFFICIENTS, Triple, orthogonalize
from plywise.optim.plain import Group
from plywise.optim.stacked import Shape, Stack, StackedOptimizer, compute_adam_step

Coefficients = Triple | Sequence[Triple]
ADJUSTMENTS = ("original", "match_rms_adamw", "balanced")
THREE_ITERATIONS = (
    (7.9893875, -22.748033, 16.678775),
    (3.6434165, -2.7268641, 0.53710776),
    (2.6712641, -1.9853135, 0.4535223),
)
"""The coefficients of three polynomials, each the best for what the one before it leaves. Together they bring
all singular values from 0.01 to 1 between 0.73 and 1.27."""
SMALL_SIDE = 96
"""For smaller sides the iteration is not rounded to bfloat16, which saves no time in small products."""


class Muon(StackedOptimizer):
    """torch's Muon, batched by shape, with AdamW for parameters that are not matrices.

    Idea: the momentum of a weight matrix has a few large singular values and many small ones. A step along
        the nearest orthogonal matrix moves all directions by the same amount. A few matrix products
        approximate that matrix.
    Equation: B ← momentum B + (1 − momentum) G, M = G + momentum (B − G) (B without ``nesterov``);
        X = M / ‖M‖, then ``ns_steps`` times A = X Xᵀ, X ← a X + (b A + c A²) X;
        W ← (1 − lr weight_decay) W − lr r X, r = √max(1, m/n), 0.2 √max(m, n) or √(0.32 √(m max(m, n) / n)).
    Use when: hidden weights are matrices, and you can tune the rate a little.
    Do not use when: layers are wide and batches small: then a step costs as much as several plain steps.
    Layers: parameters of two or more dimensions, flattened to (first, rest). All others, and all in a group
        with ``use_muon=False``, move by AdamW at the same ``lr`` and ``weight_decay``. Put embeddings and the
        output layer in such a group, because their shapes do not show what they are.
    Cost: 15 matrix products of the smaller side in each step for 5 iterations, whatever the batch size (two
        with matrices that are at least twice as long as high, and 17 of the smaller side squared); one copy
        of the weights. Each function is called once for all matrices of a shape. There is no host
        synchronisation.
    Status: faithful to torch.optim.Muon: the same momentum, iteration, factors and defaults, in the same
        precision except for matrices with a side below 96, for float64 weights, and on CPUs without products
        in bfloat16, which all take a higher one.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; "match_rms_adamw":
        Liu et al., "Muon is scalable for LLM training", 2025 (arXiv 2502.16982); √(m/n): Yang, Simon,
        Bernstein, "A spectral condition for feature learning", 2023 (arXiv 2310.17813); polynomials that
        differ: Amsel et al., "The Polar Express", 2025 (arXiv 2505.16932).
    Code: KellerJordan/Muon; torch.optim.Muon.
    Results: steps are equal to torch's up to rounding, in 0.6 to 0.7 of its CPU time on small networks:
        benchmarks/peers_cost.py.
    Limits: the iteration ends near the orthogonal matrix, with singular values between 0.7 and 1.2. The state
        has the dtype of the weights. DTensors are not supported.

    Args:
        params: parameters or parameter groups; a group may say ``use_muon=False``.
        lr: learning rate. Default 1e-3. Range 1e-4 to 0.1.
        weight_decay: decoupled. Default 0.1. Range 0 to 1.
        momentum: share of the momentum that stays. Default 0.95. Range 0.8 to 0.99.
        nesterov: look ahead by one step of momentum. Default True.
        ns_coefficients: a, b and c of all iterations, or such a triple for each of them, as in
            `plywise.optim.muon.THREE_ITERATIONS`. Default (3.4445, -4.775, 2.0315).
        eps: the smallest norm by which M is divided. Default 1e-7. Range 1e-10 to 1e-4.
        ns_steps: iterations. Default 5. Range 1 to 10.
        adjust_lr_fn: "original" for r = √max(1, m/n); "match_rms_adamw" for r = 0.2 √max(m, n), whose steps
            are as large as AdamW's, so that both can have the same ``lr``; "balanced" for the geometric mean
            of "match_rms_adamw" and 1.6 √(m/n), whose steps change outputs as much at any width. Both are the
            same for 64 × 64. Default "original".
        ns_dtype: precision of the iteration. None: bfloat16, as in torch, for matrices whose smaller side is
            96 or more, except on CPUs that have no products in bfloat16, where torch's take 20 to 45 times
            as long; else float32; float64 for weights in float64.
        use_muon: whether matrices move by Muon; for groups. Default True.
        transposed: whether matrices are stored as (in, out), as those of transposed convolutions and of
            transformers' ``Conv1D``; for groups. Default False.
        betas: AdamW's decay rates. Default (0.9, 0.999).
        adamw_eps: AdamW's ε. Default 1e-8. Range 1e-12 to 1e-4.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import Muon
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "use_muon": False}]
        >>> optimizer = Muon(groups, lr=0.01, adjust_lr_fn="match_rms_adamw")
        >>> before = model[0].weight.detach().clone()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight, before)
        False
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
        use_muon: bool = True,
        transposed: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        iteration = {
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
        }
        adamw = {"use_muon": use_muon, "betas": betas, "adamw_eps": adamw_eps}
        more = {"adjust_lr_fn": adjust_lr_fn, "transposed": transposed, "maximize": maximize}
        super().__init__(params, {**settings, **iteration, **adamw, **more})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        for name in ("lr", "weight_decay", "eps", "adamw_eps"):
            self.require_range(name, group[name], 0, math.inf)
        self.require_range("momentum", group["momentum"], 0, 1)
        self.require_pair("betas", group["betas"])
        require_whole(self, ns_steps=group["ns_steps"])
        self.require_range("ns_steps", group["ns_steps"], 1, 101)
        if group["adjust_lr_fn"] is not None:
            require_choice(self, "adjust_lr_fn", group["adjust_lr_fn"], ADJUSTMENTS)
        given = group["ns_coefficients"]
        triples = list_iterations(given, group["ns_steps"]) if isinstance(given, Sequence) else []
        if len(triples) != group["ns_steps"] or any(len(triple) != 3 for triple in triples):
            raise ValueError(
                f"{type(self).__name__}: ns_coefficients must be three numbers, or three for each of the "
                f"{group['ns_steps']} iterations (ns_steps), not {group['ns_coefficients']!r}."
            )

    def get_shapes(self, group: Group, param: Tensor) -> Mapping[str, Shape] | None:
        """Return the shape of the momentum of a matrix; None for parameters that move by AdamW."""
        if not group["use_muon"] or param.dim() < 2 or param.numel() == 0:
            return None
        return {"momentum_buffer": tuple(param.shape)}

    def advance(self, group: Group, stack: Stack, gradient: Tensor) -> None:
        """Take a step of Muon, or of AdamW if the stack is flat."""
        lr = float(group["lr"])
        if stack.flat:
            update = compute_adam_step(stack.state, gradient, group["betas"], group["adamw_eps"], stack.step)
            factor = 1.0
        else:
            update, factor = self.compute_step(group, stack, self._orthogonalize(group, stack, gradient))
            update = update.mT if group["transposed"] else update
        stack.shrink(lr, group["weight_decay"])
        stack.add(update, -lr * factor)

    def compute_step(self, group: Group, stack: Stack, polar: Tensor) -> tuple[Tensor, float]:
        """Compute the step at rate 1, (k, m, n), and a factor, from the k orthogonal matrices ``polar``."""
        m, n = polar.shape[1:]
        if group["adjust_lr_fn"] == "match_rms_adamw":
            return polar, 0.2 * math.sqrt(max(m, n))
        if group["adjust_lr_fn"] == "balanced":
            return polar, math.sqrt(0.2 * math.sqrt(max(m, n)) * 1.6 * math.sqrt(m / n))
        return polar, math.sqrt(max(1, m / n))

    def _orthogonalize(self, group: Group, stack: Stack, gradient: Tensor) -> Tensor:
        momentum, buffer = group["momentum"], stack.state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        ahead = torch.lerp(gradient, buffer, momentum) if group["nesterov"] else buffer
        matrices = ahead.reshape(*ahead.shape[:2], -1)
        matrices = matrices.mT if group["transposed"] else matrices
        dtype = group["ns_dtype"] or choose_dtype(matrices)
        iterations = list_iterations(group["ns_coefficients"], group["ns_steps"])
        return orthogonalize(matrices.to(dtype), iterations, group["eps"])


def choose_dtype(matrices: Tensor) -> torch.dtype:
    """Choose the precision for (k, m, n) matrices: bfloat16 where products are faster in it.

    Example:
        >>> choose_dtype(torch.zeros(1, 64, 500))
        torch.float32
    """
    if matrices.dtype == torch.float64:
        return torch.float64
    is_faster = matrices.device.type != "cpu" or has_bfloat16_products()
    return torch.bfloat16 if is_faster and min(matrices.shape[1:]) >= SMALL_SIDE else torch.float32


@cache
def has_bfloat16_products() -> bool:
    """Say if this CPU multiplies bfloat16 matrices itself.

    If not, torch's products in bfloat16 take 20 to 45 times as long as in float32.

    Example:
        >>> has_bfloat16_products() in (True, False)
        True
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def list_iterations(coefficients: Coefficients, steps: int) -> Sequence[Triple]:
    """The coefficients of each iteration.

    Example:
        >>> list_iterations((2.0, -1.5, 0.5), 2)
        [(2.0, -1.5, 0.5), (2.0, -1.5, 0.5)]
    """
    if coefficients and isinstance(coefficients[0], Sequence):
        return cast(Sequence[Triple], coefficients)
    return [cast(Triple, coefficients)] * steps
