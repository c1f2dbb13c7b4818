"""What exact solves answer, by dense algebra in float64, and the rules that are compared with it."""

from collections.abc import Callable

import torch
from torch import Tensor

from plywise import NLMS, BackMatching, Consequentialism, ProxProp, Rule

RULES: dict[str, Callable[[], Rule]] = {
    "ProxProp": ProxProp,
    "ProxProp, mean": lambda: ProxProp(gram="mean"),
    "Consequentialism": Consequentialism,
    "NLMS": NLMS,
    "BackMatching": lambda: BackMatching(mode="exact", cap=None),
}

FLOOR = (16 * torch.finfo(torch.float32).eps) ** 2
"""What centred rows are damped by at least, in parts of the energy of the rows: rounding is no step."""


def ridge(A: Tensor, T: Tensor, damping: float | Tensor) -> Tensor:
    """``(AᵀA + λI)⁻¹ AᵀT`` by singular values."""
    U, s, V = torch.linalg.svd(A, full_matrices=False)
    return (T.mT @ U * torch.where(s > 0, s / (s * s + damping), 0)) @ V


def define(name: str, A: Tensor, T: Tensor, has_bias: bool, samples: int) -> Tensor:
    """The update (m, k), with the bias in the last column."""
    count, width = A.shape
    ones = torch.cat([A, torch.ones(count, 1, dtype=A.dtype)], 1) if has_bias else A
    if name == "ProxProp":
        return ridge(ones, T, 1.0)
    if name == "ProxProp, mean":
        return ridge(ones, T * count, float(count))
    if name == "NLMS":
        norms = ones.square().sum(1)
        return (T / (norms + 0.1 * norms.mean())[:, None]).mT @ ones
    T = T * samples
    if name == "Consequentialism" or not has_bias:
        return ridge(ones, T, 0.1 * ones.square().sum() / min(ones.shape))
    mean, mean_target = A.mean(0), T.mean(0)
    C = A - mean
    D = ridge(C, T - mean_target, 0.1 * C.square().sum() / min(count, width) + FLOOR * A.square().sum())
    return torch.cat([D, (mean_target - D @ mean)[:, None]], 1)
