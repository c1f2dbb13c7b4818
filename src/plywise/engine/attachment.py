"""A rule at work on a model: its hooks, its counters, and what happens at the optimizer's step."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from plywise.engine.arrivals import Arrivals
from plywise.engine.backward_scale import BackwardScale
from plywise.engine.capture.capture import Capture
from plywise.engine.capture.table import ParameterTable
from plywise.engine.clearing import ClearingWatch
from plywise.engine.clipping import Clipping
from plywise.engine.contract import RuleContract, State, StatefulContract
from plywise.engine.explain import Explanation
from plywise.engine.guard import StepGuard
from plywise.engine.health import Health
from plywise.engine.liveness import Liveness
from plywise.engine.outside_uses import OutsideUses
from plywise.engine.processes.followed_parameters import refuse_old_optimizer, refuse_replaced
from plywise.engine.processes.pipelining import runs_in_pipeline
from plywise.engine.readers import make_readers
from plywise.engine.registered import install_registered
from plywise.engine.reports.rows import make_rows
from plywise.engine.responder import RuleResponder
from plywise.engine.running_state import RunningState
from plywise.engine.selection import (
    Selector,
    collect_parameters,
    hold_selector,
    is_empty,
    refuse_handled,
    refuse_nothing,
)
from plywise.engine.sites import ParameterEntry, Site
from plywise.engine.statistics.state_loads import follow_state_dicts
from plywise.errors import AttachError


class Attachment:
    """A rule at work on a model: its hooks and its counters.

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
        self.title = f"{rule} on {type(model).__name__}"
        self.kinds = kinds
        self.steps = 0 if optimizer is not None else None  # those in which the rule took part
        self._optimizer_steps = 0
        self._model = weakref.ref(model)
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._raises = on_nonfinite == "raise"
        self._clipping: Clipping | None = None
        self._alters = rule.alters_backward
        self._liveness = Liveness(self.title, self.health)
        clips_in_backward = rule.clips_updates() and optimizer is None
        self.responder = RuleResponder(rule, self.health, self._liveness, clips_in_backward, self._raises)
        self._handles: list[RemovableHandle] = []
        self._guard: StepGuard | None = None
        self._state: RunningState | None = None
        self._scale: BackwardScale | None = None
        makes = (rule.remembers and not cast(StatefulContract, rule).turns_steps) or rule.clips_updates()
        watches = optimizer is not None and makes  # the step leaves an update in .grad
        self._clearing = ClearingWatch(self.title, self.health) if watches else None
        self._names: dict[int, str] = {}
        self._find_layers(model, layers, exclude)
        try:
            self._install(model, optimizer, on_nonfinite, process_group)
            self.responder.connect(self.arrivals, self._state, self._scale)
        except BaseException:
            self.remove()
            raise

    def _find_layers(self, model: nn.Module, layers: Selector | None, exclude: Selector | None) -> None:
        """Find the parameters that the rule takes; make what sees their calls and their gradients."""
        self.table = self._make_table(model, layers, exclude)
        self._mark_unstepped()
        self.capture = Capture(make_readers(self.kinds), self.table, self.takes, self._alters)
        counts = self._count_evidence if self.rule.remembers else None
        self.arrivals = Arrivals(
            self.rule,
            self.table,
            self.capture,
            self.responder,
            self._note_answer,
            counts,
            OutsideUses(self.title, self.health),
        )
        if not is_empty(layers):
            refuse_nothing(self.table.entries, type(self.rule).__name__, model, self.kinds)
        refuse_handled(self.table.entries)

    def _make_table(
        self, model: nn.Module, layers: Selector | None, exclude: Selector | None
    ) -> ParameterTable:
        unshared = self.rule.takes_unshared_only
        layers, exclude = hold_selector(layers), hold_selector(exclude)  # read again when modules change
        table = ParameterTable(
            model,
            lambda network: collect_parameters(network, self.kinds, layers, exclude, unshared),
            self.kinds,
            computed_too=not unshared,
            computed_biases=not self.rule.remembers,
            # a frozen layer passes altered values down, and random vectors begin at it or pass through it
            frozen_too=self._alters or self.rule.needs_backward_scale,
            add_site=self._add_site,
            responder=self.responder,
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
        if any(entry.is_candidate or entry.is_vector_of_weights for entry in self.table.entries):
            owners = [m for m in model.modules() if any(True for _ in m.parameters())]
            self.capture.install(owners)
        self._handles += install_registered(model, self.capture)
        self.arrivals.watch_expected(self.table.entries)
        self._hook_modules(model)
        if optimizer is not None:
            self._handles += follow_state_dicts(optimizer, self._mark_unstepped)
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
            observers=None if self._raises else self.responder.observers,
            watch=self.arrivals.watch,
        )
        self.table.on_begin.append(self._state.processes.find)
        self.capture.resting = weakref.ref(self._state.resting)

    def _hook_modules(self, model: nn.Module) -> None:
        """Put the rule's own hook on the modules that it is for."""
        hook: Any = self.rule.module_hook()
        if hook is None:
            return
        hook.alters = self.responder.alters_pass
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
        self.responder.is_pipelined = runs_in_pipeline()

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
        if self._clearing is not None:
            self._clearing.remove()

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
        if self._clearing is not None:
            self._clearing.follow(entry)

    def _mark_unstepped(self, in_place: bool = False, or_before: bool = False) -> None:
        """Leave alone what the optimizer does not step (`Liveness.mark_unstepped`)."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            self._liveness.mark_unstepped(optimizer, self.table.entries, in_place, or_before)
        if self._state is not None:
            self._state.resting.forget()

    # ---- at the step -------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._liveness.has_other_parameters(optimizer):
            self._mark_unstepped(in_place=True, or_before=True)
        if self.table.adopted:
            refuse_replaced(self.table.adopted, optimizer, self._scale is not None)
            self.table.adopted.clear()
        self._liveness.check_part_taken(optimizer, self.table.entries, self.capture.paused)
        if self.responder.telemetry is not None:
            self.responder.telemetry.begin_step(self.table.entries)
        if self._state is not None:
            self._state.apply_at_step(optimizer)
        if self._clipping is not None:  # a fused optimizer unscales in its step
            overflows = self._guard is not None and self._guard.overflows
            self._clipping.apply(getattr(optimizer, "grad_scale", None), overflows)
        if self.responder.telemetry is not None:
            self.responder.telemetry.note_updates()

    def _skip_step(self) -> None:
        if self.responder.telemetry is not None:
            self.responder.telemetry.drop_step()
        if self._state is not None:
            self._state.drop_pending()
        self._liveness.name_spoilt_buffers(self._model())

    def _after_step(self, optimizer: Optimizer) -> None:
        assert self.steps is not None
        self._optimizer_steps += 1
        if self._clearing is not None:
            self._clearing.after_step()
        if self._state is not None and not self._state.keep(optimizer):
            return  # a saver's template step, or one of other layers
        self.steps += 1
        if self._scale is not None:
            self._scale.after_step(set() if self._guard is None else self._guard.find_nonzero())
        if self.responder.telemetry is not None:
            self.responder.telemetry.end_step(self.steps)

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
