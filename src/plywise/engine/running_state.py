"""Life cycle of a rule's running statistics.

- Evidence gathered in backward is *staged*; it counts once the gradient has arrived in ``.grad`` (it does
  not for `torch.autograd.grad`, or when backward fails halfway), and is then *pending*, summed over
  micro-batches.
- It is dropped when that gradient is (``zero_grad``), or when the step is skipped.
- The optimizer's step turns it into state, all layers at once: an exception on the way leaves the old one.
  A step without evidence (a checkpoint's template step with zero gradients) changes nothing. One step is one
  gathering: of a closure that is evaluated several times, the last evaluation counts.
- The state is in ``optimizer.state[weight]`` (`plywise.engine.saved_state`).

Expensive refreshes are spread over a cycle: layers take turns (`plywise.engine.refresh_cycle`).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from plywise.engine import health
from plywise.engine.agreement import Agreement
from plywise.engine.call import LinearCall
from plywise.engine.contract import Evidence, LayerShape, Shapes, State, StatefulContract
from plywise.engine.gathered import GatheredEvidence
from plywise.engine.health import Health
from plywise.engine.known_layers import KnownLayers
from plywise.engine.layer_handle import LayerHandle
from plywise.engine.pipelining import runs_in_pipeline
from plywise.engine.refresh_cycle import choose_phases
from plywise.engine.replicas import Job, Replicas, find_training_group, refuse_join
from plywise.engine.resting import Resting
from plywise.engine.saved_state import LayerState, SavedState
from plywise.engine.shard_exchange import find_held, share_out_gradients
from plywise.engine.sharding import SPREAD, is_any_nonzero
from plywise.engine.sites import ParameterEntry, Site
from plywise.engine.stacks import convert_state
from plywise.engine.state_dicts import StateDicts
from plywise.engine.step_updates import StepUpdates, find_finite
from plywise.engine.turned_steps import TurnedSteps
from plywise.errors import AttachError, PlywiseError


class RunningState:
    """Keeps the running state of one attachment's layers.

    Args:
        rule: the rule.
        entries: the model's parameters.
        optimizer: the optimizer in whose state the statistics are.
        process_group: the processes that average gradients, if the user names them.
        health_: where fallbacks are counted.
        leave: leaves a parameter to the optimizer, for the reason given.
    """

    def __init__(
        self,
        rule: StatefulContract,
        entries: Iterable[ParameterEntry],
        optimizer: Optimizer,
        process_group: dist.ProcessGroup | None,
        health_: Health,
        leave: Callable[[ParameterEntry, str], None],
    ) -> None:
        self._rule = rule
        self._health = health_
        self._leave_to_optimizer = leave
        self._replicas = Replicas(process_group)
        self._knows_replicas = process_group is not None
        self._is_pipelined = False
        self._agreement = Agreement()
        self._entries = list(entries)
        self._known = KnownLayers(self._entries)
        self._layers = self._known.by_name
        self._updates = StepUpdates(rule, health_)
        self._turned = TurnedSteps(rule, optimizer, health_) if rule.turns_steps else None
        self._gathered = GatheredEvidence()
        self._pending = self._gathered.pending
        self._made: dict[str, LayerState] | None = None
        self._planned: tuple[int, int, int] | None = None
        self._resting: Resting | None = None
        self._may_rest = True
        self._saved = SavedState(rule, optimizer, self._layers, self._entries)
        self._state_dicts = StateDicts(self._saved, optimizer, self.drop_pending)

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the state out of it."""
        self._turn_momenta_back()
        self._state_dicts.remove()
        self._saved.remove()

    def add_site(self, site: Site) -> None:
        """A layer's first call."""
        if not self._known.add_site(site):
            self._leave(site.entry, "calls use it in several ways, and a statistic belongs to one of them")

    def _leave(self, entry: ParameterEntry, reason: str) -> None:
        """Leave a weight to the optimizer; what has been learned of it is dropped."""
        layers = [layer.name for layer in self._known.of_weight(entry)]
        if self._agreement.has_settled(entry):
            raise PlywiseError(
                f"Layer {layers[0]!r}: {reason}. The other processes do not know of that and go on with it: "
                f"leave the layer to the optimizer on all of them, attach(..., exclude={entry.layer!r})."
            )
        for name in layers:
            self._saved.drop(name)
            self._pending.pop(name, None)
        self._leave_to_optimizer(entry, reason)

    def reset(self) -> None:
        """Forget all statistics, as if the rule had just been attached."""
        self._turn_momenta_back()
        self._saved.clear()
        self.drop_pending()

    def states(self) -> dict[str, State]:
        """Each layer's state by name."""
        return {name: self._saved.read(name).tensors for name in self._layers}

    def rests(self, may_rest: bool) -> bool:
        """Whether forward and backward of all layers are left to autograd until the next step."""
        if may_rest != self._may_rest:
            self._may_rest, self._planned = may_rest, None
        if self._resting is not None and not self._resting.holds(self._saved):
            self._planned = None  # somebody has changed the optimizer's state, or the layers
        key = self._saved.version, len(self._layers), self._saved.step
        if self._planned != key:
            is_same = self._planned is not None and self._planned[:2] == key[:2]
            self._planned = key
            if not (is_same and self._resting is not None and not self._gathers):
                self._plan()
        return self._resting is not None

    def _plan(self) -> None:
        """Find the layers whose forward and backward are plain in this step: the step makes their updates."""
        # the optimizer's state may have been cleared: that is a new start
        learned = self._find_learned()
        knows_all = learned is not None and (self._knows_replicas or count_processes() == 1)
        may_rest = self._may_rest and knows_all and not self._is_pipelined and not self._gathers
        may_rest = may_rest and self._rule.acts_at_step
        learned = learned or set()
        layers = [layer for layer in self._layers.values() if layer.entry.trains]
        entries = [entry for entry in self._entries if entry.trains]
        awake = {layer.entry for layer in layers if not may_rest or self._must_act(layer)}
        # what calls do with others is not known yet: they may be new, or have statistics from before a resume
        known = {layer.entry for layer in layers if layer.name in learned}
        awake |= {e for e in entries if e not in known and (self._saved.has_state(e) or e.is_unknown)}
        for entry in entries:
            entry.rests = may_rest and entry not in awake
        self._resting = None
        if may_rest and not awake:
            resting = [e for e in layers if e.name in learned and not e.gone and not e.entry.why_left]
            states = [self._read_moved(layer.name, layer.statistic_like) for layer in resting]
            self._resting = Resting(resting, states, list(self._layers.values()))

    def _find_learned(self) -> set[str] | None:
        """The layers that have statistics; None if parameters have been replaced (the next pass says so)."""
        layers = {name: layer for name, layer in self._layers.items() if layer.entry.trains}
        try:
            for name, layer in layers.items():
                if not layer.gone and layer.entry.dimensions:
                    self._saved.follow_columns(name)
        except AttachError:
            return None
        return {name for name in layers if self._saved.read(name).tensors}

    def _must_act(self, layer: LayerHandle) -> bool:
        """Whether a layer's calls have to be captured in a step that gathers nothing."""
        if layer.entry.sharding is not None or not self._waits(layer.name):
            return True
        is_new = not self._saved.read(layer.name).tensors
        return is_new and not layer.gone and not layer.entry.why_left

    # ---- in backward -------------------------------------------------------------------------

    def read_state(self, name: str, like: Tensor, has_bias: bool) -> tuple[State, bool]:
        """A layer's state, on the device of ``like``, and whether its gradient waits for the step."""
        layer = self._layers[name]
        if not layer.weight.requires_grad or layer.entry.leave_next:
            return {}, True
        if has_bias != (layer.bias is not None):
            self._leave(layer.entry, "some of its calls add its bias and others do not")
            return {}, True
        state = self._read_moved(name, like)
        pending = self._pending.get(name)
        if pending is not None and not layer.holds_gradient(pending.mark):
            del self._pending[name]  # zero_grad since: that step will not happen
        return state.tensors, self._waits(name)

    def _read_moved(self, name: str, like: Tensor) -> LayerState:
        """A layer's state, as far as it fits: moved with the model, dropped if a bias has been frozen."""
        self._saved.follow_columns(name)
        state = self._saved.read(name)
        if any(value.dtype != like.dtype or value.device != like.device for value in state.tensors.values()):
            moved = convert_state(state.tensors, like)
            state = LayerState(moved, state.phase, state.in_backward)
            self._saved.write(name, state)
        return state

    def _waits(self, name: str) -> bool:
        """Whether a layer's gradient is the plain one in this step, from which the step makes the update."""
        pending = self._pending.get(name)
        if pending is not None:  # micro-batches of one step are treated alike
            return pending.waits
        return self._refreshes(name) or not self._saved.peek(name).in_backward

    def has_bias(self, name: str) -> bool:
        """Whether the bias belongs to a layer's local problem."""
        return self._layers[name].bias is not None

    def record(self, call: LinearCall) -> None:
        """Gather a backward pass's evidence; it does not count yet."""
        if self._layers[call.name].entry.leave_next:
            return
        evidence: Evidence = {}
        is_new = not self._saved.peek(call.name).tensors  # it may be called in steps between gatherings only
        if (self._gathers or is_new) and call.a.numel() and call.delta.numel():
            # data-parallel training averages gradients, so that each row counts 1/processes in the whole
            evidence = self._rule.gather(
                call.times(1 / self._replicas.size), self._saved.step // self._rule.stats_every
            )
        self._gathered.stage(call.name, call.waits, evidence)
        if self._is_pipelined:  # its gradient may be assigned by hand, and then it never arrives
            self.on_grad_accumulated(call.name)

    def on_grad_accumulated(self, name: str) -> None:
        """The gradient of a layer's weight has arrived in ``.grad``: its evidence counts."""
        if self._gathered.has_staged(name):
            self._gathered.arrive(name, self._layers[name].mark_gradient())

    # ---- at the step -------------------------------------------------------------------------

    def drop_pending(self) -> None:
        """The step does not happen."""
        self._gathered.drop()
        self._made = None

    def apply_at_step(self, optimizer: Optimizer) -> None:
        """Turn pending evidence into state, and plain gradients into updates; called before the step."""
        with self._in_full_precision():
            self._apply(optimizer)

    def _in_full_precision(self) -> ExitStack:
        """Autocast is meant for the network: the rule's own work is done without it."""
        precision = ExitStack()
        devices = {layer.weight.device.type for layer in self._layers.values() if not layer.gone}
        for device_type in devices:
            if torch.is_autocast_enabled(device_type):
                precision.enter_context(torch.autocast(device_type, enabled=False))
        return precision

    def keep(self, optimizer: Optimizer) -> bool:
        """The step has been taken: what it learned goes into the optimizer's state.

        Not before: many optimizers begin a parameter's state when there is none.

        Returns:
            Whether the rule took part in the step.
        """
        made, self._made = self._made, None
        if self._turned is not None and made is not None:
            with self._in_full_precision():
                self._keep_turned(self._turned, made, optimizer)
        if made is None:
            if self._saved.step == 0:
                self._saved.write_templates()
            return False
        if made or self._saved.step:
            self._saved.count_step(made)
        for name, state in made.items():
            self._saved.write(name, state)
        return True

    def _keep_turned(self, turned: TurnedSteps, made: Mapping[str, LayerState], optimizer: Optimizer) -> None:
        """Turn the step back, and momenta into the coordinates that hold from now on."""
        turned.end(optimizer)
        after = {name: state.tensors for name, state in made.items()}
        for name in made:
            layer, old = self._layers[name], self._saved.read(name).tensors
            if old:
                turned.turn_momenta(layer, old, after[name], optimizer)
            elif not turned.has_turned(layer):
                turned.restart(layer, optimizer)  # second moments of other coordinates are none of these

    def _turn_momenta_back(self) -> None:
        """The coordinates end here: momenta are the weights' own again."""
        optimizer = self._saved.optimizer
        if self._turned is not None and optimizer is not None:
            for name, state in self.states().items():
                if state and self._layers[name].is_in_place:
                    self._turned.turn_back_state(self._layers[name], state, optimizer)

    def _apply(self, optimizer: Optimizer) -> None:
        self._made = None
        self._saved.follow(optimizer)
        self._state_dicts.refuse_orphans(optimizer)
        if self._apply_at_rest(optimizer):
            return
        layers = self._find_layers(optimizer)
        marks = {name: pending.mark for name, pending in self._pending.items()}
        held = find_held(layers, marks, self._entries, self._replicas)
        for name in [name for name in self._pending if name not in held]:
            del self._pending[name]
        if not self._has_evidence(layers):
            self.drop_pending()  # no backward of ours leads to this step
            return
        self._warn_if_alone()
        active = {layer.name: layer for layer in self._find_active(layers)}
        before = {name: self._read_moved(name, layer.statistic_like) for name, layer in active.items()}
        memories = {name: state.tensors for name, state in before.items()}
        learned = self._learn(active, memories)
        due = [name for name in active if memories[name] and self._refreshes(name)]
        refreshed = self._find_parts_taken(due, active)
        self._refresh(refreshed, memories)
        # a layer that had no rows here may have worked on another process: its gradient came by averaging
        took_part = active if self._replicas.size > 1 else self._find_parts_taken(list(active), active)
        waiting = [active[name] for name in took_part if self._waits(name)]
        for layer in active.values():
            layer.entry.arrived = False
        with share_out_gradients(waiting, memories, self._replicas, self._rule) as mine:
            self._make_updates(mine, before, memories, optimizer)
        changed = {*learned, *refreshed}
        phases = self._choose_phases([name for name in learned if not before[name].tensors])
        self.drop_pending()
        self._made = {}
        for name, state in before.items():
            if name in changed:
                state = replace(state, phase=phases.get(name, state.phase))
                self._made[name] = self._make_state(name, state, memories)
            elif memories[name] is not state.tensors and not self._rule.acts_at_step:
                self._made[name] = replace(state, tensors=memories[name])

    def _apply_at_rest(self, optimizer: Optimizer) -> bool:
        """The quick way through a step that neither gathers nor refreshes; whether it could be taken."""
        resting = self._resting
        if resting is None or self._pending or self._gathers or self._replicas.size > 1:
            return False
        if not resting.holds(self._saved):
            return False
        ready = resting.take_arrived()
        if not ready:
            return True  # no backward of ours leads to this step
        before, memories = resting.states, resting.memories.copy()
        refreshed = [layer.name for layer in ready if self._refreshes(layer.name)]
        self._refresh(refreshed, memories)
        self._make_updates(ready, before, memories, optimizer)
        self._made = {name: self._make_state(name, before[name], memories) for name in refreshed}
        return True

    def _make_updates(
        self,
        layers: list[LayerHandle],
        before: Mapping[str, LayerState],
        memories: dict[str, State],
        optimizer: Optimizer,
    ) -> None:
        """Make these layers' updates from their gradients."""
        if self._turned is None:
            self._updates.make(layers, memories)
            return
        # New coordinates hold from the next step on: momenta are turned once this one has been taken. The
        # first hold at once where the optimizer has no state yet: its second moments are of these then.
        now = {layer.name: before[layer.name].tensors for layer in layers}
        for layer in layers:
            if not now[layer.name] and not self._turned.has_state(layer, optimizer):
                now[layer.name] = memories[layer.name]
        layers = [layer for layer in layers if now[layer.name]]
        self._turned.add_decay(layers, optimizer)
        turned = self._updates.make(layers, now)
        self._turned.take_decay(layers, optimizer)
        self._turned.begin(turned, now, optimizer)

    def _make_state(self, name: str, before: LayerState, memories: dict[str, State]) -> LayerState:
        """The state of a layer that has learned or been refreshed."""
        acts = self._rule.in_backward(memories[name], self._layers[name].shape)
        return LayerState(memories[name], before.phase, acts)

    def _find_layers(self, optimizer: Optimizer) -> list[LayerHandle]:
        """The layers that this optimizer steps, in the model's order."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [
            layer
            for layer in self._known.in_order()
            if not layer.gone
            and not layer.entry.excluded
            and id(layer.weight) in stepped
            and layer.weight.requires_grad
        ]

    def _has_evidence(self, layers: list[LayerHandle]) -> bool:
        """Whether a backward pass leads to this step; the same on all processes."""
        if self._replicas.size == 1:
            part_taken = bool(self._pending) or any(layer.entry.arrived for layer in layers)
            return part_taken and any(layer.has_gradient for layer in layers)
        # a process whose rows all went elsewhere has no evidence, but the averaged gradients
        parameters = [entry.parameter() for entry in self._find_weights()]
        return is_any_nonzero([p.grad for p in parameters if p is not None and p.grad is not None])

    def _find_parts_taken(self, names: list[str], active: Mapping[str, LayerHandle]) -> list[str]:
        """Which of these layers a backward pass has reached, on any process."""
        flags = [name in self._pending or active[name].entry.arrived for name in names]
        if names and self._replicas.size > 1:
            flags = self._replicas.agree(flags, active[names[0]].device)
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def _find_active(self, layers: list[LayerHandle]) -> list[LayerHandle]:
        """The layers that take part in this step; the same on all processes."""
        if self._replicas.size == 1:
            called = [layer for layer in layers if layer.site is not None or layer.entry.arrived]
            return [layer for layer in called if not layer.entry.left]
        settled = self._agreement.settle(self._replicas, layers, self._find_weights())
        return [layer for layer in layers if layer.entry in settled]

    def _find_weights(self) -> list[ParameterEntry]:
        """The weights that may be learned, called here or not: the same on all processes, in one order."""
        entries = [e for e in self._entries if not e.excluded and e.is_weight]
        return [e for e in entries if (p := e.parameter()) is not None and p.requires_grad]

    def _learn(self, layers: dict[str, LayerHandle], memories: dict[str, State]) -> list[str]:
        """Learn the evidence of this step; the layers that learned something."""
        parts: dict[str, Evidence] = {}
        for name in layers if self._gathers else [name for name in layers if not memories[name]]:
            pending = self._pending.get(name)
            if pending is not None and pending.evidence:
                parts[name] = pending.evidence
            elif self._replicas.size > 1:
                shape = layers[name].shape
                parts[name] = _make_zeros(self._rule.evidence_shapes(shape), shape)
        totals = self._replicas.total(parts)
        news: dict[str, State] = {}
        for name, evidence in _find_nonempty(totals):
            memory = convert_state(memories[name], evidence["rows"])
            news[name] = {**memory, **self._rule.learn(memory, dict(evidence))}
        return self._keep_finite(news, memories)

    def _keep_finite(self, news: dict[str, State], memories: dict[str, State]) -> list[str]:
        """Keep what has been learned as far as it is finite; the layers that have learned something."""
        flags = iter(find_finite([value for new in news.values() for value in new.values()]))
        learned = []
        for name, new in news.items():
            are_finite = [next(flags) for _ in new]  # of all its tensors: the next layer's come after them
            if all(are_finite):
                memories[name] = new
                learned.append(name)
            else:
                self._health.note(name, health.NON_FINITE)
        return learned

    def _refresh(self, names: list[str], memories: dict[str, State]) -> None:
        """Refresh these layers' states, the work shared out over the processes."""
        jobs = {}
        for name in names:
            shape = self._layers[name].shape
            jobs[name] = Job(
                self._rule.refresh_cost(shape),
                partial(_make_zeros, self._rule.refreshed_shapes(shape), shape),
                partial(self._rule.refresh, memories[name], name, self._health),
            )
        for name, news in self._replicas.share_out(jobs).items():
            memories[name] = {**memories[name], **news}

    @property
    def _gathers(self) -> bool:
        """Whether this step gathers evidence: all layers do so together, so that most steps can rest."""
        return self._saved.step % self._rule.stats_every == 0

    def _refreshes(self, name: str) -> bool:
        """Whether a layer's turn is in this step.

        In the first cycle every gathering refreshes: roots of a single batch should not last for long.
        """
        state = self._saved.peek(name)
        if not state.tensors:
            return True
        if self._saved.step < self._rule.refresh_every:
            return self._gathers
        return (self._saved.step - state.phase) % self._rule.refresh_every == 0

    def _choose_phases(self, new: list[str]) -> dict[str, int]:
        """The steps of a cycle in which layers that have just begun to learn take their turns."""
        if not new:
            return {}
        layers = [layer for layer in self._known.in_order() if not layer.gone]
        costs = {layer.name: self._rule.refresh_cost(layer.shape) for layer in layers}
        states = {name: self._saved.read(name) for name in costs}
        others = {name: (state.phase, costs[name]) for name, state in states.items() if state.tensors}
        wanted = {name: cost for name, cost in costs.items() if name in new}
        return choose_phases(wanted, others, self._rule.refresh_every)

    # ---- processes ---------------------------------------------------------------------------

    def find_replicas(self) -> None:
        """If DistributedDataParallel runs this forward, or fully_shard, its processes share the state."""
        if count_processes() == 1:
            return
        refuse_join(type(self._rule).__name__)
        self._is_pipelined = runs_in_pipeline()
        if self._knows_replicas:
            return
        group = find_training_group(self._entries)
        if group is not None:
            self._replicas = Replicas(group)
            self._knows_replicas = True

    def _warn_if_alone(self) -> None:
        # stages of a pipeline have other layers, and tensor parallelism gives all processes the same rows
        apart = self._is_pipelined or any(entry.excluded == SPREAD for entry in self._entries)
        if not self._knows_replicas and not apart and count_processes() > 1:
            warnings.warn(
                f"{count_processes()} processes run, but no DistributedDataParallel was seen in this model's "
                f"forward: {type(self._rule).__name__} keeps statistics of this process alone. If gradients "
                "are averaged by other means, say over which processes: attach(..., process_group=...).",
                RuntimeWarning,
                stacklevel=2,
            )
            self._knows_replicas = True


def count_processes() -> int:
    """Processes of torch.distributed; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _find_nonempty(totals: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, Mapping[str, Tensor]]]:
    """The evidence of some rows at least."""
    if not totals:
        return []
    device = next(iter(totals.values()))["rows"].device
    rows = torch.stack([evidence["rows"].double().to(device) for evidence in totals.values()]).tolist()
    return [item for item, count in zip(totals.items(), rows, strict=True) if count > 0]


def _make_zeros(shapes: Shapes, layer: LayerShape) -> dict[str, Tensor]:
    return {key: torch.zeros(shape, dtype=layer.dtype, device=layer.device) for key, shape in shapes.items()}
