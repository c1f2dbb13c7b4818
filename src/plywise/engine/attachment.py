"""A rule at work on a model: hooks, counters, and the answers given in backward."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from plywise.engine.answers import check_input_gradient, check_update
from plywise.engine.arrivals import Arrivals
from plywise.engine.backward_scale import BackwardScale
from plywise.engine.call import LinearCall, Update
from plywise.engine.calls_below import PassSamples, find_wanting
from plywise.engine.capture import Capture
from plywise.engine.clipping import Clipping
from plywise.engine.contract import RuleContract, State, StatefulContract
from plywise.engine.explain import Explanation
from plywise.engine.finite import measure_norms
from plywise.engine.followed_parameters import refuse_old_optimizer
from plywise.engine.guard import StepGuard, refuse_nonfinite
from plywise.engine.health import Health
from plywise.engine.layouts import PLAIN
from plywise.engine.liveness import Liveness
from plywise.engine.masked_rows import KeptRows, LeftOutRows, find_kept
from plywise.engine.pipelining import runs_in_pipeline
from plywise.engine.readers import make_readers
from plywise.engine.registered import install_registered
from plywise.engine.rows import make_rows
from plywise.engine.running_state import RunningState
from plywise.engine.selection import (
    Selector,
    collect_parameters,
    is_empty,
    refuse_handled,
    refuse_nothing,
)
from plywise.engine.sites import ParameterEntry, Site
from plywise.engine.table import ParameterTable
from plywise.engine.telemetry import Telemetry
from plywise.errors import AttachError

Observer = Callable[[LinearCall, Update, Tensor | None], None]


class Attachment:
    """A rule at work on a model: its hooks, its counters, and the answers given in backward.

    The model's hooks own it; it knows the model weakly, so nothing keeps the model alive.

    Args:
        rule: the rule.
        model: the model.
        kinds: the kinds of maps that the rule takes.
        layers: the rule may take only these; None for all.
        exclude: leave these to the optimizer.
        optimizer: the optimizer, if there is one.
        on_nonfinite: ``"skip"``, ``"raise"`` or ``"propagate"``.
        process_group: the processes that average gradients, if the user names them.

    Raises:
        AttachError: there is nothing for the rule to take.
    """

    def __init__(
        self,
        rule: RuleContract,
        model: nn.Module,
        kinds: frozenset[str],
        layers: Selector | None,
        exclude: Selector | None,
        optimizer: Optimizer | None,
        on_nonfinite: str,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.rule = rule
        self.health = Health()
        self.observers: list[Observer] = []
        self.telemetry: Telemetry | None = None
        self.title = f"{rule} on {type(model).__name__}"
        self.kinds = kinds
        self.steps = 0 if optimizer is not None else None  # those in which the rule took part
        self._optimizer_steps = 0
        self._model = weakref.ref(model)
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._raises = on_nonfinite == "raise"
        self._clips_in_backward = rule.clips_updates() and optimizer is None
        self._clipping: Clipping | None = None
        self._alters = rule.alters_backward
        self._samples = PassSamples()
        self._is_pipelined = False
        self._liveness = Liveness(self.title, self.health)
        self._left_out = LeftOutRows(self.health.note)
        self._handles: list[RemovableHandle] = []
        self._guard: StepGuard | None = None
        self._state: RunningState | None = None
        self._scale: BackwardScale | None = None
        self._names: dict[int, str] = {}
        self._find_layers(model, layers, exclude)
        try:
            self._install(model, optimizer, on_nonfinite, process_group)
        except BaseException:
            self.remove()
            raise

    def _find_layers(self, model: nn.Module, layers: Selector | None, exclude: Selector | None) -> None:
        """Find the parameters that the rule takes; make what sees their calls and their gradients."""
        self.table = self._make_table(model, layers, exclude)
        self._mark_unstepped()
        self.capture = Capture(make_readers(self.kinds), self.table, self.takes, self._alters)
        counts = self._count_evidence if self.rule.remembers else None
        self.arrivals = Arrivals(self.rule, self.table, self.capture, self, self._note_answer, counts)
        if not is_empty(layers):
            refuse_nothing(self.table.entries, type(self.rule).__name__, model, self.kinds)
        refuse_handled(self.table.entries)

    def _make_table(
        self, model: nn.Module, layers: Selector | None, exclude: Selector | None
    ) -> ParameterTable:
        unshared = self.rule.takes_unshared_only
        table = ParameterTable(
            model,
            lambda network: collect_parameters(network, self.kinds, layers, exclude, unshared),
            self.kinds,
            computed_too=not unshared,
            computed_biases=not self.rule.remembers,
            # a frozen layer passes altered values down, and random vectors begin at it or pass through it
            frozen_too=self._alters or self.rule.needs_backward_scale,
            add_site=self._add_site,
            responder=self,
        )
        table.on_refresh = self._mark_unstepped
        return table

    def _install(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        on_nonfinite: str,
        process_group: ProcessGroup | None,
    ) -> None:
        if self.rule.remembers:
            assert optimizer is not None
            self._keep_state(optimizer, process_group)
        self.table.on_replaced = self._follow_parameters
        if self.rule.needs_backward_scale:
            self._scale = BackwardScale(self.table, optimizer, self.rule.measure_every, process_group)
        if self._alters:
            self.table.on_begin.append(self._note_pipeline)
        if self.rule.clips_updates() and optimizer is not None:
            self._clipping = Clipping(self.rule.clip_update, lambda: self.table.entries, process_group)
            self.table.on_begin.append(self._clipping.find_group)
        if any(entry.is_candidate for entry in self.table.entries):
            owners = [m for m in model.modules() if any(True for _ in m.parameters())]
            self.capture.install(owners)
        self._handles += install_registered(model, self.capture)
        self.arrivals.watch_expected(self.table.entries)
        self._hook_modules(model)
        if optimizer is not None:
            self._names.update({id(e.parameter()): e.name for e in self.table.entries})
            self._guard = StepGuard(
                optimizer,
                self._names,
                self.health,
                on_nonfinite,
                before_step=self._before_step,
                skipped=self._skip_step,
                after_step=self._after_step,
            )

    def _keep_state(self, optimizer: Optimizer, process_group: ProcessGroup | None) -> None:
        """Keep running statistics in the optimizer's state."""
        self._state = RunningState(
            cast(StatefulContract, self.rule),
            self.table.entries,
            optimizer,
            process_group,
            self.health,
            leave=self.table.leave,
            # an observer may want each call, and "raise" the error of a bad one
            observers=None if self._raises else self.observers,
        )
        self.table.on_begin.append(self._state.processes.find)
        self.capture.resting = weakref.ref(self._state.resting)

    def _hook_modules(self, model: nn.Module) -> None:
        """Put the rule's own hook on the modules that it is for."""
        hook: Any = self.rule.module_hook()
        if hook is None:
            return
        hook.alters = self._alters_pass
        for module in model.modules():
            if isinstance(module, hook.types):
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def takes(self, parameter: Tensor | None) -> bool:
        """Return whether the rule may take this parameter."""
        return any(e.parameter() is parameter and not e.why_left for e in self.table.entries)

    def _add_site(self, site: Site) -> None:
        if self._state is not None:
            self._state.add_site(site)
        self.arrivals.watch(site.entry)

    def _note_pipeline(self) -> None:
        self._is_pipelined = runs_in_pipeline()

    def _follow_parameters(self, replaced: list[ParameterEntry]) -> None:
        """Parameters have been replaced by their shards, or spread by tensor parallelism."""
        if self._optimizer is not None:
            refuse_old_optimizer(self.title, replaced, self._optimizer())
            self._mark_unstepped()
        self._names.update({id(entry.parameter()): entry.name for entry in replaced})
        self.arrivals.watch_expected(replaced)

    def remove(self) -> None:
        """Remove every hook."""
        self.capture.close()
        while self._handles:
            self._handles.pop().remove()
        self.arrivals.remove()
        if self._guard is not None:
            self._guard.remove()
        if self._state is not None:
            self._state.remove()
        if self._scale is not None:
            self._scale.remove()

    def reset(self) -> None:
        """Forget running statistics and counters."""
        if self._state is not None:
            self._state.reset()
        if self._scale is not None:
            self._scale.reset()
        self.health.counts.clear()

    def read_states(self) -> dict[str, State]:
        """Return each layer's running statistics by name."""
        return {} if self._state is None else self._state.read_states()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave all calls to autograd for a while."""
        before, self.capture.paused = self.capture.paused, True
        try:
            yield
        finally:
            self.capture.paused = before

    # ---- answers in backward -----------------------------------------------------------------

    def respond(
        self, ctx: Any, a: Tensor, weight: Tensor, delta: Tensor, wants_update: bool, wants_below: bool
    ) -> tuple[Update, Tensor | None]:
        """Return the rule's two answers for a captured call."""
        site: Site = ctx.site
        if self._scale is not None and self._scale.is_probing(ctx):
            return Update(None, None), self._scale.answer_probe(ctx, a, weight, delta)
        call = self._make_call(site, ctx.has_bias, a, delta, weight, ctx.sends_below)
        kept = find_kept(ctx, delta, a) if ctx.masks else None
        counted = call if kept is None else kept.keep(call)
        counted.samples, counted.is_topmost = self._samples.count(site, counted.samples)
        call.samples, call.is_topmost = counted.samples, counted.is_topmost
        site.note_call(counted, None if kept is None else (len(kept.places), kept.mask.mask.numel()))
        if site.entry.leave_next or not counted.a.numel() or not counted.delta.numel() or delta.is_meta:
            update = call.gradient() if wants_update else Update(None, None)
            if wants_update:
                site.answer_pass(torch._C._current_graph_task_id())
            return update, self._send_plain(ctx, call) if wants_below else None
        if self._scale is not None and (wants_update or find_wanting(ctx, self) is not None):
            counted.energy = self._scale.find(ctx, a, weight, delta)
        update, below = Update(None, None), None
        if wants_update:
            if kept is not None and not self.rule.remembers:
                self._left_out.check(site.name, kept, delta)
            update = self._make_update(site, call if self.rule.remembers else counted, counted)
        if wants_below:
            below = self._make_input_gradient(ctx, call, counted, kept)
        for observer in self.observers:
            observer(counted, update, below)
        if self.telemetry is not None and wants_update:
            self.telemetry.see(site, counted, update)
        return update, below

    def _make_call(
        self, site: Site, has_bias: bool, a: Tensor, delta: Tensor, weight: Tensor, sends_below: bool
    ) -> LinearCall:
        canonical = weight if site.layout is PLAIN else site.layout.to_canonical(weight)
        if has_bias and self._state is not None:
            has_bias = self._state.has_bias(site.name)
        map_ = site.map
        if map_.sends_below is not sends_below:  # the site's first call had an input of other strides
            map_ = replace(map_, sends_below=sends_below)  # type: ignore[type-var]
        call = LinearCall(site.name, map_, a, delta, canonical, has_bias, self.health, site.module)
        if self._state is not None:
            like = torch.empty(0, dtype=call.dtype, device=delta.device)
            call.memory, call.waits = self._state.read_state(site.name, like, has_bias)
        return call

    def _make_update(self, site: Site, call: LinearCall, counted: LinearCall) -> Update:
        """Return the update of a call; ``counted`` is the call without the rows that do not count."""
        if not self.arrivals.sees(site.entry):
            self.arrivals.watch(site.entry)  # it was frozen, or lazy, so far
        if self._state is not None:
            self._state.learn_first(call)
        update = self.rule.update(call)
        check_update(self.rule, call, update)
        if self._clips_in_backward and update.weight is not None:
            factor = self.rule.clip_update(*measure_norms([call.weight, update.weight]))
            update = update.scaled(factor, factor)
        site.answer_pass(torch._C._current_graph_task_id())
        counts = self._state is None or self._state.record(counted)
        # what is learned counts when the gradient arrives, if that is seen
        self._liveness.answers += counts or not self.arrivals.sees(site.entry)
        if self._raises:
            refuse_nonfinite(call, update)
        return update

    def _make_input_gradient(
        self, ctx: Any, call: LinearCall, counted: LinearCall, kept: KeptRows | None
    ) -> Tensor | None:
        if not self._alters or not self._alters_pass(ctx):
            return self._send_plain(ctx, call)
        below = self.rule.input_gradient(counted)
        check_input_gradient(self.rule, counted, below)
        if kept is not None:
            return kept.put(call.input_gradient(), below)
        return below.contiguous()  # as autograd's own is: a pipeline sends it to another process

    def _send_plain(self, ctx: Any, call: LinearCall) -> Tensor | None:
        """Return the plain gradient at a call's input; None where torch has to make it (`RearrangedCall`)."""
        return None if self._alters and hasattr(ctx, "restore") else call.input_gradient()

    def _alters_pass(self, node: Any) -> bool:
        """Return whether altered values go down in the running backward, which has come to this node."""
        altered = self.arrivals.altered
        return altered.enter(node) or (self._is_pipelined and altered.enter_apart(node))

    def _count_evidence(self, name: str) -> None:
        """Count a layer's evidence: the gradient of its weight has arrived in ``.grad``."""
        assert self._state is not None
        self._liveness.answers += 1
        self._state.on_grad_accumulated(name)

    def _note_answer(self, entry: ParameterEntry) -> None:
        """Note that the rule has made a gradient that arrived, or will make an update from it at the step."""
        self._liveness.answers += entry.arrived
        if self._guard is not None and not self._guard.stepping:
            self._liveness.notice_other_optimizer(entry, self._optimizer_steps)

    def _mark_unstepped(self, in_place: bool = False) -> None:
        """Leave alone what the optimizer does not step (`Liveness.mark_unstepped`)."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            self._liveness.mark_unstepped(optimizer, self.table.entries, in_place)
        if self._state is not None:
            self._state.resting.forget()

    # ---- at the step -------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._liveness.has_other_parameters(optimizer):
            self._mark_unstepped()
        self._liveness.check_part_taken(optimizer, self.table.entries, self.capture.paused)
        if self.telemetry is not None:
            self.telemetry.begin_step(self.table.entries)
        if self._state is not None:
            self._state.apply_at_step(optimizer)
        if self._clipping is not None:  # a fused optimizer unscales in its step
            overflows = self._guard is not None and self._guard.overflows
            self._clipping.apply(getattr(optimizer, "grad_scale", None), overflows)
        if self.telemetry is not None:
            self.telemetry.note_updates()

    def _skip_step(self) -> None:
        if self.telemetry is not None:
            self.telemetry.drop_step()
        if self._state is not None:
            self._state.drop_pending()
        self._liveness.name_spoilt_buffers(self._model())

    def _after_step(self, optimizer: Optimizer) -> None:
        assert self.steps is not None
        self._optimizer_steps += 1
        if self._state is not None and not self._state.keep(optimizer):
            return  # a saver's template step, or one of other layers
        self.steps += 1
        if self._scale is not None:
            self._scale.after_step(set() if self._guard is None else self._guard.find_nonzero())
        if self.telemetry is not None:
            self.telemetry.end_step(self.steps)

    # ---- the table ---------------------------------------------------------------------------

    def explain(self, batch_size: int) -> Explanation:
        """See `plywise.Rule.explain`."""
        model = self._model()
        if model is None:
            raise AttachError("The model that this rule was attached to is gone.")
        self.table.refresh(model)
        self._mark_unstepped(in_place=True)
        rows = make_rows(self.rule, self.table.entries, self.health, batch_size)
        return Explanation(self.title, rows, self.steps)
