"""Statistics of every kind, and their roots by the slow definition."""

import math

import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64
RELATIVE = ["mean", "max", "absolute"]


def spectrum(name: str, k: int) -> Tensor:
    return {
        "well conditioned": torch.linspace(1, 3, k, dtype=F64),
        "log-spaced": torch.logspace(0, -6, k, dtype=F64),
        "rank one": torch.eye(k, dtype=F64)[0] * 5,
        "half rank": torch.arange(k, dtype=F64).sub((k - 1) // 2).clamp_min(0),
        "zero": torch.zeros(k, dtype=F64),
        "constant": torch.full((k,), 0.3, dtype=F64),
    }[name]


SPECTRA = ["well conditioned", "log-spaced", "rank one", "half rank", "zero", "constant"]


def gram_of(values: Tensor, seed: int = 0) -> Tensor:
    """(1, k, k) with these eigenvalues and random eigenvectors."""
    k = len(values)
    noise = torch.randn(k, k, dtype=F64, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(noise).Q
    product = (Q * values) @ Q.T
    return ((product + product.T) / 2)[None]


def lower_only(gram: Tensor) -> Tensor:
    """With NaN above the diagonal, which no function may read."""
    above = torch.ones_like(gram, dtype=torch.bool).triu(1)
    return gram.masked_fill(above, math.nan)


def damping_of(matrix: Tensor, damping: float, relative: str) -> float:
    if relative == "absolute":
        return damping
    values = torch.linalg.eigvalsh(matrix)
    return damping * float(values.mean() if relative == "mean" else values.max())


def slow_root(gram: Tensor, power: float, damping: float, relative: str) -> Tensor:
    out = []
    for matrix in gram.double():
        shift = damping_of(matrix, damping, relative)
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(0) + shift
        if not values.max() > 0:
            out.append(torch.eye(len(matrix), dtype=F64))
        else:
            out.append(vectors @ torch.diag(values**-power) @ vectors.T)
    return torch.stack(out)


def error(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)
