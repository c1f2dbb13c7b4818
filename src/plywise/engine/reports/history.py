"""What was measured of a rule's layers, step by step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload

from plywise._util.suggest import suggestion
from plywise._util.tables import format_table, make_table
from plywise.errors import PlywiseError


@dataclass(frozen=True)
class LayerTelemetry:
    """One layer's weight in one step; None where a number is not known.

    Attributes:
        effective_rate: the weight's step over its plain gradient, in norm: the rate at which plain gradient
            descent would take a step of this size.
        update_over_weight: the weight's step over the weight, in norm.
        angle: degrees between what the rule hands to the optimizer and the plain gradient.
        step_angle: degrees between the negative of the weight's step and the plain gradient. The optimizer's
            momentum and preconditioning are part of the step.
        refresh_residual: the error of the last refresh's roots as inverses of the present statistics: 0 is
            exact. For rules with roots of covariances.
        fallbacks: the fallbacks since the last measured step, with counts.
    """

    effective_rate: float | None
    update_over_weight: float | None
    angle: float | None
    step_angle: float | None
    refresh_residual: float | None = None
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    def complete(self, refresh_residual: float | None, fallbacks: Mapping[str, int]) -> LayerTelemetry:
        """Return a copy that has the residual and the fallbacks."""
        return replace(self, refresh_residual=refresh_residual, fallbacks=fallbacks)


NUMBERS = ("effective_rate", "update_over_weight", "angle", "step_angle", "refresh_residual")
"""The numbers of a layer, in the order in which they are shown."""


@dataclass(frozen=True)
class StepTelemetry:
    """What was measured in a step.

    Attributes:
        step: the step's number, from 1.
        layers: by name.
    """

    step: int
    layers: Mapping[str, LayerTelemetry]

    def scalars(self, prefix: str = "plywise/") -> dict[str, float]:
        """Return all known numbers by name, ``"plywise/0/angle"``, in the form that loggers take.

        Args:
            prefix: what each name begins with.
        """
        found: dict[str, float] = {}
        for name, layer in self.layers.items():
            values = {one: getattr(layer, one) for one in NUMBERS}
            values["fallbacks"] = float(sum(layer.fallbacks.values()))
            for one, value in values.items():
                if value is not None and math.isfinite(value):
                    found[f"{prefix}{name}/{one}"] = value
        return found


class History(Sequence[StepTelemetry]):
    """The steps of a rule that were measured, the last ``keep`` of them.

    Args:
        callbacks: called with each step.
        keep: how many steps stay.
        stop: ends the measuring.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[[StepTelemetry], None]] = (),
        keep: int = 1000,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.callbacks = list(callbacks)
        self._steps: deque[StepTelemetry] = deque(maxlen=keep)
        self.stop = stop

    def add(self, step: StepTelemetry) -> None:
        """Keep a step, and call the callbacks with it."""
        self._steps.append(step)
        for callback in self.callbacks:
            callback(step)

    @overload
    def __getitem__(self, index: int) -> StepTelemetry: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepTelemetry]: ...

    def __getitem__(self, index: int | slice) -> StepTelemetry | list[StepTelemetry]:
        return list(self._steps)[index] if isinstance(index, slice) else self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepTelemetry]:
        return iter(self._steps)

    def read(self, layer: str, number: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of one number of one layer, where it is known.

        Args:
            layer: the layer's name.
            number: an attribute of `LayerTelemetry`.

        Raises:
            PlywiseError: there is no such number, or no measured step has such a layer.
        """
        if number not in NUMBERS:
            raise PlywiseError(f"A layer has no number {number!r}; it has: {', '.join(NUMBERS)}.")
        layers = tuple(dict.fromkeys(name for step in self._steps for name in step.layers))
        if layers and layer not in layers:
            raise PlywiseError(
                f"No measured step has a layer {layer!r}. {suggestion(layer, layers)}There are: "
                f"{', '.join(map(repr, layers[:9]))}{' ...' if len(layers) > 9 else '.'}"
            )
        pairs = [
            (step.step, getattr(step.layers[layer], number)) for step in self._steps if layer in step.layers
        ]
        known = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict for each layer in each step: for a table, a file or pandas."""
        return [
            {"step": step.step, "layer": name, **asdict(layer)}
            for step in self._steps
            for name, layer in step.layers.items()
        ]

    def to_dataframe(self) -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            PlywiseError: pandas is not installed.
        """
        from plywise._util.extras import PANDAS, import_extra

        return import_extra("pandas", PANDAS).DataFrame(self.rows())

    def _list_last_rows(self) -> list[list[str]]:
        layers = self._steps[-1].layers if self._steps else {}
        return [
            [name, *(_format(getattr(layer, one)) for one in NUMBERS), _format_events(layer.fallbacks)]
            for name, layer in layers.items()
        ]

    def _list_headings(self) -> list[str]:
        return ["layer", *(name.replace("_", " ") for name in NUMBERS), "fallbacks"]

    def _make_title(self) -> str:
        if not self._steps:
            return "No step has been measured yet."
        return f"Step {self._steps[-1].step}, the last of {len(self._steps)} that were measured"

    def __str__(self) -> str:
        table = format_table(self._list_headings(), self._list_last_rows())
        return f"{self._make_title()}\n{table}" if self._steps else self._make_title()

    def _repr_html_(self) -> str:
        return make_table(self._list_headings(), self._list_last_rows(), title=self._make_title())


def _format(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _format_events(events: Mapping[str, int]) -> str:
    return ", ".join(f"{count}× {event}" for event, count in events.items())
