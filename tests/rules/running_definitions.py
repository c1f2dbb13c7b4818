"""What rules with running state answer, by dense algebra in float64, step by step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

import plywise as pw


class Definition(Protocol):
    def step(self, A: Tensor, T: Tensor) -> Tensor:
        """The update (m, k) for rows A (n, k) and gradients at their outputs T (n, m)."""


@dataclass
class Kronecker:
    """``c · L^-p G R^-q`` with roots made in every ``refresh_every``-th step."""

    left: float
    right: float
    decay: float
    damping: float
    relative_to: str = "mean"
    every: tuple[int, int] = (1, 1)
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    roots: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def step(self, A: Tensor, T: Tensor) -> Tensor:
        if self.steps % self.every[0] == 0:
            for side, rows, count in (("R", A, len(A)), ("L", T, 1)):
                self.sums[side] = self.decay * self.sums.get(side, 0) + rows.mT @ rows
                self.counts[side] = self.decay * self.counts.get(side, 0) + count
        if self.steps % self.every[1] == 0:
            for side, power in (("R", self.right), ("L", self.left)):
                self.roots[side] = self.take_root(self.sums[side] / self.counts[side], power)
        self.steps += 1
        G = T.mT @ A
        D = self.roots["L"] @ G @ self.roots["R"]
        return D * (G.norm() / D.norm()) if D.norm() > 0 else D

    def take_root(self, S: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        values = values.clamp_min(0)
        if power == 0 or values[-1] == 0:
            return torch.eye(len(S), dtype=S.dtype)
        shift = self.damping * (values.mean() if self.relative_to == "mean" else values[-1])
        return vectors @ torch.diag((values + shift) ** -power) @ vectors.mT


@dataclass
class Recursive:
    """``G P / h``; P is corrected afterwards. Where ``κ ū·Pū`` exceeds 10⁴, P is made smaller at first."""

    forgetting: float
    gain: float
    ridge: float
    P: Tensor | None = None

    def step(self, A: Tensor, T: Tensor) -> Tensor:
        mean = A.mean(0)
        P = torch.eye(len(mean), dtype=A.dtype) / self.ridge if self.P is None else self.P
        energy = self.gain * float(mean @ P @ mean)
        D = (T.mT @ A) @ P / (self.forgetting * max(energy / 1e4, 1.0) + energy)
        P = P / max(energy / 1e4, 1.0)
        h = self.forgetting + min(energy, 1e4)
        P = (P - self.gain / h * torch.outer(P @ mean, P @ mean)) / self.forgetting
        held = min(1.0, len(mean) / self.ridge / float(P.trace())) if self.forgetting < 1 else 1.0
        self.P = P * held
        return D


EACH = {"stats_every": 1, "refresh_every": 1}

RULES: dict[str, tuple[Callable[[], pw.Rule], Callable[[], Definition]]] = {
    "RLS": (pw.RLS, lambda: Recursive(1.0, 0.1, 1.0)),
    "RLS that forgets": (
        lambda: pw.RLS(forgetting=0.99, gain=1.0, ridge=0.1),
        lambda: Recursive(0.99, 1.0, 0.1),
    ),
    "KFAC": (lambda: pw.KFAC(**EACH), lambda: Kronecker(1, 1, 0.95, 1.0)),
    "Foof": (lambda: pw.Foof(slowdown=1, **EACH), lambda: Kronecker(0, 1, 0.95, 1.0)),
    "Precondition": (
        lambda: pw.Precondition(left=0.25, right=0.75, **EACH),
        lambda: Kronecker(0.25, 0.75, 0.95, 1.0),
    ),
    "FeatureWhitening": (
        lambda: pw.FeatureWhitening(**EACH),
        lambda: Kronecker(0, 0.5, 0.95, 1e-3, "max"),
    ),
    "AdaBK": (lambda: pw.AdaBK(**EACH), lambda: Kronecker(0.5, 0.5, 0.9, 0.01, "max")),
    "FeatureWhitening, paper": (
        lambda: pw.FeatureWhitening(cadence="paper"),
        lambda: Kronecker(0, 0.5, 0.95, 1e-3, "max", (50, 500)),
    ),
    "AdaBK, paper": (
        lambda: pw.AdaBK(cadence="paper"),
        lambda: Kronecker(0.5, 0.5, 0.9, 0.01, "max", (200, 2000)),
    ),
}
