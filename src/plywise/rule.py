"""The contract of a rule: two answers for a layer, and attach, detach, explain.

A rule is a frozen dataclass of hyper-parameters with the mathematics of one paper. It answers two
questions for every layer in every backward pass: how do the weights move (`Rule.move`), and what does
the layer below hear (`Rule.below`)? Everything else is here, once.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from plywise import convolution as _convolution  # noqa: F401  (registers Conv1d, Conv2d, Conv3d)
from plywise import health
from plywise.capture import LayerHook, ModelHook, install
from plywise.errors import AttachError, NonFiniteError, UncapturedLayerError
from plywise.explain import Explanation, LayerRow
from plywise.graph import MARKED, energy_of, push_energy
from plywise.guard import StepGuard
from plywise.health import Health
from plywise.ply import Move, Ply
from plywise.routing import Route, Selector, plain_name, route

Observer = Callable[[Ply, Move, Tensor | None], None]


@dataclass(frozen=True)
class Size:
    """Sizes of one layer's problem: ``n`` rows, ``d`` inputs (with bias), ``m`` outputs, ``g`` groups."""

    n: int
    d: int
    m: int
    g: int

    @property
    def plain(self) -> float:
        """Floating-point operations of the layer's forward and backward."""
        return 6.0 * self.g * self.n * self.d * self.m

    @property
    def exact_solve(self) -> float:
        """Operations of a Gram's lower half, its inverse, and the product with it."""
        k = min(self.n, self.d)
        gram = k * k * max(self.n, self.d)
        other = self.m if self.n > self.d else min(self.d, self.m)
        return float(self.g * (gram + k**3 + 2 * k * k * other))


class Rule(ABC):
    """A training rule: how each layer moves and what the layer below hears.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True)``) that implement `move`, and `below`
    if the layer below shall hear something else than backpropagation's ``ΔW``. Both are pure
    functions of a `Ply` and linear in ``ply.delta``, so that gradient accumulation, GradScaler and DDP
    keep their meaning.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, plywise as pw
        >>> @dataclass(frozen=True, eq=False)
        ... class HalfSpeed(pw.Rule):
        ...     '''Backpropagation at half the rate.'''
        ...     def move(self, ply):
        ...         return ply.gradient().scaled(0.5, 0.5)
        >>> model = torch.nn.Linear(3, 1)
        >>> rule = HalfSpeed().attach(model)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad
        tensor([[0.5000, 0.5000, 0.5000]])
        >>> rule.detach()
    """

    needs_energy: ClassVar[bool] = False
    """Whether `Ply.energy` is to be filled in (see `plywise.graph`)."""

    @abstractmethod
    def move(self, ply: Ply) -> Move:
        """How the layer's weight and bias move; takes the place of their gradients."""

    def below(self, ply: Ply) -> Tensor:
        """What the layer below hears; takes the place of the gradient at the layer's input."""
        return ply.below()

    def heard(self, ply: Ply) -> Tensor:
        """The backward value at the layer's output in the rule's own units (for diagnostics)."""
        return ply.delta

    def matching_scalar(self, ply: Ply) -> Tensor | float:
        """The scalar of this layer in the product that is `Ply.energy` for the layers below."""
        return 1.0

    def marker(self) -> ModelHook | None:
        """A forward hook for modules between layers (batch norm, average pooling, dropout), if any."""
        return None

    def shrink(self, weight: Tensor, move: Tensor) -> float:
        """Factor in (0, 1] for a layer's accumulated move, e.g. a cap relative to ``weight``.

        Not linear in Δ, so it acts once, on the accumulated ``.grad`` before the optimizer's step; on
        each backward's move only if the rule was attached without the optimizer.
        """
        return 1.0

    @abstractmethod
    def price(self, size: Size) -> tuple[float, float]:
        """Extra floating-point operations and extra floats held while a layer's backward runs."""

    def treatment(self) -> str:
        """What `explain` says of a handled layer; the rule's name by default."""
        return type(self).__name__

    def __str__(self) -> str:
        settings = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({settings})"

    # ---- attaching -----------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        layers: Selector | None = None,
        exclude: Selector | None = None,
        on_nonfinite: Literal["skip", "raise", "propagate"] | None = None,
    ) -> Self:
        """Put this rule to work on ``model``; from now on ``backward()`` leaves its moves in ``.grad``.

        The model is not changed: no wrapper, no attribute, the same ``state_dict``. The rule lives as long
        as the model (or until `detach`), whether or not the returned handle is kept.

        Args:
            model: any model; layers that the rule cannot handle are left to the optimizer (`explain`).
            optimizer: the optimizer that steps the model. With it, steps with non-finite gradients are
                skipped, and what a rule does to accumulated gradients is done once, before the step.
            layers: handle only these: a name pattern (``"encoder.*"``), a module type, a
                ``predicate(name, module)``, or a list of such. Default: all that the rule can handle.
            exclude: leave these to the optimizer, in the same form.
            on_nonfinite: what to do with NaN or infinity in a gradient: ``"skip"`` the step (the default
                with an optimizer), ``"raise"`` (the default without), or ``"propagate"`` it as torch does.

        Returns:
            The rule itself.

        Raises:
            AttachError: the rule is attached already, the model has no layer for it, a pattern matches
                nothing, another rule handles a layer, or the optimizer steps none of the model's parameters.
        """
        if getattr(self, "_attachment", None) is not None:
            raise AttachError(f"{self} is attached already. Call detach() first, or make a second rule.")
        if on_nonfinite is None:
            on_nonfinite = "raise" if optimizer is None else "skip"
        if on_nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"on_nonfinite must be 'skip', 'raise' or 'propagate', not {on_nonfinite!r}.")
        if on_nonfinite == "skip" and optimizer is None:
            raise ValueError(
                "on_nonfinite='skip' needs the optimizer whose steps it skips: attach(model, optimizer)."
            )
        routes = route(model, layers, exclude)
        if not any(r.kind for r in routes):
            reasons = "; ".join(f"{r.name!r}: {r.reason}" for r in routes[:6]) or "it has no parameters"
            raise AttachError(
                f"{type(self).__name__} finds no layer to handle in this {type(model).__name__} ({reasons}). "
                "It handles Linear and Conv1d/2d/3d; teach it others with plywise.register_layer."
            )
        if optimizer is not None:
            _check_optimizer(model, optimizer)
        object.__setattr__(self, "_attachment", Attachment(self, model, routes, optimizer, on_nonfinite))
        return self

    def detach(self) -> None:
        """Take the rule off its model and optimizer; nothing of it is left. Harmless if not attached."""
        attachment = getattr(self, "_attachment", None)
        if attachment is not None:
            attachment.remove()
            object.__setattr__(self, "_attachment", None)

    def explain(self, batch_size: int = 128) -> Explanation:
        """One row for each layer: what happens to it, why, its memory and cost.

        Args:
            batch_size: rows assumed for layers that have not seen a batch yet (linear layers only).

        Raises:
            AttachError: the rule is not attached.
        """
        return self._attached().explain(batch_size)

    @property
    def health(self) -> Health:
        """Counts of fallbacks and skipped steps since the rule was attached."""
        return self._attached().health

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(ply, move, below)`` for each layer in each backward pass inside the block."""
        observers = self._attached().observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)

    def _attached(self) -> "Attachment":
        attachment: Attachment | None = getattr(self, "_attachment", None)
        if attachment is None:
            raise AttachError(f"{self} is not attached to a model. Call attach(model, optimizer) first.")
        return attachment

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled rule is its hyper-parameters
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


class Attachment:
    """A rule at work on a model: its hooks, its counters, and the answers given in backward.

    The model's hooks own it; it knows the model weakly, so nothing keeps the model alive.
    """

    def __init__(
        self,
        rule: Rule,
        model: nn.Module,
        routes: list[Route],
        optimizer: Optimizer | None,
        on_nonfinite: str,
    ) -> None:
        self.rule = rule
        self.health = Health()
        self.observers: list[Observer] = []
        self._title = f"{rule} on {type(model).__name__}"
        self._routes = [(weakref.ref(r.module), r) for r in routes]
        self._routes = [(ref, Route(r.name, None, r.kind, r.reason)) for ref, r in self._routes]  # type: ignore[arg-type]
        self._sizes: dict[str, Size] = {}
        self._answered: set[str] = set()
        self._raises = on_nonfinite == "raise"
        limits = type(rule).shrink is not Rule.shrink
        self._limits_in_backward = limits and optimizer is None
        self._limits_at_step = limits and optimizer is not None
        self._handles: list[RemovableHandle] = []
        self._guard: StepGuard | None = None
        try:
            self._install(model, routes, optimizer, on_nonfinite)
        except BaseException:
            self.remove()
            raise

    def _install(
        self, model: nn.Module, routes: list[Route], optimizer: Optimizer | None, on_nonfinite: str
    ) -> None:
        weights: dict[int, tuple[nn.Parameter, list[str]]] = {}
        for r in routes:
            if r.kind is not None:
                self._handles.append(install(r.module, LayerHook(r.name, r.kind, self)))
                weight = r.module._parameters[r.kind.weight_name]
                assert weight is not None
                weights.setdefault(id(weight), (weight, []))[1].append(r.name)
        for weight, names in weights.values():
            if weight.requires_grad:
                self._handles.append(
                    weight.register_post_accumulate_grad_hook(_Arrival(self._answered, names))
                )
        marker = self.rule.marker()
        if marker is not None:
            for module in model.modules():
                if isinstance(module, MARKED):
                    self._handles.append(module.register_forward_hook(marker, with_kwargs=True))
        if optimizer is not None:
            names = {id(p): plain_name(name) for name, p in model.named_parameters()}
            self._guard = StepGuard(optimizer, names, self.health, on_nonfinite, self._before_step)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._guard is not None:
            self._guard.remove()

    # ---- the listener of the layers' hooks ---------------------------------------------------

    def make_ply(self, node: Any, a: Tensor, delta: Tensor, weight: Tensor) -> Ply:
        """The local problem of the layer behind ``node``."""
        hook: LayerHook = node.hook
        energy = torch.as_tensor(energy_of(node)) if self.rule.needs_energy else None
        ply = Ply(hook.name, hook.kind, node.module, a, delta, weight, node.has_bias, self.health, energy)
        self._sizes[ply.name] = Size(ply.row_count, ply.columns, ply.outputs, ply.groups)
        if energy is not None:
            push_energy(node, energy * self.rule.matching_scalar(ply))
        return ply

    def answer(self, ply: Ply, wants_move: bool, wants_below: bool) -> tuple[Move, Tensor | None]:
        """The rule's two answers for a layer."""
        move = Move(None, None)
        if wants_move:
            empty = ply.a.numel() == 0 or ply.delta.numel() == 0
            move = ply.gradient() if empty else self.rule.move(ply)
            if self._limits_in_backward and move.weight is not None:
                factor = self.rule.shrink(ply.weight, move.weight)
                move = move if factor == 1 else move.scaled(factor, factor)
            self._answered.add(ply.name)
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
                where = "input" if not bool(torch.isfinite(ply.a).all()) else "gradient at its output"
                raise NonFiniteError(
                    f"Layer {ply.name!r}: the {where} is not finite (NaN or infinity), so its move would "
                    "poison the weights. Look at the batch, the rate and the loss scale; attach(model, optimizer) "
                    "skips such steps, on_nonfinite='propagate' lets them pass (for a GradScaler)."
                )

    def _before_step(self) -> None:
        for ref, r in self._routes:
            module = ref()
            if not self._limits_at_step or r.kind is None or module is None:
                continue
            weight = module._parameters[r.kind.weight_name]
            bias = module._parameters.get(r.kind.bias_name)
            if weight is not None and weight.grad is not None:
                factor = self.rule.shrink(weight.detach(), weight.grad)
                for part in (weight, bias):
                    if factor < 1 and part is not None and part.grad is not None:
                        part.grad.mul_(factor)

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
        shape, memory, cost, treatment = "", None, None, "left to the optimizer"
        if r.kind is not None:
            treatment = self.rule.treatment()
            weight: Any = module._parameters[r.kind.weight_name]
            if nn.parameter.is_lazy(weight):
                shape = "lazy"
            else:
                shape = "×".join(str(size) for size in weight.shape)
                size = self._sizes.get(r.name)
                if size is None and weight.dim() == 2:
                    has_bias = getattr(module, r.kind.bias_name) is not None
                    size = Size(batch_size, weight.shape[1] + has_bias, weight.shape[0], 1)
                if size is not None:
                    flops, floats = self.rule.price(size)
                    memory, cost = floats * max(weight.element_size(), 4), flops / size.plain
                if not weight.requires_grad:
                    treatment += " (frozen: it only passes the backward value down)"
        else:
            own = [p for p in module._parameters.values() if p is not None and not nn.parameter.is_lazy(p)]
            shape = ", ".join("×".join(str(size) for size in p.shape) for p in own[:2])
        events = self.health.of(r.name)
        return LayerRow(
            r.name,
            type(module).__name__,
            shape,
            r.kind is not None,
            treatment,
            r.reason,
            memory,
            cost,
            events,
        )


class _Arrival:
    """Hook of a weight: when a gradient has arrived, its layer's rule must have answered."""

    def __init__(self, answered: set[str], names: list[str]) -> None:
        self._answered = answered
        self._names = names

    def __call__(self, weight: Tensor) -> None:
        if self._answered.isdisjoint(self._names):
            raise UncapturedLayerError(
                f"The weight of layer {self._names[0]!r} got a gradient that did not pass through the rule. "
                "Likely causes: torch.compile ran the model before attach() (attach first, or call "
                "torch.compiler.reset()), the forward ran before attach(), the layer's .forward() was called "
                "directly, or its weight is used outside the layer. If that is meant, leave the layer to the "
                f"optimizer: attach(..., exclude={self._names[0]!r})."
            )
        self._answered.difference_update(self._names)


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise AttachError(
            f"attach needs a torch.optim.Optimizer as second argument, not {type(optimizer).__name__}."
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in stepped for p in model.parameters()):
        raise AttachError(
            "The optimizer steps none of this model's parameters. Give attach() the optimizer that was made "
            "from model.parameters(), and attach after moving or replacing parameters."
        )


def require_positive(owner: object, **values: float) -> None:
    """Raise ValueError for any value that is not a finite number above zero."""
    for name, value in values.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
            raise ValueError(
                f"{type(owner).__name__}: {name} must be a finite number above 0, not {value!r}."
            )


def require_choice(owner: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be one of {', '.join(map(repr, choices))}, not {value!r}."
        )
