"""When evidence counts: the way of a rule's memory through backward, step, checkpoint and processes.

- Evidence gathered in backward is *staged*; it counts once the gradient has arrived in ``.grad`` (it does
  not for `torch.autograd.grad`, or when backward fails halfway), and is then *pending*, summed over
  micro-batches.
- It is forgotten when that gradient is (``zero_grad``), or when the step is skipped.
- The optimizer's step turns it into memory, all layers at once: an exception on the way leaves the old one.
- The memory travels in the optimizer's ``state_dict()`` under the key ``"plywise"``.

Steps that refresh are staggered: layers take turns, so that no step does all the dear work but the first.
"""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise import health
from plywise.capture import ModelHook
from plywise.errors import StateError
from plywise.health import Health
from plywise.kept_layer import KeptLayer, LayerShape
from plywise.ply import Move, Ply
from plywise.replicas import Job, Replicas, data_parallel_group

if TYPE_CHECKING:
    from plywise.memory import Evidence, Memory, MemoryRule, Shapes

KEY = "plywise"
"""Where in ``optimizer.state_dict()`` the memories are."""


@dataclass
class Pending:
    """Evidence whose gradient is in ``.grad``, waiting for the step.

    Attributes:
        waits: whether that gradient is the plain one, from which the step makes the move.
        evidence: summed over the backward passes so far; empty in a step that gathers none.
        mark: which tensor ``.grad`` was when the last one arrived, and how often written to.
    """

    waits: bool
    evidence: "Evidence"
    mark: tuple[int, int]


class Keeper:
    """Keeps the memories of one attachment's layers."""

    def __init__(
        self,
        rule: "MemoryRule",
        model: nn.Module,
        layers: list[KeptLayer],
        optimizer: Optimizer,
        process_group: dist.ProcessGroup | None,
        health_: Health,
    ) -> None:
        self._rule = rule
        self._layers = {layer.name: layer for layer in layers}
        self._health = health_
        self._replicas = Replicas(process_group)
        self._told_of_replicas = process_group is not None
        self._step = 0
        self._phases: dict[str, int] = {}
        self._memories: dict[str, Memory] = {layer.name: {} for layer in layers}
        self._in_backward: dict[str, bool] = {}
        self._columns: dict[str, int] = {}  # those that the memories were made for
        self._staged: dict[str, tuple[int, bool, Evidence]] = {}
        self._pending: dict[str, Pending] = {}
        self._handles = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        if process_group is None and dist.is_available():
            self._handles.append(model.register_forward_pre_hook(_FindReplicas(self)))

    def remove(self) -> None:
        """Take the hooks off the model and the optimizer."""
        for handle in self._handles:
            handle.remove()

    # ---- in backward -------------------------------------------------------------------------

    def recall(self, name: str, like: Tensor) -> tuple["Memory", bool]:
        """What a layer remembers, where ``like`` is, and whether its gradient waits for the step."""
        if not self._layers[name].weight.requires_grad:
            return {}, True
        columns = self._layers[name].shape.columns
        if self._columns.setdefault(name, columns) != columns:  # its bias was frozen, or thawed
            self._columns[name], self._memories[name] = columns, {}
        memory = self._memories[name]
        if any(value.dtype != like.dtype or value.device != like.device for value in memory.values()):
            memory = self._memories[name] = _like(memory, like)  # the model has moved
        pending = self._pending.get(name)
        if pending is not None and not _still_there(self._layers[name].weight.grad, pending.mark):
            del self._pending[name]  # zero_grad since: that step will not happen
        return memory, self._waits(name)

    def _waits(self, name: str) -> bool:
        """Whether a layer's gradient is the plain one in this step, from which the step makes the move."""
        pending = self._pending.get(name)
        if pending is not None:  # micro-batches of one step are treated alike
            return pending.waits
        return self._due(name, self._rule.refresh_every) or not self._in_backward.get(name, False)

    def has_bias(self, name: str) -> bool:
        """Whether the bias belongs to a layer's local problem."""
        return self._layers[name].bias is not None

    def stage(self, ply: Ply) -> None:
        """Gather a backward pass's evidence; it does not count yet."""
        evidence: Evidence = {}
        if self._due(ply.name, self._rule.stats_every) and ply.a.numel() and ply.delta.numel():
            # data-parallel training averages gradients, so that each row counts 1/processes in the whole
            evidence = self._rule.gather(
                ply.times(1 / self._replicas.size), self._step // self._rule.stats_every
            )
        this_pass = torch._C._current_graph_task_id()
        earlier = self._staged.get(ply.name)
        if earlier is not None and earlier[0] == this_pass:  # a layer called several times
            evidence = _added(earlier[2], evidence)
        self._staged[ply.name] = this_pass, ply.waits, evidence

    def arrived(self, name: str) -> None:
        """The gradient of a layer's weight has arrived in ``.grad``: its evidence counts."""
        this_pass, waits, evidence = self._staged.pop(name, (None, False, {}))
        if this_pass != torch._C._current_graph_task_id():
            return
        gradient = self._layers[name].weight.grad
        assert gradient is not None
        pending = self._pending.get(name)
        if pending is not None:
            evidence = _added(pending.evidence, evidence)
        self._pending[name] = Pending(waits, evidence, _mark(gradient))

    # ---- at the step -------------------------------------------------------------------------

    def forget_pending(self) -> None:
        """The step does not happen."""
        self._staged.clear()
        self._pending.clear()

    def settle(self, optimizer: Optimizer) -> None:
        """Turn pending evidence into memory, and plain gradients into moves; called before the step."""
        with ExitStack() as own_precision:
            for device_type in {
                layer.weight.device.type for layer in self._layers.values() if not layer.gone
            }:
                own_precision.enter_context(torch.autocast(device_type, enabled=False))
            self._settle(optimizer)

    def _settle(self, optimizer: Optimizer) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = {
            name: layer
            for name, layer in self._layers.items()
            if not layer.gone and id(layer.weight) in stepped and layer.weight.requires_grad
        }
        if all(layer.weight.grad is None for layer in layers.values()):
            self.forget_pending()
            return
        self._warn_if_alone()
        for name, layer in layers.items():
            pending = self._pending.get(name)
            if pending is not None and not _still_there(layer.weight.grad, pending.mark):
                del self._pending[name]
        memories = dict(self._memories)
        learned = self._learn(layers, memories)
        self._refresh([name for name in learned if self._due(name, self._rule.refresh_every)], memories)
        for name, layer in layers.items():
            # a layer that rests here may have worked on another process: its gradient came by averaging
            if (name in self._pending or self._replicas.size > 1) and self._waits(name):
                self._finish(layer, memories)
        self._memories = memories
        for name in learned:
            self._in_backward[name] = self._rule.in_backward(memories[name], layers[name].shape)
        self._step += 1
        self.forget_pending()

    def _learn(self, layers: dict[str, KeptLayer], memories: dict[str, "Memory"]) -> list[str]:
        """Learn the evidence of this step; the layers that learned something."""
        due = [name for name in layers if self._due(name, self._rule.stats_every)]
        parts: dict[str, Evidence] = {}
        for name in due:
            pending = self._pending.get(name)
            if pending is not None and pending.evidence:
                parts[name] = pending.evidence
            elif self._replicas.size > 1:
                shape = layers[name].shape
                parts[name] = _zeros(self._rule.evidence_shapes(shape), shape)
        learned = []
        for name, evidence in self._replicas.total(parts).items():
            if not bool(evidence["rows"] > 0):
                continue
            memory = _like(self._memories[name], evidence["rows"])
            news = self._rule.learn(memory, dict(evidence))
            if all(bool(torch.isfinite(value.sum())) for value in news.values()):
                memories[name] = {**memory, **news}
                learned.append(name)
            else:
                self._health.note(name, health.NON_FINITE)
        return learned

    def _refresh(self, names: list[str], memories: dict[str, "Memory"]) -> None:
        """Refresh these layers' memories, the work shared out over the processes."""
        jobs = {}
        for name in names:
            shape = self._layers[name].shape
            jobs[name] = Job(
                self._rule.refresh_cost(shape),
                partial(_zeros, self._rule.refreshed_shapes(shape), shape),
                partial(self._rule.refresh, memories[name], name, self._health),
            )
        for name, news in self._replicas.share_out(jobs).items():
            memories[name] = {**memories[name], **news}

    def _finish(self, layer: KeptLayer, memories: dict[str, "Memory"]) -> None:
        """Precondition the gradient at hand."""
        weight, bias = layer.weight, layer.bias
        if not memories[layer.name] or weight.grad is None:
            return
        if bias is not None and bias.grad is None:
            bias.grad = torch.zeros_like(bias)
        gradient = Move(weight.grad, None if bias is None else bias.grad)
        move, news = self._rule.finish(memories[layer.name], gradient, layer.groups)
        parts = [part for part in (move.weight, move.bias) if part is not None]
        if not all(bool(torch.isfinite(part.sum())) for part in parts):
            self._health.note(layer.name, health.IDENTITY)
            return
        memories[layer.name] = {**memories[layer.name], **news}
        for grad, part in ((gradient.weight, move.weight), (gradient.bias, move.bias)):
            if grad is not None and part is not None and part is not grad:
                grad.copy_(part)

    def _due(self, name: str, every: int) -> bool:
        """Whether a layer's turn is in this step; always, before it remembers anything.

        In the first cycle every gathering refreshes: roots of a single batch should not last for long.
        """
        if self._step < self._rule.refresh_every:
            every = self._rule.stats_every
        return not self._memories[name] or (self._step - self._phase(name)) % every == 0

    def _phase(self, name: str) -> int:
        """The step of a cycle in which a layer takes its turn."""
        if not self._phases:
            self._phases = self._staggered()
        return self._phases[name]

    def _staggered(self) -> dict[str, int]:
        """Spread the cost of refreshing evenly over a cycle: the dearest layers choose first."""
        costs = {name: self._rule.refresh_cost(layer.shape) for name, layer in self._layers.items()}
        load = [0.0] * self._rule.refresh_every
        phases = {}
        for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
            phases[name] = load.index(min(load))
            load[phases[name]] += cost
        return phases

    # ---- processes and checkpoints -----------------------------------------------------------

    def find_replicas(self) -> None:
        """If DistributedDataParallel runs this forward, its processes share the memory."""
        group = data_parallel_group() if _processes() > 1 else None
        if group is not None:
            self._replicas = Replicas(group)
            self._told_of_replicas = True

    def _warn_if_alone(self) -> None:
        if not self._told_of_replicas and _processes() > 1:
            warnings.warn(
                f"{_processes()} processes run, but no DistributedDataParallel was seen in this model's "
                f"forward: {type(self._rule).__name__} keeps statistics of this process alone. If gradients "
                "are averaged by other means, say over which processes: attach(..., process_group=...).",
                RuntimeWarning,
                stacklevel=2,
            )
            self._told_of_replicas = True

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved = {
            "rule": type(self._rule).__name__,
            "step": self._step,
            "layers": {name: dict(memory) for name, memory in self._memories.items()},
        }
        state[KEY] = [*state.get(KEY, []), saved]

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        name = type(self._rule).__name__
        entries = [entry for entry in state.get(KEY, []) if entry["rule"] == name]
        mine = next((entry for entry in entries if entry["layers"].keys() == self._memories.keys()), None)
        if mine is None:
            raise StateError(
                _why_not_mine(name, state.get(KEY), entries, list(self._memories)), see="state-memory"
            )
        for layer in self._layers.values():
            self._check_shapes(layer, mine["layers"][layer.name])
        self._in_backward = {
            name: self._rule.in_backward(mine["layers"][name], layer.shape)
            for name, layer in self._layers.items()
            if mine["layers"][name]
        }
        self._memories = {
            layer: {key: value.clone() for key, value in mine["layers"][layer].items()}
            for layer in self._memories
        }
        self._columns = {
            name: layer.shape.columns
            for name, layer in self._layers.items()
            if not nn.parameter.is_lazy(layer.weight)
        }
        self._step = mine["step"]
        self.forget_pending()

    def _check_shapes(self, layer: KeptLayer, memory: "Memory") -> None:
        if not memory or nn.parameter.is_lazy(layer.weight):
            return
        sizes = layer.shape
        wanted = {**self._rule.learned_shapes(sizes), **self._rule.refreshed_shapes(sizes)}
        found = {key: tuple(value.shape) for key, value in memory.items()}
        for key in sorted(wanted.keys() | found.keys()):
            mine, its = (shapes.get(key, "missing") for shapes in (wanted, found))
            if mine != its:
                raise StateError(
                    f"The saved memory of layer {layer.name!r} does not fit this model: its {key!r} is "
                    f"{its}, and should be {mine}. It comes from another architecture, or from a rule with "
                    "other settings.",
                    see="state-memory",
                )


class _FindReplicas(ModelHook):
    """Forward pre-hook of the model: asks which data-parallel group it runs in."""

    def __init__(self, keeper: Keeper) -> None:
        self._look = torch.compiler.disable(keeper.find_replicas)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._look()


def _why_not_mine(
    rule: str, saved: list[Mapping[str, Any]] | None, entries: list[Mapping[str, Any]], layers: list[str]
) -> str:
    if not saved:
        return (
            f"The optimizer state to load holds no memory of {rule}: it was saved without the rule. To start "
            "the statistics anew, load it before attach()."
        )
    if not entries:
        others = ", ".join(sorted({str(entry["rule"]) for entry in saved}))
        return f"The optimizer state to load was saved with {others}, and the rule attached is {rule}."
    theirs = entries[0]["layers"].keys()
    missing = [name for name in layers if name not in theirs]
    extra = [name for name in theirs if name not in layers]
    parts = [
        f"{what} {', '.join(map(repr, names[:4]))}{' ...' if len(names) > 4 else ''}"
        for what, names in (("it lacks", missing), ("it also has", extra))
        if names
    ]
    return f"The saved memory of {rule} is of another model: {'; '.join(parts)}."


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _zeros(shapes: "Shapes", layer: LayerShape) -> dict[str, Tensor]:
    return {key: torch.zeros(shape, dtype=layer.dtype, device=layer.device) for key, shape in shapes.items()}


def _mark(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _still_there(gradient: Tensor | None, mark: tuple[int, int]) -> bool:
    """Whether what was accumulated in ``.grad`` is still in it (perhaps scaled or averaged since)."""
    return gradient is not None and (_mark(gradient) == mark or bool(gradient.any()))


def _added(one: "Evidence", two: "Evidence") -> "Evidence":
    """The evidence of both; that of a step which gathers none is empty."""
    return {key: one[key] + two[key] for key in two} if one and two else one or two


def _like(memory: "Memory", evidence: Tensor) -> "Memory":
    """The memory where the evidence lives and in its dtype: models move between steps."""
    return {key: value.to(evidence) for key, value in memory.items()}
