"""What a rule's attachment answers in backward when autograd comes to a captured call."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plywise.engine.answers import check_input_gradient, check_update
from plywise.engine.arrivals import Arrivals
from plywise.engine.backward_scale import BackwardScale
from plywise.engine.call import LinearCall, Update
from plywise.engine.capture.calls_below import PassSamples, find_wanting
from plywise.engine.capture.masked_rows import KeptRows, LeftOutRows, UnusedMasks, find_kept
from plywise.engine.contract import RuleContract
from plywise.engine.finite import measure_norms
from plywise.engine.guard import refuse_nonfinite
from plywise.engine.health import Health
from plywise.engine.liveness import Liveness
from plywise.engine.maps.layouts import PLAIN
from plywise.engine.reports.telemetry import Telemetry
from plywise.engine.running_state import RunningState
from plywise.engine.sites import Site

Observer = Callable[[LinearCall, Update, Tensor | None], None]


class RuleResponder:
    """Asks a rule for its two answers to each captured call: the update, and the gradient at the input.

    Args:
        rule: the rule.
        health: where events are counted.
        liveness: counts the answers of a step.
        clips: whether an update is clipped here, since no optimizer's step follows.
        refuses_nonfinite: whether an answer with NaN or infinity raises an error.

    Attributes:
        observers: called with each call and both answers.
        telemetry: follows the layers while training, or None.
        is_pipelined: whether the model runs in a pipeline, which may ask for gradients at inputs apart.
    """

    def __init__(
        self, rule: RuleContract, health: Health, liveness: Liveness, clips: bool, refuses_nonfinite: bool
    ) -> None:
        self.observers: list[Observer] = []
        self.telemetry: Telemetry | None = None
        self.is_pipelined = False
        self._rule = rule
        self._alters = rule.alters_backward
        self._health = health
        self._liveness = liveness
        self._clips = clips
        self._refuses_nonfinite = refuses_nonfinite
        self._samples = PassSamples()
        self._left_out = LeftOutRows(health.note)
        self._unused = UnusedMasks()
        self._state: RunningState | None = None
        self._scale: BackwardScale | None = None

    def connect(self, arrivals: Arrivals, state: RunningState | None, scale: BackwardScale | None) -> None:
        """Set the parts that could be made only after this one.

        Args:
            arrivals: watches gradients arrive.
            state: the rule's running statistics, or None.
            scale: the energies of random backward values, or None.
        """
        self._arrivals, self._state, self._scale = arrivals, state, scale

    def respond(
        self, ctx: Any, a: Tensor, weight: Tensor, delta: Tensor, wants_update: bool, wants_below: bool
    ) -> tuple[Update, Tensor | None]:
        """Return the rule's two answers for a captured call."""
        site: Site = ctx.site
        if self._scale is not None and self._scale.is_probing(ctx):
            return Update(None, None), self._scale.answer_probe(ctx, a, weight, delta)
        call = self._make_call(site, ctx.has_bias, a, delta, weight, ctx.sends_below)
        kept = find_kept(ctx, delta, a) if ctx.masks else None
        if ctx.masks:
            self._unused.check(site.name, ctx.masks, kept is not None, delta)
        counted = call if kept is None else kept.keep(call)
        counted.samples, counted.is_topmost = self._samples.count(ctx, counted.samples)
        call.samples, call.is_topmost = counted.samples, counted.is_topmost
        site.note_call(counted, None if kept is None else (len(kept.places), kept.mask.mask.numel()))
        if site.entry.leave_next or not counted.a.numel() or not counted.delta.numel() or delta.is_meta:
            return self._answer_plainly(ctx, call, wants_update, wants_below)
        if self._scale is not None and (wants_update or find_wanting(ctx, self) is not None):
            counted.energy = self._scale.find(ctx, a, weight, delta)
        update, below = Update(None, None), None
        if wants_update:
            if kept is not None and not self._rule.remembers:
                self._left_out.check(site.name, kept, delta)
            update = self._make_update(site, call if self._rule.remembers else counted, counted)
        if wants_below:
            below = self._make_input_gradient(ctx, call, counted, kept)
        for observer in self.observers:
            observer(counted, update, below)
        if self.telemetry is not None and wants_update:
            self.telemetry.see(site, counted, update)
        return update, below

    def alters_pass(self, node: Any) -> bool:
        """Return whether altered values go down in the running backward, which has come to this node."""
        altered = self._arrivals.altered
        return altered.enter(node) or (self.is_pipelined and altered.enter_apart(node))

    def _make_call(
        self, site: Site, has_bias: bool, a: Tensor, delta: Tensor, weight: Tensor, sends_below: bool
    ) -> LinearCall:
        canonical = weight if site.layout is PLAIN else site.layout.to_canonical(weight)
        if has_bias:
            has_bias = site.takes_bias if self._state is None else self._state.has_bias(site.name)
        map_ = site.map
        if map_.sends_below is not sends_below:  # the site's first call had an input of other strides
            map_ = replace(map_, sends_below=sends_below)  # type: ignore[type-var]
        call = LinearCall(site.name, map_, a, delta, canonical, has_bias, self._health, site.module)
        if self._state is not None:
            like = torch.empty(0, dtype=call.dtype, device=delta.device)
            call.memory, call.waits = self._state.read_state(site.name, like, has_bias)
        return call

    def _answer_plainly(
        self, ctx: Any, call: LinearCall, wants_update: bool, wants_below: bool
    ) -> tuple[Update, Tensor | None]:
        """Return what backpropagation answers: for a call without rows, or one to be left alone."""
        update = call.gradient() if wants_update else Update(None, None)
        if wants_update:
            ctx.site.answer_pass()
        return update, self._send_plain(ctx, call) if wants_below else None

    def _make_update(self, site: Site, call: LinearCall, counted: LinearCall) -> Update:
        """Return the update of a call; ``counted`` is the call without the rows that do not count."""
        if not self._arrivals.sees(site.entry):
            self._arrivals.watch(site.entry)  # it was frozen, or lazy, so far
        if self._state is not None:
            self._state.learn_first(counted)
            if counted is not call:
                call.memory, call.counted = counted.memory, counted
        update = self._rule.update(call)
        check_update(self._rule, call, update)
        counted.answer = update
        if self._clips and update.weight is not None:
            factor = self._rule.clip_update(*measure_norms([call.weight, update.weight]))
            update = update.scaled(factor, factor)
        site.answer_pass()
        counts = self._state is None or self._state.record(counted)
        # what is learned counts when the gradient arrives, if that is seen
        self._liveness.answers += counts or not self._arrivals.sees(site.entry)
        if self._refuses_nonfinite:
            refuse_nonfinite(call, update)
        return update

    def _make_input_gradient(
        self, ctx: Any, call: LinearCall, counted: LinearCall, kept: KeptRows | None
    ) -> Tensor | None:
        if not self._alters or not self.alters_pass(ctx):
            return self._send_plain(ctx, call)
        below = self._rule.input_gradient(counted)
        check_input_gradient(self._rule, counted, below)
        if kept is not None:
            return kept.put(call.input_gradient(), below)
        return below.contiguous()  # as autograd's own is: a pipeline sends it to another process

    def _send_plain(self, ctx: Any, call: LinearCall) -> Tensor | None:
        """Return the plain gradient at a call's input; None where torch has to make it (`RearrangedCall`)."""
        return None if self._alters and hasattr(ctx, "restore") else call.input_gradient()
