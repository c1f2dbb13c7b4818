"""The contract of a rule: two answers for a layer, and attach, detach, explain.

A rule is a frozen dataclass of hyper-parameters with the mathematics of one paper. It answers two
questions for every layer in every backward pass: how do the weights move (`Rule.move`), and what does
the layer below hear (`Rule.below`)? Everything else is here, once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from plywise import convolution as _convolution  # noqa: F401  (registers Conv1d, Conv2d, Conv3d)
from plywise.attachment import Attachment
from plywise.capture import ModelHook
from plywise.errors import AttachError
from plywise.explain import Explanation, Size
from plywise.health import Health
from plywise.ply import Move, Ply
from plywise.routing import Selector, route

__all__ = ["Observer", "Rule", "Size", "require_choice", "require_positive", "require_whole"]

Observer = Callable[[Ply, Move, Tensor | None], None]


class Rule(ABC):
    """A training rule: how each layer moves and what the layer below hears.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True)``) that implement `move`, and `below`
    if the layer below shall hear something else than backpropagation's ``ΔW``. Both are pure
    functions of a `Ply` and homogeneous in ``ply.delta`` (twice the Δ, twice the answer), so that loss scales
    keep their meaning. All are linear in it but those that search along it (conjugate gradients, the
    scalar "cauchy"); ProxProp's ``solver="cg_official"`` is neither.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, plywise as pw
        >>> @dataclass(frozen=True, eq=False)
        ... class HalfSpeed(pw.Rule):
        ...     '''Backpropagation at half the rate.'''
        ...     def move(self, ply):
        ...         return ply.gradient().scaled(0.5, 0.5)
        ...     def price(self, size):
        ...         return 0.0, 0.0
        >>> model = torch.nn.Linear(3, 1)
        >>> rule = HalfSpeed().attach(model)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad
        tensor([[0.5000, 0.5000, 0.5000]])
        >>> rule.detach()
    """

    needs_energy: ClassVar[bool] = False
    """Whether `Ply.energy` is to be filled in (see `plywise.graph`)."""

    remembers: ClassVar[bool] = False
    """Whether layers keep a memory between steps (`plywise.memory.MemoryRule`)."""

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

    def shrinks(self) -> bool:
        """Whether `shrink` does anything."""
        return type(self).shrink is not Rule.shrink

    @abstractmethod
    def price(self, size: Size) -> tuple[float, float]:
        """Extra floating-point operations and extra floats held while a layer's backward runs."""

    def treatment(self, size: Size | None) -> str:
        """What `explain` says of a handled layer of this size; the rule's name by default."""
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
        process_group: ProcessGroup | None = None,
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
            process_group: for a rule with memory, the processes that average their gradients; by default
                those of the `DistributedDataParallel` that the model runs in. Other rules need none.

        Returns:
            The rule itself.

        Raises:
            AttachError: the rule is attached already, the model has no layer for it, a pattern matches
                nothing, another rule handles a layer, or the optimizer steps none of the model's parameters.
        """
        if getattr(self, "_attachment", None) is not None:
            raise AttachError(
                f"{self} is attached already. Call detach() first, or make a second rule.", see="attach-twice"
            )
        if on_nonfinite is None:
            on_nonfinite = "raise" if optimizer is None else "skip"
        if on_nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"on_nonfinite must be 'skip', 'raise' or 'propagate', not {on_nonfinite!r}.")
        if on_nonfinite == "skip" and optimizer is None:
            raise ValueError(
                "on_nonfinite='skip' needs the optimizer whose steps it skips: attach(model, optimizer)."
            )
        if self.remembers and optimizer is None:
            raise AttachError(
                f"{type(self).__name__} keeps a running statistic and learns at the optimizer's step: "
                "attach(model, optimizer).",
                see="attach-optimizer",
            )
        if isinstance(model, DistributedDataParallel):
            model = model.module  # so that layers have the same names, and states fit, with and without it
        refuse_sharded(model)
        routes = route(model, layers, exclude, alone=self.remembers)
        if not any(r.kind for _, r in routes):
            reasons = "; ".join(f"{r.name!r}: {r.reason}" for _, r in routes[:6]) or "it has no parameters"
            raise AttachError(
                f"{type(self).__name__} finds no layer to handle in this {type(model).__name__} ({reasons}). "
                "It handles Linear and Conv1d/2d/3d; teach it others with plywise.register_layer.",
                see="attach-no-layer",
            )
        if optimizer is not None:
            check_optimizer(model, optimizer)
        attachment = Attachment(self, model, routes, optimizer, on_nonfinite, process_group)
        object.__setattr__(self, "_attachment", attachment)
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

    def _attached(self) -> Attachment:
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


def refuse_sharded(model: nn.Module) -> None:
    """Raise AttachError if a parameter is sharded over processes."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor, without importing it
            raise AttachError(
                f"Parameter {name!r} is sharded over processes (a DTensor, as fully_shard makes it): plywise "
                "needs a layer's whole weight and gradient. Train with DistributedDataParallel instead.",
                see="attach-sharded",
            )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise AttachError unless this is an optimizer that steps something of the model."""
    if not isinstance(optimizer, Optimizer):
        raise AttachError(
            f"attach needs a torch.optim.Optimizer as second argument, not {type(optimizer).__name__}.",
            see="attach-optimizer",
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in stepped for p in model.parameters()):
        raise AttachError(
            "The optimizer steps none of this model's parameters. Give attach() the optimizer that was made "
            "from model.parameters(), and attach after moving or replacing parameters.",
            see="attach-optimizer",
        )


def require_positive(owner: object, **values: float) -> None:
    """Raise ValueError for any value that is not a finite number above zero."""
    for name, value in values.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
            raise ValueError(
                f"{type(owner).__name__}: {name} must be a finite number above 0, not {value!r}."
            )


def require_whole(owner: object, **values: int) -> None:
    """Raise ValueError for any value that is not a whole number above zero."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be a whole number above 0, not {value!r}.")


def require_choice(owner: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be one of {', '.join(map(repr, choices))}, not {value!r}."
        )
