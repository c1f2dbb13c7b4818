"""Life cycle of a rule's running statistics.

- Evidence gathered in backward is *staged*; it counts once the gradient has arrived in ``.grad`` (it does
  not for `torch.autograd.grad`, or when backward fails halfway), and is then *pending*, summed over
  micro-batches.
- It is dropped when that gradient is (``zero_grad``), or when the step is skipped.
- The optimizer's step turns the evidence of all layers at once into state. After an exception the old state
  stays. A step without evidence (a checkpoint's template step with zero gradients) changes nothing. A step
  gathers once: if a closure is evaluated several times, the last evaluation counts.
- The state is in ``optimizer.state[weight]`` (`plywise.engine.statistics.saved_state`).

`plywise.engine.statistics.learning` decides in which steps a rule learns and refreshes,
`plywise.engine.statistics.resting` in which steps forward and backward are plain.
"""

from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from plywise.engine.answers import check_tensors
from plywise.engine.call import LinearCall
from plywise.engine.contract import Evidence, State, StatefulContract
from plywise.engine.coordinates.turned_steps import TurnedSteps
from plywise.engine.health import Health
from plywise.engine.processes.followed_parameters import refuse_replaced
from plywise.engine.processes.training_processes import TrainingProcesses
from plywise.engine.sites import ParameterEntry, Site
from plywise.engine.statistics.early_layers import GRADIENT, gather_gradient, learn_from_call, measure_scale
from plywise.engine.statistics.gathered import GatheredEvidence
from plywise.engine.statistics.known_layers import KnownLayers
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.learning import Learning
from plywise.engine.statistics.resting import Resting, RestingLayers
from plywise.engine.statistics.saved_state import NOTHING, LayerState, SavedState
from plywise.engine.statistics.shard_exchange import share_out_gradients
from plywise.engine.statistics.state_dicts import StateDicts
from plywise.engine.statistics.step_updates import StepUpdates
from plywise.engine.statistics.taking_part import TakingPart
from plywise.errors import PlywiseError

NOTHING_TO_DO = nullcontext()


class RunningState:
    """Keeps the running state of one attachment's layers.

    Args:
        rule: the rule.
        entries: the model's parameters.
        optimizer: the optimizer in whose state the statistics are.
        process_group: the processes that average gradients, if the user names them.
        health: where fallbacks are counted.
        leave: leaves a parameter to the optimizer, for the reason given.
        observers: observers that need each call; None if each call must be captured in any case.
        watch: watches gradients arrive in a parameter.

    Attributes:
        processes: the processes that share the state.
        resting: says in which steps forward and backward are left to autograd.
    """

    def __init__(
        self,
        rule: StatefulContract,
        entries: Iterable[ParameterEntry],
        optimizer: Optimizer,
        process_group: dist.ProcessGroup | None,
        health: Health,
        leave: Callable[[ParameterEntry, str], None],
        observers: Sized | None,
        watch: Callable[[ParameterEntry], None],
    ) -> None:
        self._rule = rule
        self._leave_to_optimizer = leave
        self._entries = list(entries)
        self.processes = TrainingProcesses(type(rule).__name__, self._entries, process_group)
        self._known = KnownLayers(self._entries)
        self._layers = self._known.by_name
        self._updates = StepUpdates(rule, health)
        self._turned = TurnedSteps(rule, optimizer, health, self.processes) if rule.turns_steps else None
        self._gathered = GatheredEvidence()
        self._pending = self._gathered.pending
        self._made: dict[str, LayerState] | None = None
        self._rested: RestingLayers | None = None
        self._saved = SavedState(rule, optimizer, self._layers, self._entries, self._turn_back)
        self._parts = TakingPart(self._entries, self._known, self._saved, self._gathered, self.processes)
        self._learning = Learning(rule, self._saved, self._known, health)
        self.resting = Resting(
            rule=rule,
            saved=self._saved,
            known=self._known,
            entries=self._entries,
            learning=self._learning,
            processes=self.processes,
            waits=self._waits,
            observers=observers,
            watch=watch,
        )
        self._state_dicts = StateDicts(self._saved, optimizer, self.drop_pending)

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the state out of it."""
        self._turn_back(self._layers.values())
        self._state_dicts.remove()
        self._saved.remove()

    def add_site(self, site: Site) -> None:
        """Note a layer's first call."""
        if self._known.add_site(site):
            self.resting.settle(self._layers[site.name])
            return
        if not self._rule.acts_alone:
            self._leave(site.entry, "calls use it in several ways, and a statistic belongs to one of them")
            return
        for layer in self._known.of_weight(site.entry):
            layer.acts_alone = True
            if layer.name in self._pending:  # what has arrived in this step so far stays as it is
                self._pending[layer.name].waits = False

    def _leave(self, entry: ParameterEntry, reason: str) -> None:
        """Leave a weight to the optimizer; what has been learned of it is dropped."""
        layers = [layer.name for layer in self._known.of_weight(entry)]
        if self._parts.have_settled(entry):
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
        self._turn_back(self._layers.values())
        self._saved.clear()
        self.drop_pending()

    def read_states(self) -> dict[str, State]:
        """Return each layer's state by name."""
        return {name: self._saved.read(name).tensors for name in self._layers}

    # ---- in backward -------------------------------------------------------------------------

    def read_state(self, name: str, like: Tensor, has_bias: bool) -> tuple[State, bool]:
        """Return a layer's state, on the device of ``like``, and whether its gradient waits for the step."""
        layer = self._layers[name]
        if not layer.weight.requires_grad or layer.entry.leave_next:
            return {}, True
        if has_bias != (layer.bias is not None):
            self._leave(layer.entry, "some of its calls add its bias and others do not")
            return {}, True
        had_bias, state = self._saved.has_column(name), self._saved.read_moved(name, like)
        if layer.acts_alone and not state.in_backward:  # the factor of its updates is not known yet
            state = NOTHING
        pending = self._pending.get(name)
        if pending is not None and not layer.holds_gradient(pending.mark):
            del self._pending[name]  # zero_grad was called since: that step will not happen
        elif pending is not None and had_bias != has_bias:  # frozen or thawed between micro-batches
            pending.evidence = {}
        return state.tensors, self._waits(name)

    def _waits(self, name: str) -> bool:
        """Return whether a layer's gradient is plain now, so that the step makes the update from it."""
        pending = self._pending.get(name)
        if pending is not None:  # micro-batches of one step are treated alike
            return pending.waits
        if self._layers[name].acts_alone:
            return False
        return self._learning.refreshes(name) or not self._saved.peek(name).in_backward

    def learn_first(self, call: LinearCall) -> None:
        """Let a layer learn from the call itself if it has learned nothing and cannot wait for the step."""
        acts_now = self._layers[call.name].acts_alone and not call.memory and not call.waits
        if acts_now and self._rule.acts_at_step:
            call.memory = learn_from_call(self._rule, call, self.processes.size)

    def has_bias(self, name: str) -> bool:
        """Return whether the bias belongs to a layer's local problem."""
        return self._layers[name].bias is not None

    def record(self, call: LinearCall) -> bool:
        """Gather a backward pass's evidence; return whether it counts before the gradient has arrived."""
        if self._layers[call.name].entry.leave_next:
            return False
        evidence: Evidence = {}
        is_new = not self._saved.peek(call.name).tensors  # it may be called in steps between gatherings only
        if (self._learning.gathers or is_new) and call.a.numel() and call.delta.numel():
            # data-parallel training averages gradients, so that each row counts 1/processes in the whole
            counted = call.times(1 / self.processes.size)
            evidence = self._rule.gather(counted, self._learning.turn)
            if is_new:
                wanted = self._rule.evidence_shapes(self._layers[call.name].shape)
                check_tensors(self._rule, "gather", call.name, evidence, wanted)
            if self._learning.measures(self._layers[call.name]):
                evidence = {**evidence, GRADIENT: gather_gradient(counted)}
        self._gathered.stage(call.name, call.waits, evidence)
        if self.processes.is_pipelined:  # its gradient may be assigned by hand, and then it never arrives
            self.on_grad_accumulated(call.name)
        return self.processes.is_pipelined

    def on_grad_accumulated(self, name: str) -> None:
        """Count a layer's evidence: the gradient of its weight has arrived in ``.grad``."""
        self._gathered.arrive(name, self._layers[name].mark_gradient())

    # ---- at the step -------------------------------------------------------------------------

    def drop_pending(self) -> None:
        """Forget all pending evidence: the step does not happen."""
        self._gathered.drop()
        self._made = None
        self.resting.rests_on = False  # a state may have been loaded

    def apply_at_step(self, optimizer: Optimizer) -> None:
        """Turn pending evidence into state, and plain gradients into updates; called before the step."""
        with self._in_full_precision():
            self._apply(optimizer)

    def _in_full_precision(self) -> AbstractContextManager[object]:
        """Run the block without autocast, which is meant for the network and not for the rule's own work."""
        if not torch._C._is_any_autocast_enabled():
            return NOTHING_TO_DO
        precision = ExitStack()
        devices = {layer.weight.device.type for layer in self._layers.values() if not layer.gone} - {"meta"}
        for device_type in filter(torch.is_autocast_enabled, devices):
            precision.enter_context(torch.autocast(device_type, enabled=False))
        return precision

    def keep(self, optimizer: Optimizer) -> bool:
        """Put what was learned into the optimizer's state: the step has been taken.

        It is not put there earlier: many optimizers only initialise a parameter's state if it is empty.

        Returns:
            Whether the rule took part in the step.
        """
        made, self._made = self._made, None
        rested, self._rested = self._rested, None
        self.resting.begin_step()
        if self._turned is not None:
            news = made or {}
            before = {name: self._saved.read(name).tensors for name in news}
            with self._in_full_precision():
                self._turned.keep([self._layers[name] for name in news], before, news, optimizer)
        self._parts.release_biases()
        if made is None:
            if self._saved.step == 0:
                self._saved.write_templates()
            return False
        if made or self._saved.step:
            self._saved.count_step(made)
        for name, state in made.items():
            self._saved.write(name, state)
        if rested is not None and made:
            self.resting.follow(rested, made)
        return True

    def _turn_back(self, layers: Iterable[LayerHandle]) -> None:
        """Turn momenta back to the weights' own coordinates, because statistics are removed."""
        if self._turned is not None:
            self._turned.turn_back(layers, self._saved)

    def _apply(self, optimizer: Optimizer) -> None:
        self._made = self._rested = None
        self._saved.follow(optimizer)
        if self._apply_at_rest(optimizer):
            return
        layers = self._parts.find(optimizer)
        has_evidence = self._parts.have_evidence(layers)
        if not has_evidence and self._turned is None:
            self.drop_pending()  # no backward of ours leads to this step
            return
        active = {layer.name: layer for layer in self._parts.find_active(layers)}
        before = {name: self._saved.read_moved(name, layer.statistic_like) for name, layer in active.items()}
        memories = {name: state.tensors for name, state in before.items()}
        if not has_evidence:
            self.drop_pending()
            self._make_updates([*active.values()], before, memories, optimizer)
            return
        self.processes.warn_if_alone()
        changed = self._learn(active, memories)
        waiting = self._find_waiting(active)
        for layer in active.values():
            layer.entry.arrived = False
        self._make_updates(waiting, before, memories, optimizer)
        phases = self._learning.choose_phases([name for name in changed if not before[name].tensors])
        self.drop_pending()
        self._made = {}
        for name, state in before.items():
            if name in changed:
                state = replace(state, phase=phases.get(name, state.phase))
                self._made[name] = self._make_state(name, state, memories)
            elif memories[name] is not state.tensors and not self._rule.acts_at_step:
                self._made[name] = replace(state, tensors=memories[name])

    def _learn(self, active: dict[str, LayerHandle], memories: dict[str, State]) -> set[str]:
        """Learn and refresh what is due in this step; return the layers whose states have changed."""
        replicas = self.processes.replicas
        learned, gradients = self._learning.learn(active, self._pending, memories, replicas)
        due = [name for name in active if memories[name] and self._learning.refreshes(name)]
        refreshed = self._parts.find_reached(due, active)
        self._learning.refresh(refreshed, memories, replicas)
        for name in gradients.keys() & {*refreshed}:
            memories[name] = {**memories[name], **measure_scale(self._rule, memories[name], gradients[name])}
        return {*learned, *refreshed}

    def _find_waiting(self, active: dict[str, LayerHandle]) -> list[LayerHandle]:
        """Return the layers whose updates are made now; the rule turns every step of its layers.

        The optimizer's momenta are in other coordinates, also where a gradient is zero or the rule is paused.
        """
        if self._turned is not None:
            return [*active.values()]
        # a layer that had no rows here may have worked on another process: its gradient came by averaging
        shared = self.processes.size > 1
        took_part = list(active) if shared else self._parts.find_reached(list(active), active)
        return [active[name] for name in took_part if self._waits(name)]

    def _apply_at_rest(self, optimizer: Optimizer) -> bool:
        """Take the quick way through a step that gathers nothing; return whether that was possible."""
        resting = None if self._pending or self.processes.size > 1 else self.resting.find()
        if resting is None or (self._turned is not None and resting.has_frozen_gradients()):
            return False
        ready, absent = resting.take_arrived()
        if absent:  # no call of theirs was captured, so that nothing has been seen in their place
            refuse_replaced({layer.entry: [] for layer in absent}, optimizer, keeps_values=True)
        layers = ready if self._turned is None else resting.layers
        if not layers:
            return True  # no backward of ours leads to this step
        before, memories = resting.states, resting.memories.copy()
        refreshed = [layer.name for layer in ready if self._learning.is_due(before[layer.name])]
        if refreshed:
            self._learning.refresh(refreshed, memories, self.processes.replicas)
        self._make_updates(layers, before, memories, optimizer)
        if ready:
            self._made = {name: self._make_state(name, before[name], memories) for name in refreshed}
            self._rested = resting
        return True

    def _make_updates(
        self,
        layers: list[LayerHandle],
        before: Mapping[str, LayerState],
        memories: dict[str, State],
        optimizer: Optimizer,
    ) -> None:
        """Make these layers' updates from their gradients."""
        if self._turned is not None:
            self._turned.make(layers, before, memories, optimizer)
            return
        with share_out_gradients(layers, memories, self.processes.replicas, self._rule) as mine:
            self._updates.make(mine, memories)

    def _make_state(self, name: str, before: LayerState, memories: dict[str, State]) -> LayerState:
        """Return the state of a layer that has learned or been refreshed."""
        memory, layer = memories[name], self._layers[name]
        if layer.acts_alone:
            acts = not self._rule.keeps_norm or bool(memory["scale"] > 0)
        else:
            acts = self._rule.in_backward(memory, layer.shape)
        return LayerState(memory, before.phase, acts)
