"""A rule at work on a model: hooks, counters, and the answers given in backward."""

import math
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from plywise import health
from plywise.capture import LayerHook, install
from plywise.errors import AttachError, NonFiniteError, UncapturedLayerError
from plywise.explain import Explanation, LayerRow, Size
from plywise.graph import MARKED, energy_of, push_energy
from plywise.guard import StepGuard
from plywise.health import Health
from plywise.keeper import Keeper
from plywise.kept_layer import KeptLayer
from plywise.ply import Move, Ply
from plywise.routing import Route, plain_name

if TYPE_CHECKING:
    from plywise.memory import MemoryRule
    from plywise.rule import Observer, Rule


class Attachment:
    """A rule at work on a model: its hooks, its counters, and the answers given in backward.

    The model's hooks own it; it knows the model weakly, so nothing keeps the model alive.
    """

    def __init__(
        self,
        rule: "Rule",
        model: nn.Module,
        routes: list[tuple[nn.Module, Route]],
        optimizer: Optimizer | None,
        on_nonfinite: str,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.rule = rule
        self.health = Health()
        self.observers: list[Observer] = []
        self._title = f"{rule} on {type(model).__name__}"
        self._routes = [(weakref.ref(module), r) for module, r in routes]
        self._sizes: dict[str, Size] = {}
        self._answered: dict[str, int] = {}  # layer: the backward pass in which its rule answered
        self._raises = on_nonfinite == "raise"
        self._shrinks_in_backward = rule.shrinks() and optimizer is None
        self._shrinks_at_step = rule.shrinks() and optimizer is not None
        self._handles: list[RemovableHandle] = []
        self._guard: StepGuard | None = None
        self._keeper: Keeper | None = None
        try:
            if rule.remembers:
                assert optimizer is not None
                kept = [KeptLayer(r.name, r.kind, module) for module, r in routes if r.kind is not None]
                memory_rule = cast("MemoryRule", rule)
                self._keeper = Keeper(memory_rule, model, kept, optimizer, process_group, self.health)
            self._install(model, routes, optimizer, on_nonfinite)
        except BaseException:
            self.remove()
            raise

    def _install(
        self,
        model: nn.Module,
        routes: list[tuple[nn.Module, Route]],
        optimizer: Optimizer | None,
        on_nonfinite: str,
    ) -> None:
        layers_of: dict[nn.Parameter, list[str]] = {}
        for module, r in routes:
            if r.kind is not None:
                self._handles.append(install(module, LayerHook(r.name, r.kind, self)))
                weight = module._parameters[r.kind.weight_name]
                assert weight is not None
                layers_of.setdefault(weight, []).append(r.name)
        self._unwatched = {name: names for names in layers_of.values() for name in names}
        for weight, names in layers_of.items():
            self._watch(weight, names[0])
        marker: Any = self.rule.marker()
        if marker is not None:
            for module in model.modules():
                if isinstance(module, MARKED):
                    self._handles.append(module.register_forward_hook(marker, with_kwargs=True))
        if optimizer is not None:
            parameters = {id(p): plain_name(name) for name, p in model.named_parameters()}
            forget = None if self._keeper is None else self._keeper.forget_pending
            self._guard = StepGuard(
                optimizer, parameters, self.health, on_nonfinite, self._before_step, forget or (lambda: None)
            )

    def _watch(self, weight: nn.Parameter, name: str) -> None:
        """Watch gradients arrive in a weight; one that is frozen or lazy is watched once it is not."""
        if name not in self._unwatched or nn.parameter.is_lazy(weight) or not weight.requires_grad:
            return
        names = self._unwatched[name]
        for sharing in names:
            del self._unwatched[sharing]
        arrival: Any = _Arrival(self._answered, names, self._keeper)
        self._handles.append(weight.register_post_accumulate_grad_hook(arrival))

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._guard is not None:
            self._guard.remove()
        if self._keeper is not None:
            self._keeper.remove()

    # ---- the listener of the layers' hooks ---------------------------------------------------

    def make_ply(self, node: Any, a: Tensor, delta: Tensor, weight: Tensor) -> Ply:
        """The local problem of the layer behind ``node``."""
        hook: LayerHook = node.hook
        energy = torch.as_tensor(energy_of(node)) if self.rule.needs_energy else None
        has_bias = node.has_bias and (self._keeper is None or self._keeper.has_bias(hook.name))
        ply = Ply(hook.name, hook.kind, node.module, a, delta, weight, has_bias, self.health, energy)
        self._sizes[ply.name] = Size(ply.row_count, ply.columns, ply.outputs, ply.groups)
        if energy is not None:
            push_energy(node, energy * self.rule.matching_scalar(ply))
        if hook.name in self._unwatched:
            self._watch(node.module._parameters[hook.kind.weight_name], hook.name)
        if self._keeper is not None:
            like = torch.empty(0, dtype=ply.dtype, device=delta.device)
            ply.memory, ply.waits = self._keeper.recall(ply.name, like)
        return ply

    def answer(self, ply: Ply, wants_move: bool, wants_below: bool) -> tuple[Move, Tensor | None]:
        """The rule's two answers for a layer."""
        move = Move(None, None)
        if wants_move:
            empty = ply.a.numel() == 0 or ply.delta.numel() == 0
            move = ply.gradient() if empty else self.rule.move(ply)
            if self._shrinks_in_backward and move.weight is not None:
                factor = self.rule.shrink(ply.weight, move.weight)
                move = move if factor == 1 else move.scaled(factor, factor)
            self._answered[ply.name] = torch._C._current_graph_task_id()
            if self._keeper is not None:
                self._keeper.stage(ply)
            if self._raises:
                self._check_finite(ply, move)
        below = self.rule.below(ply) if wants_below else None
        for observer in self.observers:
            observer(ply, move, below)
        return move, below

    def _check_finite(self, ply: Ply, move: Move) -> None:
        for part in (move.weight, move.bias):
            if part is not None and not math.isfinite(part.sum()) and not bool(torch.isfinite(part).all()):
                self.health.note(ply.name, health.NON_FINITE)
                where = "rule's own answer"
                for tensor, name in ((ply.delta, "gradient at its output"), (ply.a, "input")):
                    where = where if bool(torch.isfinite(tensor).all()) else name
                raise NonFiniteError(
                    f"Layer {ply.name!r}: the {where} is not finite (NaN or infinity), so its move would "
                    "poison the weights. Look at the batch, the rate and the loss scale; attach(model, "
                    "optimizer) skips such steps, on_nonfinite='propagate' lets them pass (for a GradScaler)."
                )

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._keeper is not None:
            self._keeper.settle(optimizer)
        if self._shrinks_at_step:
            self._shrink(optimizer)

    def _shrink(self, optimizer: Optimizer) -> None:
        loss_scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales in its step
        factors: dict[int, float] = {}  # one for a weight, though two layers may share it
        for ref, r in self._routes:
            module = ref()
            if r.kind is None or module is None:
                continue
            weight = module._parameters.get(r.kind.weight_name)
            bias = module._parameters.get(r.kind.bias_name)
            if weight is None or weight.grad is None:
                continue
            parts = [bias]
            if id(weight) not in factors:
                move = weight.grad if loss_scale is None else weight.grad / loss_scale
                factors[id(weight)] = self.rule.shrink(weight.detach(), move)
                parts.append(weight)
            for part in parts:
                if factors[id(weight)] < 1 and part is not None and part.grad is not None:
                    part.grad.mul_(factors[id(weight)])

    # ---- the table ---------------------------------------------------------------------------

    def explain(self, batch_size: int) -> Explanation:
        """See `Rule.explain`."""
        rows = []
        for ref, r in self._routes:
            module = ref()
            if module is None:
                raise AttachError("The model that this rule was attached to is gone.")
            rows.append(self._row(module, r, batch_size))
        return Explanation(self._title, rows)

    def _row(self, module: nn.Module, r: Route, batch_size: int) -> LayerRow:
        events, name, type_name = self.health.of(r.name), r.name, type(module).__name__
        weight = None if r.kind is None else module._parameters.get(r.kind.weight_name)
        if r.kind is None or weight is None:
            reason = r.reason if r.kind is None else "its weight has become a parametrization since"
            return left_to_optimizer(module, name, reason, events)
        size = self._sizes.get(name)
        frozen = "" if weight.requires_grad else " (frozen: it only passes the backward value down)"
        if nn.parameter.is_lazy(weight):
            treatment = self.rule.treatment(None) + frozen
            return LayerRow(name, type_name, "lazy", True, treatment, r.reason, None, None, events)
        if size is None and weight.dim() == 2:
            has_bias = getattr(module, r.kind.bias_name) is not None
            size = Size(batch_size, weight.shape[1] + has_bias, weight.shape[0], 1)
        memory = cost = None
        if size is not None:
            flops, floats = self.rule.price(size)
            memory, cost = floats * max(weight.element_size(), 4), flops / size.plain
        treatment = self.rule.treatment(size) + frozen
        shape = "×".join(str(size) for size in weight.shape)
        return LayerRow(name, type_name, shape, True, treatment, r.reason, memory, cost, events)


def left_to_optimizer(module: nn.Module, name: str, reason: str, events: dict[str, int]) -> LayerRow:
    """The line of a layer that no rule handles."""
    own = [p for p in module._parameters.values() if p is not None and not nn.parameter.is_lazy(p)]
    shape = ", ".join("×".join(str(size) for size in p.shape) for p in own[:2])
    type_name, left = type(module).__name__, "left to the optimizer"
    return LayerRow(name, type_name, shape, False, left, reason, None, None, events)


class _Arrival:
    """Hook of a weight: when a gradient has arrived, its layer's rule must have answered in this pass."""

    def __init__(self, answered: dict[str, int], names: list[str], keeper: Keeper | None) -> None:
        self._answered = answered
        self._names = names
        self._keeper = keeper

    def __call__(self, weight: Tensor) -> None:
        this_pass = torch._C._current_graph_task_id()
        if all(self._answered.get(name) != this_pass for name in self._names):
            raise UncapturedLayerError(
                f"The weight of layer {self._names[0]!r} got a gradient that did not pass through the rule. "
                "Likely causes: torch.compile ran the model before attach() (attach first, or call "
                "torch.compiler.reset()), the forward ran before attach(), the layer's .forward() was called "
                "directly, its weight was parametrized since or is used outside the layer, or a hook added "
                "since runs before the rule's. If that is meant, "
                f"leave the layer to the optimizer: attach(..., exclude={self._names[0]!r})."
            )
        if self._keeper is not None:
            self._keeper.arrived(self._names[0])  # a rule with memory takes no shared weights
