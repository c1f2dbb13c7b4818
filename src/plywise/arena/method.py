"""The methods that the arena compares: a way to train a model, and the numbers that may be tuned."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from plywise._util.checks import describe_kind
from plywise._util.renamed import serve_old_names
from plywise.arena.space import MOST_TUNED, Range, Space
from plywise.arena.task import Task, predictor
from plywise.engine.rule import Rule
from plywise.errors import AddressError, BenchError, MissingPackageError

if TYPE_CHECKING:
    from plywise.arena.workload import Workload

Numbers = Mapping[str, float]
"""The tuned numbers of a trial, by name."""


def runs_on_all(workload: Workload) -> str:
    """Return no reason to refuse."""
    return ""


class Trainer(Protocol):
    """A method at work on one model.

    Attributes:
        plain: whether `predict` gives what the task's loss takes: scores of local learners need not be
            logits.
    """

    plain: bool

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; its loss before the step, in the method's own terms."""
        ...

    def predict(self, x: Tensor) -> Tensor:
        """Return the network's outputs in eval mode, a row a sample."""
        ...


@dataclass(frozen=True)
class TrialContext:
    """What a method gets when a trial starts.

    Attributes:
        model: the model with its initial weights.
        task: loss and metric.
        numbers: the tuned numbers.
        steps: steps of the whole run, for schedules.
        example: a few training inputs, to cut the model by.
        blocks: how many blocks local learners cut the model into.
        classes: number of classes of a sample, or of each token, for local learners.
        device: where the model is.
    """

    model: nn.Module
    task: Task
    numbers: Numbers
    steps: int
    example: Tensor
    blocks: int = 0
    classes: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Method:
    """A competitor.

    Attributes:
        name: its name on the command line and in reports.
        about: one line.
        space: the numbers that may be tuned, at most two, the same for every workload.
        make: makes the trainer of a model.
        baseline: whether targets are taken from it: an established method, not one of ours.
        gradients: number of forward and backward passes in a step.
        count: counts them on a model, for a method where they depend on the model.
        refuses: why it cannot run on a workload; "" if it can. What cannot run is left out and listed, which
            is no failure.
        local: whether it trains the model block by block.
        null: the method that this one repeats under another name and with other seeds, as a null control.
        needs: a package that it imports and plywise does not bring, or nothing.
        grid: the numbers of its tuning trials, if they are given and not searched for; with a single point
            there is nothing to tune.
    """

    name: str
    about: str
    space: Space
    make: Callable[[TrialContext], Trainer]
    baseline: bool = False
    gradients: float = 1.0
    count: Callable[[TrialContext], float] | None = None
    refuses: Callable[[Workload], str] = runs_on_all
    local: bool = False
    null: str | None = None
    needs: str = ""
    grid: tuple[Numbers, ...] = ()

    def __post_init__(self) -> None:
        ranges = self.space.values() if isinstance(self.space, Mapping) else [self.space]
        if wrong := [one for one in ranges if not isinstance(one, Range)]:
            raise BenchError(
                f"Method {self.name}: a search space is {{name: Range(low, high, default)}}, with Range from "
                f"plywise.arena.space, and holds no {type(wrong[0]).__name__} as {wrong[0]!r}."
            )
        if len(self.space) > MOST_TUNED:
            raise BenchError(
                f"Method {self.name} tunes {', '.join(self.space)}: {MOST_TUNED} numbers at most, so that "
                "equal numbers of trials are equal chances."
            )

    def require(self) -> None:
        """Check that the package it needs is installed; a missing package is not a failure of the method.

        Raises:
            PlywiseError: the package is missing.
        """
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise MissingPackageError(
                f"Method {self.name} needs the package {self.needs}, which is not installed: pip install "
                f"{self.needs}, or 'plywise[bench]' for what plywise's own methods need."
            )


@dataclass
class EndToEnd:
    """Ordinary training: one loss, backward, step; perhaps with a rule attached."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    scheduler: LRScheduler | None = None
    plain: bool = field(default=True, init=False)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; its loss before the step."""
        return self.descend(self.loss(self.model(x), y))

    def descend(self, loss: Tensor) -> float:
        """Take a step against the gradient of a loss; return the loss."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()

    def predict(self, x: Tensor) -> Tensor:
        """Return the network's outputs in eval mode."""
        return predictor(self.model)(x)


def end_to_end(setting: TrialContext, optimizer: Optimizer, rule: Rule | None = None) -> EndToEnd:
    """Train with an optimizer, its rate on a cosine to zero, and perhaps a rule."""
    trainer = with_rule(setting.model, optimizer, rule, setting.task.loss)
    trainer.scheduler = make_cosine(setting.steps)(optimizer)
    return trainer


def with_rule(
    model: nn.Module, optimizer: Optimizer, rule: Rule | None, loss: Callable[[Tensor, Tensor], Tensor]
) -> EndToEnd:
    """Train with an optimizer at its rate, and perhaps a rule, of which a copy is attached."""
    if rule is not None:
        # not "skip": plain training has no such net, and a comparison must not give one to some
        copy.copy(rule).attach(model, optimizer, on_nonfinite="propagate")
    return EndToEnd(model, optimizer, loss)


def make_cosine(steps: int) -> Callable[[Optimizer], LRScheduler]:
    """Make the schedule that every method gets: half a cosine from the rate to zero."""
    return lambda optimizer: LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
    )


def wrap_optimizer(name: str, about: str, optimizer: type[Optimizer], space: Space, **more: Any) -> Method:
    """Return a `torch.optim.Optimizer` class as a method; its tuned numbers are its keyword arguments.

    Example:
        >>> import torch
        >>> space = {"lr": Range(1e-4, 1e-1, 1e-2)}
        >>> wrap_optimizer("rprop", "", torch.optim.Rprop, space).space["lr"].default
        0.01
    """
    fixed = more.pop("fixed", {})

    def make(setting: TrialContext) -> Trainer:
        parameters: Iterable[nn.Parameter] = [p for p in setting.model.parameters() if p.requires_grad]
        return end_to_end(setting, optimizer(parameters, **setting.numbers, **fixed))  # type: ignore[arg-type]

    return Method(name, about, space, make, **more)


RATE = Range(1e-4, 1.0, 1e-3)
"""The search range for the rate of an optimizer that gives none."""


def wrap_class(address: str, thing: Any) -> Method:
    """Make a method of the object at a user's address: a `Method`, or an optimizer's class.

    An optimizer may say ``search_space = {"lr": Range(...)}``; without, its rate is looked for between
    1e-4 and 1.

    Raises:
        PlywiseError: it is neither.
    """
    if isinstance(thing, Method):
        return replace(thing, name=address)  # other processes find it by its address
    if isinstance(thing, type) and issubclass(thing, Optimizer):
        space = getattr(thing, "search_space", {"lr": RATE})
        return wrap_optimizer(address, (thing.__doc__ or thing.__name__).strip().split("\n")[0], thing, space)
    raise AddressError(
        "A method is a class of torch.optim.Optimizer or of plywise.Rule (the class, not an object made from "
        f"it), or a plywise.arena.method.Method, not {describe_kind(thing)} ({address})."
    )


if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(
        __name__,
        {
            "Setting": "TrialContext",
            "cosine": "make_cosine",
            "of_class": "wrap_class",
            "of_optimizer": "wrap_optimizer",
        },
    )
