"""What a ridge head must have solved, and how near is near enough."""

import torch.nn.functional as F
from torch import Tensor


def close(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((left - right).norm() <= tolerance * right.norm())


def normal_equations_error(rows: Tensor, y: Tensor, W: Tensor, ridge: float = 1e-2) -> float:
    """``FᵀF W + λW - FᵀY``, relative to ``FᵀY``."""
    gram, cross = rows.T @ rows, rows.T @ F.one_hot(y, W.shape[1]).to(rows)
    damping = ridge * gram.diagonal().mean()
    return float((gram @ W + damping * W - cross).norm() / cross.norm())
