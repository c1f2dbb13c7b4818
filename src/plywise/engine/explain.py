"""What a rule does to a model: the share of its parameters first, then one row for each map."""

import math
from dataclasses import dataclass

from plywise._util.tables import format_table, make_table

HEADINGS = ("layer", "type", "weight", "treatment", "why", "seen", "memory", "cost")
NOTE = "cost: extra floating-point operations, relative to the layer's forward and backward."
LONGEST_REASON = 40
"""Longer reasons stand below the table, each once, so that its lines stay short."""
HALF = 0.5
"""Below this share of handled parameters an explanation warns."""

NOT_ASKED_FOR, EXCLUDED = "not among the layers asked for", "excluded"
BY_NAME = (NOT_ASKED_FOR, EXCLUDED)
"""The reasons given for layers that ``attach(layers=..., exclude=...)`` leaves out."""


@dataclass(frozen=True)
class Size:
    """Sizes of one layer's problem: ``n`` rows, ``d`` inputs (with bias), ``m`` outputs, ``g`` groups.

    ``is_topmost`` says whether the last backward pass began at this layer.
    """

    n: int
    d: int
    m: int
    g: int
    is_topmost: bool = False

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
    """One map's line in an explanation, or that of parameters that are left to the optimizer.

    Attributes:
        name: qualified name of the layer, or of the parameter.
        type: class of the module.
        shape: shape of its weight, e.g. ``"256×784"``.
        handled: whether the rule handles it.
        treatment: what happens to it.
        reason: why.
        memory: extra bytes while its backward runs; None if not known before the first batch, NaN if the rule
            does not say.
        cost: extra floating-point operations over those of its plain step, or None likewise.
        events: counts of fallbacks so far, e.g. ``{"solved in float64": 3}``.
        parameters: number of parameters in this row that train.
        passes: backward passes in which the rule has answered for it.
        is_new: whether it was found after the rule was attached.
        keys: the `state_dict` keys of the parameters in this row; a parameter is in one row only.
        size: sizes of its problem; None if they are not known before the first batch.
        frozen: number of parameters in this row that do not train.
    """

    name: str
    type: str
    shape: str
    handled: bool
    treatment: str
    reason: str
    events: dict[str, int]
    memory: float | None = None
    cost: float | None = None
    parameters: int = 0
    passes: int = 0
    is_new: bool = False
    keys: tuple[str, ...] = ()
    size: Size | None = None
    frozen: int = 0


@dataclass(frozen=True)
class Explanation:
    """A table of `LayerRow`; ``print`` it.

    Attributes:
        title: the rule and the model.
        rows: one for each map or group of parameters.
        steps: optimizer steps that the rule has seen; None without an optimizer.
    """

    title: str
    rows: list[LayerRow]
    steps: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters of the model that train."""
        return sum(row.parameters for row in self.rows)

    @property
    def frozen(self) -> int:
        """Number of parameters of the model that do not train."""
        return sum(row.frozen for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the parameters that train which the rule handles, 0 to 1."""
        handled = sum(row.parameters for row in self.rows if row.handled)
        return handled / self.parameters if self.parameters else 0.0

    def _format_cells(self) -> list[list[str]]:
        return [
            [
                row.name or "(model)",
                row.type,
                row.shape,
                row.treatment,
                format_reason(row),
                format_passes(row),
                format_bytes(row),
                format_cost(row),
            ]
            for row in self.rows
        ]

    def __str__(self) -> str:
        return self.format()

    def format(self, *, warns: bool = True) -> str:
        """Return the table as text; with ``warns``, also a warning where most parameters are left alone."""
        cells, why = self._format_cells(), HEADINGS.index("why")
        long = [cell[why] for cell in cells if len(cell[why]) > LONGEST_REASON]
        numbers = {reason: number for number, reason in enumerate(dict.fromkeys(long), 1)}
        for cell in cells:
            if cell[why] in numbers:
                cell[why] = f"note {numbers[cell[why]]}"
        notes = [f"note {number}: {reason}" for reason, number in numbers.items()]
        return "\n".join([*self.summary(warns=warns), format_table(HEADINGS, cells), *notes, NOTE])

    def _repr_html_(self) -> str:
        title, *others = self.summary()
        return make_table(HEADINGS, self._format_cells(), title=title, notes=[*others, NOTE])

    def summary(self, *, warns: bool = True) -> list[str]:
        """Return the sentences above the table."""
        handled = sum(row.handled for row in self.rows)
        layers = sum(row.parameters > 0 or not row.frozen for row in self.rows)
        trained = " that train" if self.frozen else ""
        frozen = f", {self.frozen:,} parameters frozen" if self.frozen else ""
        steps = "" if self.steps is None else f", {self.steps} step{'s' * (self.steps != 1)} seen"
        lines = [
            f"{100 * self.share:.0f} % of {self.parameters:,} parameters{trained} handled, "
            f"{handled} of {layers} layers{frozen}{steps}",
            self.title,
        ]
        if warns and self.parameters and self.share < HALF:
            largest = max((row for row in self.rows if not row.handled), key=lambda row: row.parameters)
            lines.append(
                f"Warning: more than half of the parameters are left to the optimizer, most of them in "
                f"{largest.name or '(model)'!r} ({largest.type}): {largest.reason}."
            )
        return lines


def format_reason(row: LayerRow) -> str:
    """Return the reason, whether the row is new, and the fallbacks so far."""
    events = ", ".join(f"{count}× {event}" for event, count in row.events.items())
    reason = f"{row.reason}; new since attach" if row.is_new else row.reason
    return f"{reason}; {events}" if events else reason


def format_passes(row: LayerRow) -> str:
    """Return the number of backward passes in which the rule has answered."""
    return f"{row.passes}×" if row.handled else ""


def format_bytes(row: LayerRow) -> str:
    """Format the extra memory for readers."""
    if not row.handled:
        return "0"
    if row.memory is None:
        return "after 1st batch"
    if math.isnan(row.memory):
        return "unknown"
    value, units = row.memory, ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}"


def format_cost(row: LayerRow) -> str:
    """Format the extra arithmetic for readers."""
    if not row.handled:
        return "0"
    if row.cost is None:
        return "after 1st batch"
    return "unknown" if math.isnan(row.cost) else f"+{100 * row.cost:.0f} %"


class Explanations(list[Explanation]):
    """Several tables, such as one for each component of a learner; ``print`` them."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self)
