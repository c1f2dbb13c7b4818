"""The contract of a rule: pure functions. `plywise.engine.rule` attaches rules."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from plywise.engine.answers import check_finish, read_settings
from plywise.engine.call import LinearCall, Update
from plywise.engine.explain import Size
from plywise.engine.health import Health
from plywise.engine.selection import MATRICES

State = Mapping[str, Tensor]
"""What one layer's running state holds, tensors by name; empty at first. Part of the optimizer's state."""

Evidence = dict[str, Tensor]
"""What one backward pass gathers for a layer: sums, which can be added over micro-batches and processes.

``"rows"`` counts what was summed (a 0-dimensional tensor); evidence of no rows is not learned.
"""

ROUNDING_ERROR = "plywise.rounding_error"
"""The name under which `StatefulContract.learn` may return the relative error of a step's update."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensors by name: their shapes."""


@dataclass(frozen=True)
class LayerShape:
    """One layer's sizes, and where its statistics live.

    Attributes:
        groups: independent linear maps side by side, g.
        outputs: outputs of one group, m.
        columns: inputs of one group with the bias's column, k.
        dtype: dtype of statistics, float32 at least.
        device: the weight's device.
    """

    groups: int
    outputs: int
    columns: int
    dtype: torch.dtype
    device: torch.device


RENAMED = {
    "move": "update",
    "below": "input_gradient",
    "heard": "backward_value",
    "needs_energy": "needs_backward_scale",
    "shrinks": "clips_updates",
    "price": "estimate_cost",
    "treatment": "describe",
}
"""Methods of rules written for plywise 0.1, and what they are called now."""


class RuleContract(ABC):
    """What a rule computes; see `plywise.Rule`, which adds attaching."""

    kinds: ClassVar[tuple[str, ...]] = MATRICES
    """The kinds of linear maps that the rule takes unless ``attach(kinds=...)`` says otherwise."""

    needs_backward_scale: ClassVar[bool] = False
    """Whether `LinearCall.energy` is to be measured (see `plywise.engine.backward_scale`)."""

    measure_every: int = 10
    """Steps from one measurement of the backward scale to the next."""

    remembers: ClassVar[bool] = False
    """Whether layers keep a running state between steps (`StatefulContract`)."""

    @property
    def takes_unshared_only(self) -> bool:
        """Whether weights that are computed, or used in several ways, are left to the optimizer."""
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "shrink" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__}.shrink(weight, update) is clip_update(weight_norm, update_norm) since "
                "plywise 0.2: it gets the norms of all layers at once and returns a tensor of factors."
            )
        for old, new in RENAMED.items():
            if old in cls.__dict__ and new not in cls.__dict__:
                warnings.warn(
                    f"{cls.__name__}.{old} is called {new} since plywise 0.2: rename it.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                setattr(cls, new, cls.__dict__[old])

    @abstractmethod
    def update(self, call: LinearCall) -> Update:
        """Return the update of the layer's weight and bias, which replaces their gradients."""

    def input_gradient(self, call: LinearCall) -> Tensor:
        """Return the value for the layer below, which replaces the gradient at the call's input."""
        return call.input_gradient()

    def backward_value(self, call: LinearCall) -> Tensor:
        """Return the backward value at the layer's output in the rule's own units (for diagnostics)."""
        return call.delta

    @property
    def alters_backward(self) -> bool:
        """Whether `input_gradient` may differ from backpropagation's ``ΔW``."""
        return type(self).input_gradient is not RuleContract.input_gradient

    def module_hook(self) -> Any:
        """Return a forward hook for modules between layers (its ``types``), or None."""
        return None

    def clip_update(self, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """Return factors in (0, 1] for layers' accumulated updates, e.g. a cap relative to their weights.

        It is not linear in Δ, so it acts once, on the accumulated ``.grad``, before the optimizer's step.
        Only a rule that was attached without the optimizer applies it to each backward's update. Compute
        elementwise, and read no number from the tensors: that would wait for the device.

        Args:
            weight_norm: the Frobenius norms of weights, (layers,) or ().
            update_norm: those of their updates.
        """
        return torch.ones_like(update_norm)

    def clips_updates(self) -> bool:
        """Return whether `clip_update` does anything."""
        return type(self).clip_update is not RuleContract.clip_update

    def estimate_cost(self, size: Size) -> tuple[float, float]:
        """Return the extra floating-point operations and floats held while a layer's backward runs.

        Only `explain` reads them. By default both are NaN, and `explain` says that they are unknown.
        """
        return math.nan, math.nan

    def describe(self, size: Size | None) -> str:
        """Return what `explain` says of a handled layer of this size; the rule's name by default."""
        return type(self).__name__

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in read_settings(self).items())
        return f"{type(self).__name__}({settings})"


class Turn(Protocol):
    """Other coordinates of layers of one shape, for matrices (n, m, k) with n = layers · groups."""

    @property
    def keeps_rows_apart(self) -> bool:
        """Whether some rows of a matrix can be turned without the others."""

    def turn(self, x: Tensor, out: Tensor) -> Tensor:
        """Put the gradients in other coordinates into ``out``; ``x`` may be overwritten."""

    def turn_back(self, x: Tensor, out: Tensor) -> Tensor:
        """Put the optimizer's steps as steps of the weights into ``out``; ``x`` may be overwritten."""

    def solve(self, x: Tensor) -> Tensor:
        """Compute the gradients of which `turn` has made ``x``."""


class StatefulContract(RuleContract):
    """What a rule with a running state computes in addition; see `plywise.StatefulRule`."""

    remembers: ClassVar[bool] = True

    stats_every: int = 1
    """Steps from one gathering of evidence to the next."""

    refresh_every: int = 1
    """Steps from one refresh to the next, a multiple of ``stats_every``."""

    refreshes_together: bool = False
    """Whether all layers refresh in the steps 0, ``refresh_every``, ..., and in no others.

    By default they take turns in a cycle, and in the first cycle each gathering refreshes.
    """

    slowdown: int = 1
    """Both intervals grow with the square root of the steps taken, until they are so many times as long."""

    acts_at_step: ClassVar[bool] = False
    """Whether the step makes the updates of layers that do not act `in_backward`.

    Forward and backward of such a layer are then left to autograd in steps that gather nothing, and its state
    changes only in steps that gather or refresh.
    """

    @property
    def keeps_norm(self) -> bool:
        """Whether updates made at the step get the norms of their gradients; ``"scale"`` is the factor."""
        return False

    acts_alone: ClassVar[bool] = False
    """Whether `update` makes the whole update where ``call.waits`` is false, from the memory at hand. Then
    the rule can handle weights that are computed (weight norm, pruning) or used in several ways. The step has
    no gradient of such a single use, so backward makes the update in every step, from what was learned
    before. In the first step a rule that `acts_at_step` learns from the call itself.
    """

    @property
    def takes_unshared_only(self) -> bool:
        """Whether weights that are computed, or used in several ways, are left to the optimizer."""
        return not self.acts_alone

    later_statistics: ClassVar[frozenset[str]] = frozenset()
    """Statistics that earlier versions did not have. In states that these saved, they are missing."""

    turns_steps: ClassVar[bool] = False
    """Whether the optimizer works in other coordinates: its steps have to be turned back."""

    def make_turn(self, memory: State) -> Turn | None:
        """Return the turn of layers of one shape, for a rule that `turns_steps`; None leaves them alone.

        Made when the states change, and used until they do again.

        Args:
            memory: the layers' states, each tensor with a first dimension for the layers.
        """
        raise NotImplementedError(f"{type(self).__name__} turns no steps")

    def turn_momentum(self, before: State, after: State, momentum: Tensor) -> Tensor:
        """Turn a momentum (g, m, k) from one state's axes to another's, for a rule that `turns_steps`."""
        raise NotImplementedError(f"{type(self).__name__} turns no steps")

    def turn_squares_back(self, state: State, squares: Tensor) -> Tensor:
        """Turn means of squares (g, m, k) back to the weights' coordinates, for a rule that `turns_steps`."""
        raise NotImplementedError(f"{type(self).__name__} turns no steps")

    @abstractmethod
    def gather(self, call: LinearCall, turn: int) -> Evidence:
        """Return this backward pass's evidence of the layer; ``turn`` counts the gatherings so far."""

    @abstractmethod
    def evidence_shapes(self, shape: LayerShape) -> Shapes:
        """Return the names and shapes of a layer's evidence."""

    @abstractmethod
    def learn(self, memory: State, evidence: Evidence) -> State:
        """Return what this evidence changes in the state; it must be cheap, for every process does it.

        The evidence belongs to the rule from here on, which may change its tensors in place.
        It may also return, under the key `ROUNDING_ERROR`, the relative error that rounding may have made in
        this step's update, a scalar. That is not a state: the engine counts the update if the error is large.
        """

    @abstractmethod
    def learned_shapes(self, shape: LayerShape) -> Shapes:
        """Return the names and shapes of what `learn` returns."""

    def refresh(self, memory: State, name: str, health: Health) -> State:
        """Do the expensive part of learning, on one process for all; return some of `refreshed_shapes`."""
        return {}

    def measure_residual(self, memory: State) -> Tensor | None:
        """Return the error of the last refresh for the present statistics: 0 if exact, None if unknown.

        For telemetry (`plywise.Rule.record`): it should cost much less than a refresh.
        """
        return None

    def refreshed_shapes(self, shape: LayerShape) -> Shapes:
        """Return the names and shapes of what `refresh` returns."""
        return {}

    def refresh_cost(self, shape: LayerShape) -> float:
        """Return what `refresh` costs for a layer, in any unit; processes and steps share the work by it."""
        return 0.0

    def in_backward(self, memory: State, shape: LayerShape) -> bool:
        """Return whether, between refreshes, backward itself makes the update."""
        return False

    def finish(self, memory: State, gradient: Update, groups: int) -> tuple[Update, State]:
        """Make the update from the gradient, at the step; return it and what changes in the state.

        Called in every step that refreshes, and in the others unless the rule acts `in_backward`.
        """
        return gradient, {}

    def measure_amplification(self, memory: State) -> Tensor | None:
        """Return how `finish_stacked` multiplies rounding errors of gradients on average, one for each layer.

        The engine counts updates in which they may be more than a ten thousandth. None if this is not known.

        Args:
            memory: the layers' states, each tensor with a first dimension for the layers.
        """
        return None

    def finish_stacked(self, memory: State, gradients: Tensor) -> tuple[Tensor, State]:
        """Finish layers of one shape, as `finish` does; override it if one call can serve all of them.

        Args:
            memory: the layers' states, each tensor with a first dimension for the layers.
            gradients: (layers, g, m, k), the bias's column last; it may be overwritten.

        Returns:
            The updates, and what changes in the states, shaped alike.
        """
        updates, news, is_same = [], [], True
        for i, gradient in enumerate(gradients):
            state = {key: value[i] for key, value in memory.items()}
            groups, outputs, columns = gradient.shape
            weight = gradient.reshape(groups * outputs, columns)
            answer = self.finish(state, Update(weight, None), groups)
            check_finish(self, answer, weight)
            update, changed = answer
            is_same = is_same and update.weight is weight
            updates.append(update.matrix(groups))
            news.append(changed)
        return gradients if is_same else torch.stack(updates), {
            key: torch.stack([new[key] for new in news]) for key in news[0]
        }
