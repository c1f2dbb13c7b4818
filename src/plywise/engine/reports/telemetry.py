"""Measures in some steps what a rule does to each layer, and gives it to callbacks.

In a measured step, the plain gradients and the old weights are kept beside the updates. Their norms and
products are read at the end, with one wait for the device. All other steps do nothing, and neither does a
rule without a recorder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from plywise.engine.call import LinearCall, Update
from plywise.engine.contract import RuleContract, State, StatefulContract
from plywise.engine.finite import measure_norms
from plywise.engine.health import Health
from plywise.engine.maps.layouts import PLAIN
from plywise.engine.reports.history import LayerTelemetry, StepTelemetry
from plywise.engine.sites import ParameterEntry, Site

Callback = Callable[[StepTelemetry], None]


class Telemetry:
    """Measures the layers of one attachment.

    Args:
        rule: the rule.
        health: its counters.
        every: steps from one that is measured to the next.
        callback: gets what was measured.
        read_states: the layers' running states by name.
    """

    def __init__(
        self,
        rule: RuleContract,
        health: Health,
        every: int,
        callback: Callback,
        read_states: Callable[[], Mapping[str, State]],
    ) -> None:
        self._rule, self._health, self._every, self._callback = rule, health, every, callback
        self._read_states = read_states
        self._is_due = True
        self._known_events = Counter(health.counts)
        self._plain: dict[int, Tensor | None] = {}  # gradients in whose place backward put updates
        self._step: _MeasuredStep | None = None

    def see(self, site: Site, call: LinearCall, update: Update) -> None:
        """Note that backward has made a call's update."""
        parameter = site.weight
        if not self._is_due or call.waits or parameter is None or update.weight is None:
            return
        if site.part is not None or site.computed:
            self._plain[id(parameter)] = None  # the gradient of a part, or of what is computed from it
            return
        gradient = call.weight_gradient(call.delta)
        if site.layout is not PLAIN or gradient.dim() != parameter.dim():
            gradient = site.layout.from_canonical(gradient, parameter.shape)
        before = None if parameter.grad is None else self._plain.get(id(parameter))
        self._plain[id(parameter)] = gradient if before is None else before + gradient

    def begin_step(self, entries: Iterable[ParameterEntry]) -> None:
        """Begin a step of the optimizer; the updates that the step makes are not made yet."""
        if self._is_due:
            self._step = _MeasuredStep(entries, self._plain)

    def note_updates(self) -> None:
        """Note the updates: all are made, and the optimizer moves the weights next."""
        if self._step is not None:
            self._step.note_updates()

    def drop_step(self) -> None:
        """Forget the measurements of a step that was not taken."""
        self._step = None
        self._plain.clear()

    def end_step(self, step: int) -> None:
        """End a step: the optimizer has moved the weights in its step number ``step``."""
        measured, self._step = self._step, None
        self._plain.clear()
        self._is_due = step % self._every == 0
        if measured is not None and measured.entries:
            layers = measured.read(self._rule)
            if layers:
                self._callback(StepTelemetry(step, self._complete(measured.entries, layers)))

    def _complete(
        self, entries: list[ParameterEntry], layers: dict[str, LayerTelemetry]
    ) -> dict[str, LayerTelemetry]:
        """Return the layers with residuals and fallbacks."""
        events = Counter(self._health.counts)
        new, self._known_events = events - self._known_events, events
        residuals = self._measure_residuals()
        found = {}
        for entry in entries:
            name = find_name(entry)
            names = {entry.name, entry.layer, *(site.name for site in entry.sites.values())}
            own = Counter({event: n for (who, event), n in new.items() if who in names})
            of_sites = [residuals[one] for one in names if one in residuals]
            found[name] = layers[name].complete(max(of_sites, default=None), dict(own))
        return found

    def _measure_residuals(self) -> dict[str, float]:
        rule = self._rule
        if not isinstance(rule, StatefulContract):
            return {}
        states = self._read_states()
        found = {name: rule.measure_residual(state) for name, state in states.items() if state}
        known = {name: value for name, value in found.items() if value is not None}
        values = list(known.values())
        numbers = _stack(values, values[0]).tolist() if values else []  # one wait for the device
        return {name: one for name, one in zip(known, numbers, strict=True) if math.isfinite(one)}


class _MeasuredStep:
    """A step while it is measured, with the old weights and the plain gradients."""

    def __init__(self, entries: Iterable[ParameterEntry], plain: Mapping[int, Tensor | None]) -> None:
        self.entries = [entry for entry in entries if _is_measurable(entry)]
        self._parameters = [entry.parameter() for entry in self.entries]
        self._weights = [p.detach().clone() for p in self._parameters if p is not None]
        self._gradients = [
            plain[id(p)] if id(p) in plain else p.grad.clone()
            for p in self._parameters
            if p is not None and p.grad is not None
        ]
        self._angles: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def note_updates(self) -> None:
        updates = [p.grad for p in self._parameters if p is not None and p.grad is not None]
        if len(updates) != len(self.entries):  # a closure has dropped them
            self.entries = []
            return
        self._angles = [_compute_cosine(g, d) for g, d in zip(self._gradients, updates, strict=True)]
        self._sizes = [_compute_norm(g) for g in self._gradients]

    def read(self, rule: RuleContract) -> dict[str, LayerTelemetry]:
        """Read the numbers of each layer, with one wait for the device; none if no layer had a gradient."""
        now = [p.detach() for p in self._parameters if p is not None]
        steps = [before - after for before, after in zip(self._weights, now, strict=True)]
        cosines = [_compute_cosine(g, step) for g, step in zip(self._gradients, steps, strict=True)]
        weights, moved = measure_norms(self._weights), measure_norms(steps)
        like = weights
        columns = [weights, moved, *(_stack(c, like) for c in (self._sizes, self._angles, cosines))]
        rows = torch.stack([column.to(like.dtype) for column in columns], 1).tolist()
        if not any(row[2] for row in rows):
            return {}
        turns = isinstance(rule, StatefulContract) and rule.turns_steps
        return {
            find_name(entry): LayerTelemetry(
                effective_rate=_divide(moved, gradient),
                update_over_weight=_divide(moved, weight),
                angle=None if turns else _compute_angle(update_cosine),
                step_angle=_compute_angle(step_cosine),
            )
            for entry, (weight, moved, gradient, update_cosine, step_cosine) in zip(
                self.entries, rows, strict=True
            )
        }


def find_name(entry: ParameterEntry) -> str:
    """Return the name of a layer here: its parameter's key, without ``.weight``."""
    return entry.name.removesuffix(".weight")


def _is_measurable(entry: ParameterEntry) -> bool:
    parameter = entry.parameter()
    if parameter is None or entry.why_left or entry.leave_next or not entry.sites or entry.sharding:
        return False
    gradient = parameter.grad
    return gradient is not None and gradient.layout is torch.strided and not gradient.is_complex()


def _compute_norm(tensor: Tensor | None) -> Tensor:
    return (
        torch.tensor(math.nan, device="cpu") if tensor is None else torch.linalg.vector_norm(_widen(tensor))
    )


def _compute_cosine(one: Tensor | None, other: Tensor) -> Tensor:
    """Return the cosine of the angle between two tensors; NaN where one is unknown or zero."""
    if one is None:
        return torch.tensor(math.nan, device="cpu")
    a, b = _widen(one).flatten(), _widen(other).flatten()
    return torch.dot(a, b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([value.to(like.device, like.dtype, non_blocking=True) for value in values])


def _divide(one: float, other: float) -> float | None:
    return one / other if other and math.isfinite(other) else None


def _compute_angle(cosine: float) -> float | None:
    return None if math.isnan(cosine) else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
