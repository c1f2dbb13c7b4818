"""The base classes of local learners: step, predict, export, state. A method defines its components."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise._util.checks import list_functions
from plywise._util.modes import evaluating
from plywise._util.suggest import suggestion
from plywise.data.batches import Batch, count_samples, list_tensors, map_tensors
from plywise.data.reading import IGNORED
from plywise.data.training_data import cross_entropy as token_cross_entropy
from plywise.engine.explain import Explanations
from plywise.errors import AttachError, BlockError, DataError, StateError
from plywise.local.blocks import Blocks
from plywise.local.component import Component, Signal
from plywise.local.trainer import LocalTrainer, MakeOptimizer, MakeRule, MakeScheduler


@dataclass(frozen=True)
class Report:
    """What callbacks get after each step.

    Attributes:
        step: number of steps done.
        losses: the components' losses in this step, (K,).
    """

    step: int
    losses: Tensor


Callback = Callable[[Report], None]


class Learner(ABC):
    """A network in local training; abstract. Subclasses make the components and define a step.

    Args:
        components: the components, first to last.
        optimizer: makes one optimizer for each component from its parameter groups.
        scheduler: makes a scheduler for each optimizer; it steps after each step. Default none.
        rule: makes a rule, such as ``pw.Foof``, to act inside each component. Default none: plain gradients.
        callbacks: called with a `Report` after each step.
        seed: of the components' random numbers (dropout, noise). Default 0.

    Raises:
        BlockError: there is no component, or one is no `Component`.
        AttachError: no component has a layer that the rule handles. One without such a layer, among others,
            follows its plain gradients (`explain`).
        TypeError: ``optimizer``, ``scheduler`` or ``rule`` is not a function, ``callbacks`` is not a list of
            functions, or an argument is unknown.
    """

    def __init__(
        self,
        components: Iterable[Component],
        *,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        rule: MakeRule | None = None,
        callbacks: Iterable[Callback] = (),
        seed: int = 0,
        **unknown: object,
    ) -> None:
        _refuse_arguments(self, unknown)
        for name, make in (("optimizer", optimizer), ("scheduler", scheduler), ("rule", rule)):
            _require_maker(self, name, make)
        self.callbacks = list_functions(self, "callbacks", callbacks)
        self.steps = 0
        self.trainers = [
            LocalTrainer(component, index, optimizer, scheduler, rule, seed)
            for index, component in enumerate(_list_components(self, components))
        ]
        if rule is not None:
            self._check_rule()

    def _check_rule(self) -> None:
        """Raise AttachError if the rule is at work in no component that an optimizer steps."""
        stepped = [trainer for trainer in self.trainers if trainer.optimizer is not None]
        if not stepped or any(trainer.rule is not None for trainer in stepped):
            return
        rows = [(trainer.index, row) for trainer in stepped for row in trainer.explain().rows]
        reasons = "; ".join(f"{row.name!r} of component {index}: {row.reason}" for index, row in rows[:6])
        raise AttachError(
            f"The rule finds no layer to handle in any component ({reasons}). Rules handle calls of "
            "linear maps; teach them others with plywise.register_map, or leave the rule out.",
            see="attach-no-layer",
        )

    def explain(self, batch_size: int = 128) -> Explanations:
        """Return a table for each component: what happens to its layers, and why; ``print`` them.

        Args:
            batch_size: rows assumed for layers that have not seen a batch yet (linear layers only).
        """
        return Explanations(trainer.explain(batch_size) for trainer in self.trainers)

    def step(self, x: Batch, y: Tensor) -> Tensor:
        """Train every component on a batch.

        Args:
            x: inputs, a row a sample: a tensor, or tensors in any nesting where the learner takes such.
            y: targets.

        Returns:
            The local losses before the step, (K,), detached.

        Raises:
            PlywiseError: the batch is empty, or inputs and targets differ in number.
        """
        x, y = take_batch(x, y)
        for trainer in self.trainers:
            trainer.begin()
        losses = torch.stack(self._sweep(self.signal(x, y)))
        self.steps += 1
        report = Report(self.steps, losses)
        for callback in self.callbacks:
            callback(report)
        return losses

    def signal(self, x: Batch, y: Tensor) -> Signal:
        """Return what the first component gets."""
        return Signal(x, y)

    @abstractmethod
    def _sweep(self, signal: Signal) -> list[Tensor]:
        """Take one step of all components; return their detached losses."""

    @abstractmethod
    def as_module(self) -> nn.Module:
        """The network that predicts, a plain module on the same parameters: for export or evaluation."""

    def predict(self, x: Tensor) -> Tensor:
        """Return what `as_module` makes of some inputs in eval mode: scores, a row a sample.

        Raises:
            DataError: there is no tensor in the inputs.
        """
        _require_tensors("inputs", x)
        module = self.as_module()
        with evaluating(module), torch.no_grad():
            result: Tensor = module(x)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training goes on; loads with ``weights_only=True``."""
        return {
            "learner": type(self).__name__,
            "steps": self.steps,
            "trainers": [trainer.state_dict() for trainer in self.trainers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state, from which training goes on bit for bit.

        Raises:
            StateError: it was saved by another learner, or with other components, or it is damaged.
        """
        name = type(self).__name__
        if not isinstance(state, Mapping) or not state.keys() >= {"learner", "steps", "trainers"}:
            raise StateError("This is no state of a learner, or a part of it is missing.", see="state-memory")
        if state["learner"] != name or len(state["trainers"]) != len(self.trainers):
            saved = f"{state['learner']} of {len(state['trainers'])} components"
            raise StateError(
                f"The state is one of {saved}; this is {name} of {len(self.trainers)}.", see="state-memory"
            )
        for trainer, part in zip(self.trainers, state["trainers"], strict=True):
            trainer.load_state_dict(part)
        self.steps = state["steps"]


def _list_components(owner: object, components: Iterable[Component]) -> list[Component]:
    """Return the components in a list; raise BlockError if there is none, or one is something else."""
    found = list(components)
    if not found:
        raise BlockError(f"{type(owner).__name__} has no component: give at least one.")
    for index, component in enumerate(found):
        if not isinstance(component, Component):
            raise BlockError(
                f"{type(owner).__name__}: component {index} is a {type(component).__name__}, and must be a "
                "plywise.Component, a module whose forward(signal) returns the next signal and the loss."
            )
    return found


_MAKERS = {
    "optimizer": "lambda groups: torch.optim.Adam(groups, lr=1e-3)",
    "scheduler": "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)",
    "rule": "lambda: plywise.Foof()",
}


def _refuse_arguments(owner: object, unknown: Iterable[str]) -> None:
    """Raise TypeError if there is an argument that neither a learner nor its base class has."""
    kinds = (inspect.signature(kind).parameters.values() for kind in (type(owner), Learner))
    known = {p.name: None for parameters in kinds for p in parameters if p.kind is not p.VAR_KEYWORD}
    known.pop("components", None)
    for name in unknown:
        raise TypeError(
            f"{type(owner).__name__} has no argument {name!r}. {suggestion(name, tuple(known))}It has: "
            f"{', '.join(known)}."
        )


def _require_maker(owner: object, name: str, make: object) -> None:
    """Raise TypeError unless ``make`` can be called (or is None): every component gets its own."""
    if make is not None and not callable(make):
        raise TypeError(
            f"{type(owner).__name__}: {name} must be a function that makes one for each component, such as "
            f"{_MAKERS[name]}; an object of type {type(make).__name__} was given."
        )


def _refuse_call(*_: Any) -> Any:
    raise RuntimeError("There is no stage on this side.")


@dataclass(frozen=True)
class Neighbours:
    """How the components of a stage reach those of the stages before and after it.

    Attributes:
        emit: hands the last component's signal to the stage after.
        send_back: hands a gradient at the first component's input to the stage before.
        receive_back: waits for the next gradient at the last component's output, from the stage after.
    """

    emit: Callable[[Signal], None] = lambda _: None
    send_back: Callable[[Tensor], None] = _refuse_call
    receive_back: Callable[[], Tensor] = _refuse_call


class PredictsByBlocks:
    """A learner of `Blocks` whose last block predicts: the blocks themselves are the network that predicts.

    Subclasses set the blocks, the number of classes, and the loss, which says whether targets are classes.
    """

    _blocks: Blocks
    _classes: int
    _loss: Callable[[Tensor, Tensor], Tensor]

    def signal(self, x: Batch, y: Tensor) -> Signal:
        """Return the batch as it is, if targets are what the loss takes."""
        check_targets(y, self._classes, self._loss)
        return self._blocks.begin(x, y)

    def as_module(self) -> nn.Module:
        """Return the blocks, one after another."""
        return self._blocks.as_module()


class StagedLearner(Learner):
    """A learner whose components may run in processes of their own (`plywise.pipeline`); abstract."""

    sends_back: ClassVar[bool] = False
    """Whether a stage gets gradients from the one after it."""

    def _sweep(self, signal: Signal) -> list[Tensor]:
        return self.learn_stage(0, len(self.trainers), signal, Neighbours())

    @abstractmethod
    def learn_stage(self, first: int, stop: int, signal: Signal, neighbours: Neighbours) -> list[Tensor]:
        """Take one step of the components from ``first`` to before ``stop``; return their detached losses.

        Args:
            first: the stage's first component.
            stop: the first component of the stage after.
            signal: what the first component gets.
            neighbours: the stages before and after.
        """


class OneWayLearner(StagedLearner):
    """A learner whose components need nothing from those after them; abstract.

    Each component finishes a batch, with backward and step, before the next one runs. So only the activations
    of one component are kept at a time.
    """

    def learn_stage(self, first: int, stop: int, signal: Signal, neighbours: Neighbours) -> list[Tensor]:
        """Let each component learn from the signal of the one before."""
        return learn_in_turn(self.trainers[first:stop], signal, self.steps, neighbours.emit)


def learn_in_turn(
    trainers: Sequence[LocalTrainer],
    signal: Signal,
    step: int,
    emit: Callable[[Signal], None] = lambda _: None,
) -> list[Tensor]:
    """Let each component learn from the signal of the one before; return their detached losses.

    ``emit`` gets the signal of the last one, before its backward.
    """
    losses = []
    for trainer in trainers[:-1]:
        signal, loss = trainer.learn(signal, step)
        losses.append(loss)
    return [*losses, trainers[-1].learn(signal, step, emit)[1]]


def _require_tensors(name: str, given: Batch) -> None:
    """Raise DataError if there is no tensor in a part of a batch."""
    if not list_tensors(given):
        raise DataError(
            f"A batch's {name} must be tensors; an object of type {type(given).__name__} was given. "
            "Convert it by torch.as_tensor."
        )


def take_batch(x: Batch, y: Tensor) -> tuple[Batch, Tensor]:
    """Return a batch without a graph: no gradient leaves the first block.

    Raises:
        DataError: inputs or targets are not tensors, or there are not as many of these as of those.
    """
    _require_tensors("inputs", x)
    _require_tensors("targets", y)
    inputs = count_samples(x)
    if inputs != len(y) or inputs == 0:
        raise DataError(
            f"A batch needs as many targets as inputs, and at least one: {inputs} inputs, {len(y)} targets."
        )
    if any(tensor.requires_grad for tensor in (*list_tensors(x), *list_tensors(y))):
        x, y = map_tensors(Tensor.detach, (x, y))
    return x, y


def check_classes(y: Tensor, num_classes: int) -> None:
    """Raise PlywiseError unless ``y`` holds class indices below ``num_classes``."""
    if y.dim() != 1 or y.dtype != torch.long:
        raise DataError(
            f"Targets must be class indices, one torch.long a sample, not {y.dtype} of shape "
            f"{tuple(y.shape)}."
        )
    low, high = (int(value) for value in y.aminmax())
    if low < 0 or high >= num_classes:
        ignored = "; leave out samples without a class" if low == IGNORED else ""
        raise DataError(f"Targets must lie in 0 … {num_classes - 1}; this batch has {low} … {high}{ignored}.")


def check_targets(y: Tensor, num_classes: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Raise PlywiseError unless ``y`` holds classes, or tokens, where the loss takes such."""
    if loss is F.cross_entropy:
        check_classes(y, num_classes)
    elif loss is token_cross_entropy:
        if y.dim() != 2:
            raise DataError(
                "The last block hands on scores at each position, so that targets must be tokens (N, T), not "
                f"{y.dtype} of shape {tuple(y.shape)}. For one class a sample, let the last block hand on "
                f"{num_classes} scores."
            )
        known = y[y != IGNORED].flatten()
        if known.numel():
            check_classes(known, num_classes)
