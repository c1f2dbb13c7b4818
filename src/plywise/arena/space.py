"""Search spaces, and quasi-random points at the same relative places for every method."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from plywise.errors import BenchError

MOST_TUNED = 2
"""The most numbers that may be tuned of a method. Shipped methods have just as many, for equal numbers of
trials are equal chances only in spaces of equal dimension."""


@dataclass(frozen=True)
class Range:
    """The search range of a number.

    Attributes:
        low: the least value.
        high: the greatest.
        default: its value without tuning.
        log: whether its logarithm is searched evenly (rates, dampings) or the number itself.
    """

    low: float
    high: float
    default: float
    log: bool = True

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.low <= self.default <= self.high):
            raise BenchError(f"{self} is not a range: low < high, and the default between them.")
        if self.log and self.low <= 0:
            raise BenchError(f"{self} cannot be searched by its logarithm: low must be above 0.")

    def at(self, share: float) -> float:
        """Return the value at a share of the way, to three digits."""
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return float(f"{value:.3g}")


Space = Mapping[str, Range]


def get_defaults(space: Space) -> dict[str, float]:
    """Return the untuned numbers."""
    return {name: one.default for name, one in space.items()}


def draw_points(space: Space, count: int, seed: int = 0) -> list[dict[str, float]]:
    """``count`` points, quasi-random: the same shares of the ranges for every method.

    A scrambled Sobol sequence fills the ranges more evenly than random draws, and its first points are a
    design of their own, so that more trials can be added later.

    Example:
        >>> [f"{point['lr']:.3g}" for point in draw_points({"lr": Range(0.001, 1, 0.1)}, 2)]
        ['0.0266', '0.0545']
    """
    if len(space) > MOST_TUNED:
        raise BenchError(f"At most {MOST_TUNED} numbers may be tuned, not {', '.join(space)}.")
    if not space:
        return [{}] * min(count, 1)
    engine = torch.quasirandom.SobolEngine(MOST_TUNED, scramble=True, seed=seed)
    shares = engine.draw(count, dtype=torch.float64).tolist()
    return [
        {name: one.at(share) for (name, one), share in zip(space.items(), row, strict=False)}
        for row in shares
    ]
