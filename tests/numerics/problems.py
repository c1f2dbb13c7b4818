"""Least-squares problems, and their solution by a slow definition in float64 that forms no Gram."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plywise.numerics.least_squares import CentredSystem, solve_damped, solve_damped_with_bias
from plywise.numerics.products import centre_rows, compute_lower_product, compute_outer_product

F32, F64 = torch.float32, torch.float64


@dataclass
class Problem:
    """``argmin_X ½‖A X - Δ‖² + λ/2 ‖X‖²`` for each group, with rows A (g, n, k) and targets Δ (g, n, c)."""

    rows: Tensor
    delta: Tensor
    damping: float

    @property
    def dual(self) -> bool:
        return self.rows.shape[1] <= self.rows.shape[2]

    def build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, delta = self.rows.to(dtype), self.delta.to(dtype)
        if self.dual:
            return compute_lower_product(rows), delta
        return compute_lower_product(rows.mT), rows.mT @ delta

    def solve(self, damping=None) -> tuple[Tensor | None, list[str]]:
        """X as `solve_damped` has it, and the events."""
        events: list[str] = []
        damping = self.damping if damping is None else damping
        answer = solve_damped(self.build, damping, self.rows.dtype, events.append, dual=self.dual)
        if answer is None:
            return None, events
        assert torch.isfinite(answer).all()
        return (self.rows.to(answer.dtype).mT @ answer if self.dual else answer), events

    def build_centred(self, dtype: torch.dtype) -> CentredSystem:
        rows, delta = self.rows.to(dtype), self.delta.to(dtype)
        rows, mean = centre_rows(rows)
        delta, target = centre_rows(delta)
        n = rows.shape[1]
        if self.dual:
            projected = (rows @ mean.unsqueeze(2)).squeeze(2)
            return CentredSystem(compute_lower_product(rows), delta, mean, target, n, projected)
        return CentredSystem(compute_lower_product(rows.mT), rows.mT @ delta, mean, target, n)

    def solve_with_bias(self, damping=None) -> tuple[Tensor | None, list[str]]:
        """X and b below it, as `solve_damped_with_bias` has them, and the events."""
        events: list[str] = []
        damping = self.damping if damping is None else damping
        answer = solve_damped_with_bias(
            self.build_centred, damping, self.rows.dtype, events.append, dual=self.dual
        )
        if answer is None:
            return None, events
        weight, bias = answer
        assert torch.isfinite(weight).all()
        assert torch.isfinite(bias).all()
        if self.dual:
            rows, mean = centre_rows(self.rows.to(weight.dtype))
            weight = rows.mT @ weight + compute_outer_product(mean, bias)
        return torch.cat([weight, bias.unsqueeze(1)], 1), events

    def with_ones(self) -> "Problem":
        return Problem(with_ones(self.rows), self.delta, self.damping)

    def slow_solution(self) -> Tensor:
        """By a QR factorisation of the stacked problem, after a division by a power of two."""
        rows, delta = self.rows.to(F64), self.delta.to(F64)
        scale = 2.0 ** math.floor(math.log2(max(float(rows.abs().max()), math.sqrt(self.damping), 1e-300)))
        k = rows.shape[2]
        below = math.sqrt(self.damping) / scale * torch.eye(k, dtype=F64).expand(len(rows), k, k)
        stacked = torch.cat([rows / scale, below], 1)
        targets = torch.cat([delta, delta.new_zeros(len(rows), k, delta.shape[2])], 1)
        return torch.linalg.lstsq(stacked, targets).solution / scale

    def gradient_error(self) -> float:
        """Relative error of the plain gradient ``AᵀΔ`` in the problem's dtype: what backpropagation loses."""
        exact = self.rows.to(F64).mT @ self.delta.to(F64)
        return relative(self.rows.mT @ self.delta, exact)


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], 2)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm, of the worst group."""
    scale = expected.abs().amax().clamp_min(1e-300)
    error = ((actual.to(F64) - expected) / scale).norm(dim=(1, 2))
    return float((error / (expected / scale).norm(dim=(1, 2)).clamp_min(1e-300)).max())


def draw_rows(kind: str, n: int, k: int, seed: int = 0, groups: int = 1) -> Tensor:
    """Rows of float32 with typical structure."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(groups, n, k, generator=generator)
    if kind == "normal":
        return noise
    if kind == "relu":
        return noise.relu()
    if kind == "pixels":
        return torch.rand(groups, n, k, generator=generator)
    if kind == "smooth":  # of low rank, nearly
        mixed = noise[..., : min(k, 12)] @ torch.randn(min(k, 12), k, generator=generator)
        return torch.sigmoid(mixed)
    if kind == "binary":
        return (noise > 0.8).float()
    if kind == "scales":
        return noise.relu() * 10 ** torch.randn(k, generator=generator)
    return float(kind) + noise  # an offset


def draw_delta(kind: str, rows: Tensor, c: int, seed: int = 0) -> Tensor:
    """Gradients at the output, of float32."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(*rows.shape[:2], c, generator=generator)
    if kind == "normal":
        return noise
    if kind == "constant":
        return 1 + 0.01 * noise
    if kind == "centred":
        return noise - noise.mean(1, keepdim=True)
    return torch.tanh(rows @ torch.randn(rows.shape[2], c, generator=generator) / rows.shape[2] ** 0.5)
