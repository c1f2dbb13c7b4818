"""Processes of a data-parallel run agree on the layers that all of them know.

A layer is found when it is called, and an expert may be called on one process only. Processes that add up
their evidence need the same layers in the same order; otherwise their collectives hang or mix up layers. So
each weight is *settled* once: at a step, one small collective compares what the processes know of the weights
that are not settled yet. Once all weights are settled, there is no such collective any more.
"""

import zlib
from collections.abc import Iterable, Mapping

import torch

from plywise.engine.processes.replicas import Replicas
from plywise.engine.sites import ParameterEntry, format_part
from plywise.engine.statistics.layer_handle import LayerHandle

LEFT = -1
"""Stands for a weight that this process leaves to the optimizer."""


class Agreement:
    """What the processes of one group have settled so far."""

    def __init__(self) -> None:
        self._settled: dict[ParameterEntry, bool] = {}

    def has_settled(self, entry: ParameterEntry) -> bool:
        """Return whether all processes learn a weight's layers together."""
        return self._settled.get(entry, False)

    def settle(
        self, replicas: Replicas, layers: Iterable[LayerHandle], entries: Iterable[ParameterEntry]
    ) -> set[ParameterEntry]:
        """Return the weights whose layers every process knows; the result is the same on all of them.

        Args:
            replicas: the processes.
            layers: what this process knows.
            entries: the weights that may take part, the same on all processes and in the same order.
        """
        known: dict[ParameterEntry, list[LayerHandle]] = {}
        for layer in layers:
            known.setdefault(layer.entry, []).append(layer)
        entries = list(entries)
        open_ones = [entry for entry in entries if entry not in self._settled]
        if open_ones:
            self._compare(replicas, open_ones, known)
        return {entry for entry in entries if self._settled.get(entry)}

    def _compare(
        self,
        replicas: Replicas,
        entries: list[ParameterEntry],
        known: Mapping[ParameterEntry, list[LayerHandle]],
    ) -> None:
        marks = [_make_mark(entry, known.get(entry, [])) for entry in entries]
        seen = [int(any(layer.site is not None for layer in known.get(entry, []))) for entry in entries]
        device = next((p.device for entry in entries if (p := entry.parameter()) is not None), None)
        lowest, highest = replicas.find_range([*marks, *seen], device or torch.device("cpu"))
        for place, entry in enumerate(entries):
            if lowest[place] == LEFT:
                self._settled[entry] = False
            elif lowest[place] == highest[place] > 0 and highest[len(entries) + place]:
                self._settled[entry] = True


def _make_mark(entry: ParameterEntry, layers: list[LayerHandle]) -> int:
    """Return a hash of what is known of a weight's calls; 0 if nothing is known."""
    if entry.left or entry.leave_next:
        return LEFT
    texts = []
    for layer in layers:
        part = None if layer.site is None else layer.site.part
        text = "" if part is None else format_part(part, layer.weight)
        shape = layer.shape
        texts.append(f"{text} {layer.layout.name} {shape.groups} {shape.outputs} {shape.columns}")
    return zlib.crc32("; ".join(sorted(texts)).encode()) + 1 if texts else 0
