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
from collections.abc import Callable, Iterable
from contextlib import ExitStack
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
from plywise.engine.saved_state import LayerState, SavedState
from plywise.engine.shard_exchange import find_held, share_out_gradients
from plywise.engine.sharding import SPREAD, is_any_nonzero
from plywise.engine.sites import ParameterEntry, Site
from plywise.engine.state_dicts import StateDicts
from plywise.errors import PlywiseError


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
        self._gathered = GatheredEvidence()
        self._pending = self._gathered.pending
        self._made: dict[str, LayerState] | None = None
        self._saved = SavedState(rule, optimizer, self._layers, self._entries)
        self._state_dicts = StateDicts(self._saved, optimizer, self.drop_pending)

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the state out of it."""
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
        self._saved.clear()
        self.drop_pending()

    def states(self) -> dict[str, State]:
        """Each layer's state by name."""
        return {name: self._saved.read(name).tensors for name in self._layers}

    # ---- in backward -------------------------------------------------------------------------

    def read_state(self, name: str, like: Tensor, has_bias: bool) -> tuple[State, bool]:
        """A layer's state, on the device of ``like``, and whether its gradient waits for the step."""
        layer = self._layers[name]
        if not layer.weight.requires_grad or layer.entry.leave_next:
            return {}, True
        if has_bias != (layer.bias is not None):
            self._leave(layer.entry, "some of its calls add its bias and others do not")
            return {}, True
        self._saved.follow_columns(name)
        state = self._saved.read(name)
        if any(value.dtype != like.dtype or value.device != like.device for value in state.tensors.values()):
            moved = _convert(state.tensors, like)  # the model has moved
            state = LayerState(moved, state.phase, state.in_backward)
            self._saved.write(name, state)
        pending = self._pending.get(name)
        if pending is not None and not layer.holds_gradient(pending.mark):
            del self._pending[name]  # zero_grad since: that step will not happen
        return state.tensors, self._waits(name)

    def _waits(self, name: str) -> bool:
        """Whether a layer's gradient is the plain one in this step, from which the step makes the update."""
        pending = self._pending.get(name)
        if pending is not None:  # micro-batches of one step are treated alike
            return pending.waits
        return self._is_due(name, self._rule.refresh_every) or not self._saved.peek(name).in_backward

    def has_bias(self, name: str) -> bool:
        """Whether the bias belongs to a layer's local problem."""
        return self._layers[name].bias is not None

    def record(self, call: LinearCall) -> None:
        """Gather a backward pass's evidence; it does not count yet."""
        if self._layers[call.name].entry.leave_next:
            return
        evidence: Evidence = {}
        if self._is_due(call.name, self._rule.stats_every) and call.a.numel() and call.delta.numel():
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
        with ExitStack() as precision:
            devices = {layer.weight.device.type for layer in self._layers.values() if not layer.gone}
            for device_type in devices:
                if torch.is_autocast_enabled(device_type):
                    precision.enter_context(torch.autocast(device_type, enabled=False))
            self._apply(optimizer)

    def keep(self) -> bool:
        """The step has been taken: what it learned goes into the optimizer's state.

        Not before: many optimizers begin a parameter's state when there is none.

        Returns:
            Whether the rule took part in the step.
        """
        made, self._made = self._made, None
        if made is None:
            if self._saved.step == 0:
                self._saved.write_templates()
            return False
        if made or self._saved.step:
            self._saved.count_step(made)
        for name, state in made.items():
            self._saved.write(name, state)
        return True

    def _apply(self, optimizer: Optimizer) -> None:
        self._made = None
        self._saved.follow(optimizer)
        self._state_dicts.refuse_orphans(optimizer)
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
        before = {name: self._saved.read(name) for name in active}
        memories = {name: state.tensors for name, state in before.items()}
        learned = self._learn(active, memories)
        self._refresh([name for name in learned if self._is_due(name, self._rule.refresh_every)], memories)
        # a layer that rests here may have worked on another process: its gradient came by averaging
        took_part = active if self._replicas.size > 1 else self._pending
        waiting = [layer for name, layer in active.items() if name in took_part and self._waits(name)]
        with share_out_gradients(waiting, memories, self._replicas, self._rule) as mine:
            for layer in mine:
                self._finish(layer, memories)
        phases = self._choose_phases([name for name in learned if not before[name].tensors])
        self.drop_pending()
        self._made = {}
        for name, state in before.items():
            if memories[name] is not state.tensors:
                acts = state.in_backward
                if name in learned:
                    acts = self._rule.in_backward(memories[name], active[name].shape)
                self._made[name] = LayerState(memories[name], phases.get(name, state.phase), acts)

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
            return bool(self._pending) and any(layer.weight.grad is not None for layer in layers)
        # a process whose rows all went elsewhere has no evidence, but the averaged gradients
        parameters = [entry.parameter() for entry in self._find_weights()]
        return is_any_nonzero([p.grad for p in parameters if p is not None and p.grad is not None])

    def _find_active(self, layers: list[LayerHandle]) -> list[LayerHandle]:
        """The layers that take part in this step; the same on all processes."""
        if self._replicas.size == 1:
            return [layer for layer in layers if layer.site is not None and not layer.entry.left]
        settled = self._agreement.settle(self._replicas, layers, self._find_weights())
        return [layer for layer in layers if layer.entry in settled]

    def _find_weights(self) -> list[ParameterEntry]:
        """The weights that may be learned, called here or not: the same on all processes, in one order."""
        entries = [e for e in self._entries if not e.excluded and e.is_weight]
        return [e for e in entries if (p := e.parameter()) is not None and p.requires_grad]

    def _learn(self, layers: dict[str, LayerHandle], memories: dict[str, State]) -> list[str]:
        """Learn the evidence of this step; the layers that learned something."""
        due = [name for name in layers if self._is_due(name, self._rule.stats_every)]
        parts: dict[str, Evidence] = {}
        for name in due:
            pending = self._pending.get(name)
            if pending is not None and pending.evidence:
                parts[name] = pending.evidence
            elif self._replicas.size > 1:
                shape = layers[name].shape
                parts[name] = _make_zeros(self._rule.evidence_shapes(shape), shape)
        learned = []
        for name, evidence in self._replicas.total(parts).items():
            if not bool(evidence["rows"] > 0):
                continue
            memory = _convert(memories[name], evidence["rows"])
            news = self._rule.learn(memory, dict(evidence))
            if all(bool(torch.isfinite(value.sum())) for value in news.values()):
                memories[name] = {**memory, **news}
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

    def _finish(self, layer: LayerHandle, memories: dict[str, State]) -> None:
        """Precondition the gradient at hand."""
        if not memories[layer.name] or layer.weight.grad is None:
            return
        gradient = layer.read_gradient()
        update, news = self._rule.finish(memories[layer.name], gradient, layer.groups)
        parts = [part for part in (update.weight, update.bias) if part is not None]
        if not all(bool(torch.isfinite(part.sum())) for part in parts):
            self._health.note(layer.name, health.IDENTITY)
            return
        if news:
            memories[layer.name] = {**memories[layer.name], **news}
        if update.weight is not gradient.weight:
            layer.write_gradient(update)

    def _is_due(self, name: str, every: int) -> bool:
        """Whether a layer's turn is in this step; always, while it has no state.

        In the first cycle every gathering refreshes: roots of a single batch should not last for long.
        """
        state = self._saved.peek(name)
        if self._saved.step < self._rule.refresh_every:
            every = self._rule.stats_every
        return not state.tensors or (self._saved.step - state.phase) % every == 0

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


def _make_zeros(shapes: Shapes, layer: LayerShape) -> dict[str, Tensor]:
    return {key: torch.zeros(shape, dtype=layer.dtype, device=layer.device) for key, shape in shapes.items()}


def _convert(memory: State, like: Tensor) -> State:
    """The state on the device and in the dtype of the evidence: models move between steps."""
    return {key: value.to(like) for key, value in memory.items()}
