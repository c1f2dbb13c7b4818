"""Learns from evidence and refreshes what was learned, for all layers, and decides in which steps.

All layers gather in the same steps, so that all other steps are plain. Expensive refreshes are spread over a
cycle: layers take turns (`plywise.engine.statistics.refresh_cycle`), and processes share out the work.
"""

import math
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from plywise.engine.answers import check_tensors
from plywise.engine.contract import ROUNDING_ERROR, Evidence, LayerShape, Shapes, State, StatefulContract
from plywise.engine.finite import find_finite, read_norms
from plywise.engine.health import NON_FINITE, ROUNDING, Health
from plywise.engine.processes.replicas import Job, Replicas
from plywise.engine.statistics.early_layers import GRADIENT
from plywise.engine.statistics.gathered import Pending
from plywise.engine.statistics.known_layers import KnownLayers
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.refresh_cycle import choose_phases, count_intervals
from plywise.engine.statistics.saved_state import LayerState, SavedState
from plywise.engine.statistics.stacks import convert_state

ALLOWED_ROUNDING = 1e-4
"""Updates with a larger relative error are counted."""


class Learning:
    """Turns the evidence of a step into states.

    Args:
        rule: the rule.
        saved: the states.
        known: the layers.
        health: where evidence that is not finite is counted.
    """

    def __init__(self, rule: StatefulContract, saved: SavedState, known: KnownLayers, health: Health) -> None:
        self._rule = rule
        self._saved = saved
        self._known = known
        self._health = health

    # ---- when ------------------------------------------------------------------------------------

    @property
    def gathers(self) -> bool:
        """Whether this step gathers evidence."""
        return self._saved.step % self._stats_every == 0

    @property
    def turn(self) -> int:
        """The number of a gathering: gatherings that follow one another differ by 1, until intervals grow."""
        return self._saved.step // self._stats_every

    @property
    def _stats_every(self) -> int:
        return self._rule.stats_every * self._count_intervals()

    def _count_intervals(self) -> int:
        return count_intervals(self._saved.step, self._rule.refresh_every, self._rule.slowdown)

    def refreshes(self, name: str) -> bool:
        """Return whether a layer's turn is in this step.

        In the first cycle every gathering refreshes: roots of a single batch should not last for long.
        """
        return self.is_due(self._saved.peek(name))

    def is_due(self, state: LayerState) -> bool:
        """Return whether it is the turn of a layer with this state."""
        if not state.tensors:
            return True
        step, every = self._saved.step, self._rule.refresh_every * self._count_intervals()
        if self._rule.refreshes_together:
            return step % every == 0
        if step < self._rule.refresh_every:
            return self.gathers
        return (step - state.phase) % every == 0

    def measures(self, layer: LayerHandle) -> bool:
        """Return whether the step measures the factor of a layer's updates until its next refresh."""
        return layer.acts_alone and self._rule.keeps_norm and self.refreshes(layer.name)

    def choose_phases(self, new: Collection[str]) -> dict[str, int]:
        """Return the steps of a cycle in which layers that have just begun to learn take their turns."""
        if not new:
            return {}
        layers = [layer for layer in self._known.list_in_order() if not layer.gone]
        costs = {layer.name: self._rule.refresh_cost(layer.shape) for layer in layers}
        states = {name: self._saved.read(name) for name in costs}
        others = {name: (state.phase, costs[name]) for name, state in states.items() if state.tensors}
        wanted = {name: cost for name, cost in costs.items() if name in new}
        return choose_phases(wanted, others, self._rule.refresh_every)

    # ---- what ------------------------------------------------------------------------------------

    def learn(
        self,
        layers: Mapping[str, LayerHandle],
        pending: Mapping[str, Pending],
        memories: dict[str, State],
        replicas: Replicas,
    ) -> tuple[list[str], dict[str, Tensor]]:
        """Learn the evidence of this step, of all processes.

        Returns:
            The layers that learned something, and gradients for `measure_scale`.
        """
        parts: dict[str, Evidence] = {}
        for name in layers if self.gathers else [name for name in layers if not memories[name]]:
            own = pending.get(name)
            if own is not None and own.evidence:
                parts[name] = own.evidence
            elif replicas.size > 1:
                shape = layers[name].shape
                parts[name] = _make_zeros(self._rule.evidence_shapes(shape), shape)
                if self.measures(layers[name]):
                    sizes = shape.groups, shape.outputs, shape.columns
                    parts[name] |= _make_zeros({GRADIENT: sizes}, shape)
        news: dict[str, State] = {}
        gradients: dict[str, Tensor] = {}
        roundings: dict[str, Tensor] = {}
        for name, evidence in _find_nonempty(replicas.add_up(parts)):
            memory, evidence = convert_state(memories[name], evidence["rows"]), dict(evidence)
            if GRADIENT in evidence:
                gradients[name] = evidence.pop(GRADIENT)
            learned = dict(self._rule.learn(memory, evidence))
            if ROUNDING_ERROR in learned:
                roundings[name] = learned.pop(ROUNDING_ERROR)
            if not memory:
                wanted = self._rule.learned_shapes(layers[name].shape)
                check_tensors(self._rule, "learn", name, learned, wanted)
            news[name] = {**memory, **learned}
        return self._keep_finite(news, memories, roundings), gradients

    def _keep_finite(
        self, news: dict[str, State], memories: dict[str, State], roundings: dict[str, Tensor]
    ) -> list[str]:
        """Keep what has been learned if it is finite; return the layers that have learned something.

        The errors of updates are read with it, at once, and large ones are counted.
        """
        values = [value for new in news.values() for value in new.values()]
        norms = read_norms([*values, *roundings.values()])
        for name, error in zip(roundings, norms[len(values) :], strict=True):
            if ALLOWED_ROUNDING < error < math.inf:  # a larger one is of numbers that are not finite
                self._health.note(name, ROUNDING)
        flags = iter(find_finite(values, norms[: len(values)]))
        learned = []
        for name, new in news.items():
            are_finite = [next(flags) for _ in new]  # of all its tensors: the next layer's come after them
            if all(are_finite):
                memories[name] = new
                learned.append(name)
            else:
                self._health.note(name, NON_FINITE)
        return learned

    def refresh(self, names: Collection[str], memories: dict[str, State], replicas: Replicas) -> None:
        """Refresh these layers' states, the work shared out over the processes."""
        jobs = {}
        for name in names:
            shape = self._known.by_name[name].shape
            jobs[name] = Job(
                self._rule.refresh_cost(shape),
                partial(_make_zeros, self._rule.refreshed_shapes(shape), shape),
                partial(self._rule.refresh, memories[name], name, self._health),
            )
        for name, news in replicas.share_out(jobs).items():
            memories[name] = {**memories[name], **news}


def _find_nonempty(totals: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, Mapping[str, Tensor]]]:
    """Return the evidence of some rows at least."""
    if not totals:
        return []
    device = next(iter(totals.values()))["rows"].device
    rows = torch.stack([evidence["rows"].double().to(device) for evidence in totals.values()]).tolist()
    return [item for item, count in zip(totals.items(), rows, strict=True) if count > 0]


def _make_zeros(shapes: Shapes, layer: LayerShape) -> dict[str, Tensor]:
    return {key: torch.zeros(shape, dtype=layer.dtype, device=layer.device) for key, shape in shapes.items()}
