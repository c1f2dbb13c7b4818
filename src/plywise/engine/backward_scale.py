"""Measures with a random vector, for any network, how large backward values are at each layer.

Back-matching's layer-wise rate divides by ``E``, the mean factor by which the squared size of a random vector
changes on its way down to a layer's output. It is measured by its definition. A random vector of signs goes
backward from the output of each topmost layer through autograd's own graph, and ``E`` is the mean square of
what arrives at a layer's output. So the effect of every operation is measured, and no table of modules is
needed.

A measurement costs about as much as the backward of the activations. It is made in the first pass, and then
again after a fixed number of steps. All backward passes of a step use the same values: those measured in an
earlier step or, if there are none, those measured in the step's first pass. The values are kept only if the
step is taken.
"""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from plywise.engine.capture.calls_below import find_calls
from plywise.engine.capture.masked_rows import find_kept
from plywise.engine.capture.table import ParameterTable
from plywise.engine.kept_scales import KeptScales, Values
from plywise.engine.passes import RecentPasses, find_pass
from plywise.engine.processes.pipelining import refuse_pipeline
from plywise.engine.processes.replicas import find_training_group, refuse_join
from plywise.engine.sharding import is_any_nonzero, is_spread
from plywise.engine.sites import Site
from plywise.errors import AttachError


@dataclass
class Pass:
    """One backward pass.

    Attributes:
        measures: whether it measures.
        sizes: the mean squares that have arrived at the calls of each site, in the order of the answers.
        probing: whether a random vector is running backward.
        calls: how many calls of each site have been answered.
        last: the value given last.
    """

    measures: bool
    sizes: dict[Site, list[Tensor]] = field(default_factory=dict)
    probing: bool = False
    calls: Counter[Site] = field(default_factory=Counter)
    last: float = 1.0


class BackwardScale:
    """Measures ``E`` for the layers of one attachment.

    Args:
        table: the parameters of the model.
        optimizer: keeps the values in its state, so that a resumed run goes on with them. Without it, each
            pass measures, unless it adds to gradients that are there already.
        every: steps from one measurement to the next.
        process_group: the processes that average gradients; by default those of DistributedDataParallel.
    """

    def __init__(
        self,
        table: ParameterTable,
        optimizer: Optimizer | None,
        every: int,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._table = table
        self._every = every
        self._group = process_group
        self._passes = RecentPasses[Pass]()
        self._measured: Pass | None = None  # the pass that measured for the step to come
        table.on_begin.append(self._find_group)
        if optimizer is not None:
            _refuse_sharded(optimizer)
        self._kept = KeptScales(table, optimizer, self._forget)

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the values out of its state."""
        self._forget()
        self._kept.remove()

    def reset(self) -> None:
        """Forget all values: the next pass measures."""
        self._forget()
        self._kept.reset()

    def _forget(self) -> None:
        self._measured = None

    # ---- in backward -----------------------------------------------------------------------------

    def find(self, ctx: Any, a: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """Return ``E`` at a call's output, a scalar on the CPU; if a measurement is due, make it first.

        Args:
            ctx: the call's node, which runs.
            a: its input.
            weight: its weight.
            delta: the gradient at its output.
        """
        task, site = find_pass(), ctx.site
        current = self._passes.get(task) or self._begin_pass(task, site)
        if current.measures:
            current.sizes.setdefault(site, []).append(self._measure(ctx, current, task, a, weight, delta))
        values = self._kept.read(site)
        if not values and self._measured is not None:
            values = _read_sizes({site: self._measured.sizes.get(site, [])})[site]
        if values:
            current.last = values[min(current.calls[site], len(values) - 1)]
        else:  # no measurement has seen this call: for now it gets the value of the call above it
            self._kept.is_missing |= is_trained(site)
        current.calls[site] += 1
        return torch.tensor(current.last, dtype=torch.float64, device="cpu")

    def _begin_pass(self, task: int, site: Site) -> Pass:
        if self._measured is not None and not self._may_have_gradients():
            self._measured = None  # that pass led to no step
        is_missing = self._kept.is_missing or (is_trained(site) and not self._kept.read(site))
        is_due = is_missing or self._kept.step % self._every == 0
        current = Pass(is_due and self._measured is None)  # not again in the next micro-batch
        if current.measures:
            self._measured = current
        self._passes[task] = current
        return current

    def _measure(
        self, ctx: Any, current: Pass, task: int, a: Tensor, weight: Tensor, delta: Tensor
    ) -> Tensor:
        """Return the mean square of what has arrived at a call; 1 for a topmost call."""
        size = torch.ones((), dtype=torch.float64, device=delta.device)
        if getattr(ctx, "probed_in", -1) == task:
            return size * 0 if ctx.probe_size is None else ctx.probe_size
        site = ctx.site
        calls, lowest = find_calls(ctx.next_functions[0][0], site.responder, site.name)
        if calls:
            for node in calls:
                if getattr(node, "probed_in", -1) != task:
                    node.probed_in, node.probe_size = task, None
            probe = make_probe(ctx, delta, self._kept.step * 4096 + sum(current.calls.values()))
            below = self._send_through(ctx, a, weight, probe)
            below = ctx.restore(below) if hasattr(ctx, "restore") else below
            self._send_down(current, GradientEdge(*ctx.next_functions[0]), below, lowest)
        return size

    def _send_down(self, current: Pass, start: GradientEdge, probe: Tensor, lowest: list[Any]) -> None:
        """Send a random vector down to the lowest calls; `answer_probe` measures on the way."""
        targets = [GradientEdge(node, 0) for node in lowest]
        current.probing = True
        try:
            with self._table.keep_whole():
                arrived = torch.autograd.grad([start], targets, [probe], retain_graph=True, allow_unused=True)
        finally:
            current.probing = False
        for node, value in zip(lowest, arrived, strict=True):
            if value is not None:
                _add_size(node, value)

    def is_probing(self, ctx: Any) -> bool:
        """Return whether what has arrived at this call is a random vector, and not a gradient."""
        current = self._passes.get(getattr(ctx, "probed_in", -1))
        return current is not None and current.probing

    def answer_probe(self, ctx: Any, a: Tensor, weight: Tensor, probe: Tensor) -> Tensor:
        """Measure what has arrived at a call, and send it on."""
        _add_size(ctx, probe)
        return self._send_through(ctx, a, weight, probe)

    def _send_through(self, ctx: Any, a: Tensor, weight: Tensor, probe: Tensor) -> Tensor:
        site = ctx.site
        if not ctx.sends_below:
            return probe  # autograd's own graph goes on from it
        canonical = site.layout.to_canonical(weight).to(probe.dtype)
        below: Tensor = site.map.input_gradient(a.to(probe.dtype), probe, canonical)
        return below if ctx.input_dtype is None else below.to(ctx.input_dtype)

    # ---- at the step -----------------------------------------------------------------------------

    def after_step(self, nonzero: Collection[int]) -> None:
        """Use what was measured in a step, once it has been taken.

        Args:
            nonzero: ids of parameters whose gradients are known not to be zero.
        """
        if self._kept.optimizer is None:
            return
        if not self._has_gradients(nonzero):  # a checkpoint's template step, or one of other layers
            self._measured = None
            self._kept.write({}, {})
            return
        sizes = {} if self._measured is None else self._measured.sizes
        measured = _read_sizes(sizes)
        self._measured = None
        is_alone = self._group is None
        if not is_alone and self._kept.step % self._every == 0:
            measured, is_alone = self._average(measured), True
        found = {site: values for site, values in measured.items() if all(map(math.isfinite, values))}
        if measured:
            # zeros may not last: a branch may begin as zero
            has_zeros = any(0.0 in values for values in found.values())
            self._kept.is_missing = len(found) < len(measured) or has_zeros
        self._kept.step += 1
        self._kept.write(found if is_alone else {}, found)

    def _average(self, measured: Values) -> Values:
        """Average the measurements over the processes, which need not have seen the same calls."""
        sites = {
            (entry.name, number): site
            for entry in self._table.entries
            for number, site in enumerate(entry.sites.values())
        }
        places = {site: place for place, site in sites.items()}
        mine = {places[site]: values for site, values in measured.items() if site in places}
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        average: Values = {}
        for place, site in sites.items():
            found = [one[place] for one in everyone if place in one]
            if found:
                average[site] = [sum(numbers) / len(numbers) for numbers in zip(*found, strict=False)]
        return average

    def _may_have_gradients(self) -> bool:
        """Do as `_has_gradients`, without asking other processes: sharded gradients count if they exist."""
        sharded = [e for e in self._table.entries if e.sharding is not None and e.sites and not e.why_left]
        for entry in sharded:
            parameter = entry.parameter()
            assert entry.sharding is not None
            if entry.sharding.is_accumulating or (parameter is not None and parameter.grad is not None):
                return True
        return not sharded and self._has_gradients()

    def _has_gradients(self, nonzero: Collection[int] = ()) -> bool:
        """Return whether a gradient of the rule's parameters is there, and is not zero."""
        handled = [entry for entry in self._table.entries if entry.sites and not entry.why_left]
        parameters = [entry.parameter() for entry in handled]
        held = [p for p in parameters if p is not None and p.grad is not None]
        if any(id(p) in nonzero for p in held) and not any(map(is_spread, held)):
            return True
        gradients = [p.grad for p in held if p.grad is not None]
        return is_any_nonzero(sorted(gradients, key=Tensor.numel))  # a small one answers soonest

    def _find_group(self) -> None:
        """Find the processes that share the values: those of a DistributedDataParallel that runs now."""
        if dist.is_available() and dist.is_initialized():
            refuse_join("Back-matching's rate")
            refuse_pipeline("Back-matching's rate")
            if self._group is None:
                self._group = find_training_group(self._table.entries)


def _refuse_sharded(optimizer: Optimizer) -> None:
    """Raise an error for an optimizer that saves only what its inner optimizer knows of each parameter."""
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise AttachError(
            "Back-matching's rate keeps measured values in the optimizer's state, and "
            "ZeroRedundancyOptimizer does not save them, so that a resumed run would be another one. Use the "
            "optimizer inside it without shards, or fully_shard.",
            see="attach-optimizer",
        )


def is_trained(site: Site) -> bool:
    """Return whether a site's weight trains. Otherwise it has no state, and a resumed run lacks its value."""
    weight = site.weight
    return weight is not None and weight.requires_grad


def make_signs(like: Tensor, seed: int) -> Tensor:
    """Make a random vector of 1 and -1: among vectors of unit variance, its measurements vary least."""
    generator = torch.Generator(like.device).manual_seed(seed)
    bits = torch.randint(2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def make_probe(node: Any, delta: Tensor, seed: int) -> Tensor:
    """Return a random vector of 1 and -1 in the rows of a call that count (`plywise.rows`)."""
    kept = find_kept(node, delta) if node.masks else None
    if kept is None:
        return make_signs(delta, seed)
    return kept.put(torch.zeros_like(delta), make_signs(kept.take(delta), seed))


def _add_size(node: Any, value: Tensor) -> None:
    """Add the mean square of what has arrived at a call: one vector comes from each topmost call above it."""
    kept = find_kept(node, value) if node.masks else None
    if kept is not None:
        value = kept.take(value)
    if value.numel():
        norm = torch.linalg.vector_norm(value.detach(), dtype=torch.float64)
        size = norm.square() / value.numel()
        node.probe_size = size if node.probe_size is None else node.probe_size + size


def _read_sizes(sizes: dict[Site, list[Tensor]]) -> Values:
    """Read sizes as numbers, all at once; if one is infinite, return NaN, with which no step is taken."""
    flat = [size for calls in sizes.values() for size in calls]
    device = flat[0].device if flat else None
    numbers = iter(torch.stack([size.to(device) for size in flat]).tolist() if flat else [])
    return {
        site: [value if math.isfinite(value) else math.nan for value in islice(numbers, len(calls))]
        for site, calls in sizes.items()
    }
