"""Counters of exceptional events: fallbacks of solvers, skipped steps."""

from collections import Counter
from dataclasses import dataclass, field

from plywise._util.tables import make_table
from plywise.numerics.events import EIGENVALUES, FLOAT64, IDENTITY, NON_FINITE, ROUNDING

__all__ = [
    "BUFFERS",
    "EIGENVALUES",
    "FLOAT64",
    "IDENTITY",
    "NON_FINITE",
    "OUTSIDE",
    "ROUNDING",
    "SKIPPED",
    "UNCLEARED",
    "UNUSED",
    "Health",
]

SKIPPED = "step skipped"
BUFFERS = "buffer is not finite"
ALL_WELL = "Everything went the plain way."
UNUSED = "the rule took no part in a step"
UNCLEARED = "gradients were not cleared before a step"
OUTSIDE = "a part of the gradient came from outside of the model's forward"


@dataclass
class Health:
    """What happened, where, and how often.

    Attributes:
        counts: number of times for each (layer or parameter name, event).
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, name: str, event: str) -> None:
        """Count one ``event`` of ``name``."""
        self.counts[name, event] += 1

    def total(self, event: str) -> int:
        """Return how often ``event`` happened, over all names."""
        return sum(count for (_, what), count in self.counts.items() if what == event)

    def __str__(self) -> str:
        lines = [f"{count}× {event}: {name}" for (name, event), count in self.counts.most_common()]
        return "\n".join(lines) or ALL_WELL

    def _repr_html_(self) -> str:
        rows = [[name, event, str(count)] for (name, event), count in self.counts.most_common()]
        return make_table(("where", "what", "times"), rows) if rows else f"<p>{ALL_WELL}</p>"

    def of(self, name: str) -> dict[str, int]:
        """Return the events of one layer or parameter."""
        return {event: count for (who, event), count in self.counts.items() if who == name}
