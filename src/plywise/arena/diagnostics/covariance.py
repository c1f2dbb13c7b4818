"""Statistics of a layer's inputs: a running covariance, and how uneven it is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plywise.errors import DataError

MOST_FEATURES, MOST_GROUPS = 512, 8
"""The most features and groups of a layer in the covariance, for eigenvalues have a cubic cost. Eigenvalues
of a part lie between those of the whole, so a part's condition number is a lower bound."""
FLOOR = 1e-10
"""Eigenvalues below this share of the largest one count as zero: for float32 inputs they are noise."""


@dataclass(frozen=True)
class Inputs:
    """Statistics of a layer's inputs over all batches: the covariance of the rows of A, without the bias.

    Of a grouped convolution the worst group is reported.

    Attributes:
        rows: rows that were looked at.
        features: features that were looked at.
        constant: those of them that never change; they are left out of what follows.
        rank: directions in which the rows vary.
        condition: largest eigenvalue of the covariance over the smallest one; None if nothing varies.
        at_least: whether the condition number is only known to be that or larger: some directions do not
            vary, rows were too few to tell, or some features were not looked at.
        white: the condition number to expect from this number of rows if the true one is 1; None if there are
            no more rows than features.
        effective_rank: (sum of the eigenvalues)² / sum of their squares: how many directions carry the
            variance; None if nothing varies.
        mean_share: share of the rows' mean square norm that is the square norm of their mean, 0 to 1.
        spread: largest standard deviation of a feature over the median one, constant features left out.
    """

    rows: int
    features: int
    constant: int
    rank: int
    condition: float | None
    at_least: bool
    white: float | None
    effective_rank: float | None
    mean_share: float
    spread: float | None


class Covariance:
    """Running covariance of rows (g, n, d) in float64, about the first row: large means cost no digits.

    Example:
        >>> covariance = Covariance()
        >>> covariance.add(torch.tensor([[[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]]))
        >>> covariance.summarize().condition
        9.0
    """

    def __init__(self) -> None:
        self.count = self.width = self.groups = 0

    def add(self, rows: Tensor) -> None:
        """Rows of one more batch."""
        if rows.shape[1] == 0:
            return
        if self.count == 0:
            self.width = rows.shape[2]
            order = torch.randperm(self.width, generator=torch.Generator().manual_seed(0))
            self.chosen = order[:MOST_FEATURES].sort().values
        rows = rows[:, :, self.chosen.to(rows.device)].to(
            "cpu", torch.float64
        )  # some devices have no float64
        if self.count == 0:
            self.origin = rows[:, :1].clone()
            self.sums, self.gram = torch.zeros_like(self.origin), torch.zeros((), dtype=torch.float64)
        shifted = rows - self.origin
        self.sums = self.sums + shifted.sum(1, keepdim=True)
        self.gram = self.gram + shifted.mT @ shifted
        self.count += rows.shape[1]

    def summarize(self) -> Inputs | None:
        """Return the statistics of the worst group; None if there are no rows.

        Raises:
            PlywiseError: they hold NaN or infinity.
        """
        if self.count == 0:
            return None
        offsets = self.sums / self.count
        covariances = self.gram / self.count - offsets.mT @ offsets
        means = (self.origin + offsets).squeeze(1)
        if not bool(torch.isfinite(covariances).all()):
            raise DataError("A layer's inputs hold NaN or infinity; look at the data and the weights.")
        found = [self._group(*one) for one in zip(covariances, means, strict=True)]
        return max(found, key=lambda one: one.condition or 0.0)

    def _group(self, covariance: Tensor, mean: Tensor) -> Inputs:
        variances = covariance.diagonal()
        varying = variances > 0
        square = float(mean.square().sum())
        total = square + float(variances.clamp(min=0).sum())
        width, features = int(varying.sum()), len(mean)
        kept = _compute_eigenvalues(covariance[varying][:, varying])
        deviations = variances[varying].sqrt()
        white = None
        if 0 < width < self.count:
            ratio = math.sqrt(width / self.count)  # Marchenko and Pastur's edges
            white = ((1 + ratio) / (1 - ratio)) ** 2
        return Inputs(
            rows=self.count,
            features=features,
            constant=features - width,
            rank=len(kept),
            condition=float(kept[-1] / kept[0]) if len(kept) else None,
            at_least=len(kept) < width or features < self.width,
            white=white,
            effective_rank=float(kept.sum() ** 2 / kept.square().sum()) if len(kept) else None,
            mean_share=square / total if total else 0.0,
            spread=float(deviations.max() / deviations.median()) if width else None,
        )


def _compute_eigenvalues(covariance: Tensor) -> Tensor:
    """Return those above the floor, in ascending order."""
    if not len(covariance):
        return covariance.new_empty(0)
    scale = covariance.diagonal().max()
    values = torch.linalg.eigvalsh(covariance / scale) * scale
    return values[values > FLOOR * values[-1]]
