"""What a rule does to a model, one row a layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Sizes of one layer's problem: ``n`` rows, ``d`` inputs (with bias), ``m`` outputs, ``g`` groups."""

    n: int
    d: int
    m: int
    g: int

    @property
    def plain(self) -> float:
        """Floating-point operations of the layer's forward and backward."""
        return 6.0 * self.g * self.n * self.d * self.m

    @property
    def exact_solve(self) -> float:
        """Operations of a Gram's lower half, its inverse, and the product with it."""
        k = min(self.n, self.d)
        gram = k * k * max(self.n, self.d)
        other = self.m if self.n > self.d else min(self.d, self.m)
        return float(self.g * (gram + k**3 + 2 * k * k * other))


@dataclass(frozen=True)
class LayerRow:
    """One layer's line in an explanation.

    Attributes:
        name: qualified name in the model.
        type: class of the module.
        shape: shape of its weight, e.g. ``"256×784"``.
        handled: whether the rule handles it.
        treatment: what happens to it.
        reason: why.
        memory: extra bytes while its backward runs, or None if not known before the first batch.
        cost: extra floating-point operations over those of its plain step, or None likewise.
        events: what did not go the plain way so far, e.g. ``{"solved in float64": 3}``.
    """

    name: str
    type: str
    shape: str
    handled: bool
    treatment: str
    reason: str
    memory: float | None
    cost: float | None
    events: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """A table of `LayerRow`; ``print`` it."""

    title: str
    rows: list[LayerRow]

    def __str__(self) -> str:
        header = ["layer", "type", "weight", "treatment", "why", "memory", "cost"]
        cells = [
            [r.name or "(model)", r.type, r.shape, r.treatment, why(r), bytes_text(r), cost_text(r)]
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in [header, *cells]
        ]
        handled = sum(r.handled for r in self.rows)
        note = "cost: extra floating-point operations, relative to the layer's forward and backward."
        return "\n".join([f"{self.title}: {handled} of {len(self.rows)} layers handled", *lines, note])


def why(row: LayerRow) -> str:
    """The reason, with what did not go the plain way so far."""
    events = ", ".join(f"{count}× {event}" for event, count in row.events.items())
    return f"{row.reason}; {events}" if events else row.reason


def bytes_text(row: LayerRow) -> str:
    """Extra memory for people."""
    if not row.handled:
        return "0"
    if row.memory is None:
        return "after 1st batch"
    value, units = row.memory, ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}"


def cost_text(row: LayerRow) -> str:
    """Extra arithmetic for people."""
    if not row.handled:
        return "0"
    return "after 1st batch" if row.cost is None else f"+{100 * row.cost:.0f} %"
