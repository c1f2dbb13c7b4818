"""The public base classes of rules, with attach, explain and detach."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from plywise._util.checks import (
    describe_kind,
    list_functions,
    require_choice,
    require_positive,
    require_whole,
)
from plywise._util.optimizers import list_parameters
from plywise.engine.answers import read_settings
from plywise.engine.attachment import Attachment
from plywise.engine.contract import RuleContract, State, StatefulContract
from plywise.engine.explain import Explanation, Size
from plywise.engine.health import Health
from plywise.engine.reports.history import History
from plywise.engine.reports.telemetry import Callback, Telemetry
from plywise.engine.responder import Observer
from plywise.engine.selection import KINDS, Kinds, Selector, resolve_kinds
from plywise.engine.sharding import find_shards
from plywise.errors import AttachError

__all__ = ["Observer", "Rule", "Size", "StatefulRule", "require_choice", "require_positive", "require_whole"]
"""What authors of rules need, with the checks of hyper-parameters."""


class Rule(RuleContract):
    """A training rule: the update of each layer, and the value sent to the layer below.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True, eq=False)``) that implement `update`, and
    `input_gradient` if the layer below must get something else than backpropagation's ``ΔW``. Both are pure
    functions of a `LinearCall` and homogeneous in ``call.delta`` (doubling Δ doubles the result), so that a
    loss scale can be divided out again. All are linear in it, except those that search along it (conjugate
    gradients, the scalar "cauchy"). ProxProp's ``solver="cg_official"`` is not even homogeneous.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, plywise as pw
        >>> @dataclass(frozen=True, eq=False)
        ... class HalfSpeed(pw.Rule):
        ...     '''Backpropagation at half the rate.'''
        ...     def update(self, call):
        ...         return call.gradient().scaled(0.5, 0.5)
        >>> model = torch.nn.Linear(3, 1)
        >>> rule = HalfSpeed().attach(model)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad
        tensor([[0.5000, 0.5000, 0.5000]])
        >>> rule.detach()
    """

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        layers: Selector | None = None,
        exclude: Selector | None = None,
        kinds: Kinds = None,
        on_nonfinite: Literal["skip", "raise", "propagate"] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Self:
        """Attach this rule to ``model``; from now on ``backward()`` leaves its updates in ``.grad``.

        The model is not changed: no wrapper, no attribute, the same ``state_dict``. The rule lives as long
        as the model (or until `detach`), whether or not the returned handle is kept.

        Args:
            model: any model; what the rule cannot handle is left to the optimizer (`explain`).
            optimizer: the optimizer that steps the model. With it, steps with non-finite gradients are
                skipped, and changes of accumulated gradients (a cap, an update from statistics) are made
                once, before the step.
            layers: handle only these: a pattern of the names of modules or parameters (``"encoder.*"``), a
                module type, a ``predicate(name, module)``, or a list of such. Default: all that the rule can
                handle. With an empty list it handles none, and only guards the optimizer's steps
                (``on_nonfinite``).
            exclude: leave these to the optimizer, in the same form.
            kinds: kinds of linear maps to handle: ``"linear"``, ``"conv"``, ``"experts"``, ``"bilinear"``,
                ``"embedding"``, ``"norm"``, several, or ``"all"``. Default: the rule's own, on its card; for
                most rules that is matrices, since on a transformer embeddings and norms brought no gain with
                Foof, and harm with ProxProp (benchmarks/README.md).
            on_nonfinite: what to do with NaN or infinity in a gradient: ``"skip"`` the step (the default
                with an optimizer), ``"raise"`` (the default without), or ``"propagate"`` it as torch does.
            process_group: for a rule with running state, the processes that average their gradients; by
                default those of the `DistributedDataParallel` that the model runs in. Other rules need none.

        Returns:
            The rule itself.

        Raises:
            AttachError: the rule's class is not a dataclass, the model is not a module or was scripted, the
                rule is attached already, the model has nothing for it, a pattern matches nothing or is not a
                pattern, another rule handles a layer, or the optimizer steps none of the model's parameters.
            ValueError: an option is none of those above.
        """
        _refuse_class(self)
        read_settings(self)  # a class that is not a dataclass is refused before anything else
        if self._attachment_or_none() is not None:
            raise AttachError(
                f"{self} is attached already. Call detach() first, or make a second rule.", see="attach-twice"
            )
        check_model(model)
        nonfinite = self._resolve_nonfinite(optimizer, on_nonfinite)
        if process_group is not None and not isinstance(process_group, ProcessGroup):
            raise AttachError(
                "process_group must be a torch.distributed.ProcessGroup, not "
                f"{type(process_group).__name__}.",
                see="attach-optimizer",
            )
        if isinstance(model, DistributedDataParallel):
            model = model.module  # so that layers have the same names, and states fit, with and without it
        # what is left to the optimizer would not get its gradient from altered values
        chosen = resolve_kinds(kinds, KINDS if self.alters_backward else self.kinds)
        if optimizer is not None and any(True for _ in model.parameters()):
            check_optimizer(model, optimizer)
        attachment = Attachment(self, model, chosen, layers, exclude, optimizer, nonfinite, process_group)
        object.__setattr__(self, "_attachment", attachment)
        object.__setattr__(self, "_health", attachment.health)
        return self

    def _resolve_nonfinite(self, optimizer: Optimizer | None, on_nonfinite: str | None) -> str:
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
        return on_nonfinite

    def detach(self) -> None:
        """Remove the rule from its model and optimizer, without a trace; harmless if it is not attached."""
        attachment = self._attachment_or_none()
        if attachment is not None:
            attachment.remove()
            object.__setattr__(self, "_attachment", None)

    def explain(self, batch_size: int = 128) -> Explanation:
        """Return a table: the share of parameters handled, and each map with reason, memory and cost.

        Args:
            batch_size: rows assumed for layers that have not seen a batch yet (linear layers only).

        Raises:
            AttachError: the rule is not attached.
            ValueError: ``batch_size`` is not a whole number above zero.
        """
        require_whole(self, batch_size=batch_size)
        return self._require_attached().explain(batch_size)

    @property
    def health(self) -> Health:
        """Counts of fallbacks and skipped steps since the rule was attached; kept after `detach`."""
        found: Health | None = getattr(self, "_health", None)
        return self._require_attached().health if found is None else found

    @property
    def statistics(self) -> dict[str, State]:
        """Each layer's running statistics by name, as they are in the optimizer's state."""
        return self._require_attached().read_states()

    def record(self, *, every: int = 50, callbacks: Iterable[Callback] = (), keep: int = 1000) -> History:
        """Measure each layer every ``every`` steps: rates, angles, residuals, fallbacks.

        The other steps cost nothing. A measured step costs about as much as two plain steps. A second call
        replaces the first.

        Args:
            every: number of steps from one measured step to the next; the first step is measured.
            callbacks: called with a `StepTelemetry` after each such step; `plywise.loggers` makes some for
                TensorBoard, Weights & Biases, MLflow, Trackio, Lightning and the Hugging Face Trainer.
            keep: how many measured steps stay in the history.

        Returns:
            The history, which `history` returns as well; its ``stop()`` ends the measuring.

        Raises:
            AttachError: the rule is not attached, or was attached without an optimizer.
            TypeError: ``callbacks`` is not a list of functions.
            ValueError: ``every`` or ``keep`` is not a whole number above zero.
        """
        require_whole(self, every=every, keep=keep)
        attachment = self._require_attached()
        if attachment.steps is None:
            raise AttachError(
                f"{type(self).__name__} was attached without an optimizer, whose steps are what is recorded: "
                "attach(model, optimizer).",
                see="attach-optimizer",
            )
        responder = attachment.responder
        history = History(
            list_functions(self, "callbacks", callbacks), keep, lambda: setattr(responder, "telemetry", None)
        )
        responder.telemetry = Telemetry(self, self.health, every, history.add, attachment.read_states)
        object.__setattr__(self, "_history", history)
        return history

    @property
    def history(self) -> History:
        """What `record` has measured so far; empty if it has not been called. Kept after `detach`."""
        found: History | None = getattr(self, "_history", None)
        return History() if found is None else found

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(call, update, below)`` for each call in each backward pass inside the block.

        Raises:
            AttachError: the rule is not attached.
            TypeError: ``observer`` is not a function.
        """
        if not callable(observer):
            raise TypeError(
                f"{type(self).__name__}: observer must be a function of (call, update, below), not "
                f"{describe_kind(observer)}."
            )
        observers = self._require_attached().responder.observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Plain autograd inside the block: saliency maps, adversarial inputs, inner loops of MAML.

        Forward passes that begin inside it are not captured. Statistics and counters stay as they are.
        """
        with self._require_attached().pause():
            yield

    def reset(self) -> None:
        """Forget running statistics and counters, as if the rule had just been attached."""
        self._require_attached().reset()

    def _attachment_or_none(self) -> Attachment | None:
        return getattr(self, "_attachment", None)

    def _require_attached(self) -> Attachment:
        attachment = self._attachment_or_none()
        if attachment is None:
            raise AttachError(f"{self} is not attached to a model. Call attach(model, optimizer) first.")
        return attachment

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled rule is its hyper-parameters
        return read_settings(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


class StatefulRule(StatefulContract, Rule):
    """A rule that keeps a running statistic of each layer; abstract.

    In backward it gathers *evidence*, sums over rows that add over micro-batches and processes
    (`gather`). If the optimizer's step happens, the rule learns from the evidence: a cheap part runs on every
    process (`learn`), and every ``refresh_every`` steps an expensive part runs on one process for all
    (`refresh`). Then the step makes the update from the gradient (`finish`), which is plain, whole and
    averaged by then. Where the rows, which only backward has, give a cheaper update (`in_backward`), backward
    makes it from the state (`update`, ``call.memory``), except in the steps that refresh. All methods are
    pure: they get the state and return what changes in it.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, plywise as pw
        >>> @dataclass(frozen=True, eq=False)
        ... class RunningNLMS(pw.StatefulRule):
        ...     '''Divide G by a running mean of the rows' squared norm.'''
        ...     decay: float = 0.9
        ...     def update(self, call):
        ...         return call.gradient()
        ...     def gather(self, call, turn):
        ...         norms = call.square_norms()
        ...         return {"rows": norms.new_tensor(float(norms.numel())), "squares": norms.sum()}
        ...     def evidence_shapes(self, shape):
        ...         return {"rows": (), "squares": ()}
        ...     def learned_shapes(self, shape):
        ...         return {"mean": ()}
        ...     def learn(self, memory, evidence):
        ...         mean = evidence["squares"] / evidence["rows"]
        ...         return {"mean": self.decay * memory.get("mean", mean) + (1 - self.decay) * mean}
        ...     def finish(self, memory, gradient, groups):
        ...         return gradient.scaled(1 / memory["mean"], 1 / memory["mean"]), {}
        ...     def estimate_cost(self, size):
        ...         return 2.0 * size.n * size.d, 1.0
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> rule = RunningNLMS().attach(model, optimizer)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.grad
        tensor([[0.2500, 0.2500, 0.2500]])
        >>> rule.detach()
    """


def _refuse_class(rule: object) -> None:
    """Raise AttachError if attach was called on a rule's class: Python then takes the model for the rule."""
    if not isinstance(rule, Rule):
        raise AttachError(
            f"attach was called on the class of a rule, with {describe_kind(rule)} in place of the rule. "
            "Make the rule first, with brackets, as in plywise.ProxProp().attach(model, optimizer).",
            see="attach-rule",
        )


def check_model(model: nn.Module, call: str = "attach(model, optimizer)") -> None:
    """Raise AttachError unless this is a module whose calls can be seen.

    Args:
        model: what was given as the model.
        call: how the function is called that it was given to, for the message.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"{call.partition('(')[0]} needs a torch.nn.Module as first argument, not "
            f"{describe_kind(model)}. Write {call} with the model itself, not its class or its parameters.",
            see="attach-no-layer",
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise AttachError(
            f"This {type(model).__name__} was scripted or traced (torch.jit): its calls do not pass through "
            "Python, where a rule sees them. Attach the rule to the model that it was made from.",
            see="attach-no-layer",
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise AttachError unless this is an optimizer that steps something of the model."""
    if not isinstance(optimizer, Optimizer):
        raise AttachError(
            f"attach needs a torch.optim.Optimizer as second argument, not {describe_kind(optimizer)}. Give "
            "it the object whose step() your loop calls, as torch.optim.SGD(model.parameters(), lr=0.1) is.",
            see="attach-optimizer",
        )
    if not all(hasattr(optimizer, name) for name in ("_optimizer_step_pre_hooks", "param_groups", "state")):
        raise AttachError(
            f"{type(optimizer).__name__} is a torch.optim.Optimizer by name only (its __init__ does not call "
            "that of Optimizer, as wrappers do): it has no hooks. Attach the rule to the optimizer that it "
            "wraps.",
            see="attach-optimizer",
        )
    stepped = set(map(id, list_parameters(optimizer)))
    shards = [source.sharded_param for source in find_shards(model).values()]
    if not any(id(p) in stepped for p in [*model.parameters(), *shards]):
        raise AttachError(
            "The optimizer steps none of this model's parameters. Give attach() the optimizer that was made "
            "from model.parameters(), and attach after moving or replacing parameters.",
            see="attach-optimizer",
        )
