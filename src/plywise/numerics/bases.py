"""Changes of basis ``T`` of a layer's columns: whole matrices, and those that only some directions need.

A `Basis` turns a gradient, ``G T``, a step back, ``S Tᵀ``, and a momentum out of its coordinates, ``M T⁻¹``.
A whole matrix costs 2mk² operations for each of them. Where only the r leading eigenvectors V matter, an
orthogonal Q whose first columns are V (up to their signs) costs 4mkr: ``Q = I - Y F Yᵀ`` with the Householder
vectors Y of V (compact WY form: Schreiber, Van Loan 1989). Its other columns are not eigenvectors. They are a
basis of the space orthogonal to V, where all eigenvalues are replaced by their mean, so any basis will do.

Shapes: ``g`` groups, ``k`` columns, ``r`` directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from plywise.numerics.low_rank import LowRankRoot, multiply_by_root

NO_REFLECTION = 1e-30
"""Replaces the coefficient 0 of a reflection that does nothing, because we divide by the coefficient."""

ROUNDING = 64.0
"""Errors of a turned row's numbers, relative to the largest, in units of the precision: of rounding, and of
eigenvectors."""


class Basis(Protocol):
    """A change of basis T, (g, k, k).

    `turn` and `turn_back` may overwrite their argument, which saves a pass over the memory. They may put
    their result into ``out`` and return it, or return another tensor.
    """

    def turn(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x T`` for rows (g, m, k)."""

    def turn_back(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x Tᵀ``."""

    def solve(self, x: Tensor) -> Tensor:
        """Compute ``x T⁻¹``."""

    def as_matrix(self) -> Tensor:
        """Make T, (g, k, k)."""


@dataclass(frozen=True)
class DenseBasis:
    """T as a matrix.

    Attributes:
        matrix: T, (g, k, k).
    """

    matrix: Tensor

    def turn(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x T``."""
        return torch.bmm(x, self.matrix, out=out)

    def turn_back(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x Tᵀ``."""
        return torch.bmm(x, self.matrix.mT, out=out)

    def solve(self, x: Tensor) -> Tensor:
        """Compute ``x T⁻¹``."""
        return torch.linalg.solve(self.matrix, x, left=False)

    def as_matrix(self) -> Tensor:
        """Return T."""
        return self.matrix


@dataclass(frozen=True)
class ThinBasis:
    """``T = Q diag(scales)`` with ``Q = I - Y F Yᵀ`` orthogonal.

    Attributes:
        reflectors: Y, (g, k, r).
        factor: F, (g, r, r), upper triangular.
        scales: what the columns of Q are multiplied by, (g, k), positive.
    """

    reflectors: Tensor
    factor: Tensor
    scales: Tensor

    @classmethod
    def complete(cls, vectors: Tensor, scales: Tensor) -> Self:
        """Complete orthonormal columns V (g, k, r), r < k, by any others that are orthogonal to them."""
        packed, coefficients = torch.geqrf(vectors)
        rank = vectors.shape[2]
        eye = torch.eye(*vectors.shape[1:], dtype=vectors.dtype, device=vectors.device)
        reflectors = packed.tril(-1) + eye
        coefficients = torch.where(coefficients.abs() > 0, coefficients, NO_REFLECTION)
        inverse = (reflectors.mT @ reflectors).triu(1) + torch.diag_embed(1 / coefficients)
        factor = torch.linalg.solve_triangular(inverse, eye[:rank].expand_as(inverse), upper=True)
        return cls(reflectors, factor, scales)

    def turn(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x Q diag(scales)``."""
        return torch.mul(self._reflect(x, self.factor), self.scales.unsqueeze(1), out=out)

    def turn_back(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x diag(scales) Qᵀ``."""
        return self._reflect(torch.mul(x, self.scales.unsqueeze(1), out=out), self.factor.mT)

    def solve(self, x: Tensor) -> Tensor:
        """Compute ``x diag(scales)⁻¹ Qᵀ``."""
        return self._reflect(x / self.scales.unsqueeze(1), self.factor.mT)

    def as_matrix(self) -> Tensor:
        """Make T."""
        size = self.reflectors.shape[1]
        eye = torch.eye(size, dtype=self.scales.dtype, device=self.scales.device)
        return self.turn(eye.repeat(len(self.scales), 1, 1))

    def _reflect(self, x: Tensor, factor: Tensor) -> Tensor:
        return x.baddbmm_(torch.bmm(torch.bmm(x, self.reflectors), factor), self.reflectors.mT, alpha=-1)


@dataclass(frozen=True)
class ScaledBasis(LowRankRoot):
    """``T = scale · (I + V diag(w) Vᵀ)``, symmetric: it scales along V, and all other directions equally."""

    def turn(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x T``."""
        return multiply_by_root(x, self)

    def turn_back(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``x T``: T is symmetric."""
        return self.turn(x)

    def solve(self, x: Tensor) -> Tensor:
        """Compute ``x T⁻¹``."""
        return multiply_by_root(x, LowRankRoot(self.vectors, 1 / (1 + self.weights) - 1, 1 / self.scale))

    def as_matrix(self) -> Tensor:
        """Make T."""
        size = self.vectors.shape[1]
        eye = torch.eye(size, dtype=self.scale.dtype, device=self.scale.device)
        return self.turn(eye.expand(len(self.scale), size, size))


@dataclass(frozen=True)
class TwoSidedBasis:
    """Changes of basis of columns, T, and of rows, S; each may be missing.

    Attributes:
        right: T, (n, k, k).
        left: S, (n, m, m).
    """

    right: Basis | None
    left: Basis | None

    @property
    def keeps_rows_apart(self) -> bool:
        """Whether some rows of a matrix can be turned without the others."""
        return self.left is None

    def turn(self, x: Tensor, out: Tensor) -> Tensor:
        """Put ``Sᵀ x T`` into ``out``, for matrices (n, m, k); ``x`` may be overwritten.

        Numbers as small as their row's rounding errors become zero: in a direction that no input has, they
        are nothing else, and an optimizer that divides by second moments would make whole steps of them.
        """
        y = x if self.right is None else drop_rounding(self.right.turn(x, out))
        y = y if self.left is None else drop_rounding(self.left.turn(y.mT)).mT
        return y if y is out else out.copy_(y)

    def turn_back(self, x: Tensor, out: Tensor) -> Tensor:
        """Put ``S x Tᵀ`` into ``out``, in the same way."""
        y = x if self.right is None else self.right.turn_back(x, out)
        y = y if self.left is None else self.left.turn_back(y.mT).mT
        return y if y is out else out.copy_(y)

    def solve(self, x: Tensor) -> Tensor:
        """Compute ``S⁻ᵀ x T⁻¹``: the inverse of `turn`."""
        y = x if self.right is None else self.right.solve(x)
        return y if self.left is None else self.left.solve(y.mT).mT


def drop_rounding(x: Tensor) -> Tensor:
    """Move the numbers of each row towards zero by as much as rounding may have moved them; in place."""
    errors = x.abs().amax(-1, keepdim=True).mul_(ROUNDING * torch.finfo(x.dtype).eps)
    return x.sub_(x.clamp(-errors, errors))


def make_basis(vectors: Tensor, scales: Tensor, turned: bool, last: Basis | None = None) -> Basis:
    """Make a basis from eigenvectors V (g, k, r), all or only the leading ones, and factors of its columns.

    Args:
        vectors: V.
        scales: the factors (g, k): first those of the columns of V, then one and the same for all others.
        turned: whether to make ``T = Q diag(scales)``; otherwise ``Q diag(scales) Qᵀ``, which keeps the axes.
        last: a basis of the same vectors, if there is one, because completing them is most of the work.
    """
    if isinstance(last, ThinBasis):
        return replace(last, scales=scales)
    rank = vectors.shape[2]
    if rank == vectors.shape[1]:
        matrix = vectors * scales.unsqueeze(1)
        return DenseBasis(matrix if turned else matrix @ vectors.mT)
    if turned:
        return ThinBasis.complete(vectors, scales)
    return ScaledBasis(vectors, scales[:, :rank] / scales[:, -1:] - 1, scales[:, -1])


KINDS: dict[type, dict[str, tuple[str, int]]] = {
    DenseBasis: {"matrix": ("basis", 3)},
    ThinBasis: {"reflectors": ("reflectors", 3), "factor": ("factor", 3), "scales": ("scales", 2)},
    ScaledBasis: {"vectors": ("vectors", 3), "weights": ("weights", 2), "scale": ("tail", 1)},
}
"""The tensors of each kind: the names under which they are kept, and their numbers of dimensions."""


NAMES = {
    side: [
        (kind, [(f"{side}.{name}", dims) for name, dims in parts.values()]) for kind, parts in KINDS.items()
    ]
    for side in ("input", "output")
}
"""The same for each side, made once, because bases are looked up in each step."""


def list_tensors(basis: Basis, side: str) -> dict[str, Tensor]:
    """Return the tensors of a basis under the names of a side, such as ``"input.basis"``."""
    parts = KINDS[type(basis)]
    return {f"{side}.{name}": getattr(basis, attribute) for attribute, (name, _) in parts.items()}


def find_basis(tensors: Mapping[str, Tensor], side: str) -> Basis | None:
    """Return the basis that `list_tensors` gave, or None if there is none.

    Layers of one shape may be stacked, (layers, g, ...): then each layer's groups count as separate groups.
    """
    for kind, names in NAMES[side]:
        if names[0][0] in tensors and names[-1][0] in tensors:
            found = [(tensors[name], dims) for name, dims in names]
            basis: Basis = kind(*(x.flatten(0, 1) if x.dim() > dims else x for x, dims in found))
            return basis
    return None


def find_bases(tensors: Mapping[str, Tensor]) -> TwoSidedBasis | None:
    """Return the bases of both sides, or None if neither has one."""
    right, left = find_basis(tensors, "input"), find_basis(tensors, "output")
    return None if right is None and left is None else TwoSidedBasis(right, left)
