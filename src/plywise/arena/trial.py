"""One trial: train one configuration once and say what happened, failures included."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise.data.digits import Split
from plywise.rule import Rule

HOPELESS = 1e3
"""A loss above this has diverged: chance level is log(classes), two or three digits below."""

ModelFactory = Callable[[], nn.Module]
OptimizerFactory = Callable[[Any], Optimizer]


@dataclass
class Record:
    """What one trial measured.

    Attributes:
        seed: seed of the initial weights and of the order of the batches.
        steps: steps after which was measured, from 0.
        loss: mean loss over the whole training set after each of ``steps``.
        cpu_seconds: processor time that training (and nothing else) had taken after each of ``steps``.
        validation_loss: as ``loss``, over the held-out set; empty unless asked for.
        test_accuracy: share of the held-out set that the trained model gets right; None if it failed.
        final_loss: the last of ``loss``; None if it failed.
        failure: why training stopped early, or None.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    test_accuracy: float | None = None
    final_loss: float | None = None
    failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record as a study keeps it (see `plywise.arena.report`)."""
        values = {key: value for key, value in asdict(self).items() if key != "validation_loss"}
        # JSON knows no NaN, and the failure says already what the last loss was
        return values | {"loss": [loss if math.isfinite(loss) else None for loss in self.loss]}


class DivergedError(ArithmeticError):
    """The loss is not finite, or hopeless."""


def run_trial(
    model_factory: ModelFactory,
    train: Split,
    held_out: Split,
    optimizer_factory: OptimizerFactory,
    rule: Rule | None,
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    measure_every: int = 10,
    watch_held_out: bool = False,
) -> Record:
    """Train once. The same seed gives every method the same initial weights and the same batches.

    A failure is an outcome: a loss that is not finite or above 1e3, or any exception, ends the training
    and is written into the record. The caller's random state is left alone.

    Args:
        model_factory: makes the model; called with the seed set.
        train: the training set.
        held_out: what the accuracy is measured on.
        optimizer_factory: makes the optimizer from the model's parameters.
        rule: what to attach (a copy is, so that it can be used again), or None for plain training.
        seed: seed of weights and batches.
        steps: how many steps to take.
        batch_size: samples a batch; an incomplete batch at the end of an epoch is left out.
        measure_every: measure after every so many steps, and after the last; never on the clock.
        watch_held_out: measure the loss on ``held_out`` along the way, too.
    """
    record = Record(seed)
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = model_factory()
            batches = endless_batches(train, batch_size, seed)
            step = make_step(model, optimizer_factory, rule)
            _measure(record, model, train, held_out if watch_held_out else None, 0, 0.0)
            clock = 0.0
            for count in range(1, steps + 1):
                x, y = next(batches)
                start = time.process_time()
                loss = step(x, y)
                clock += time.process_time() - start
                _check(loss, "batch")
                if count % measure_every == 0 or count == steps:
                    _measure(record, model, train, held_out if watch_held_out else None, count, clock)
            record.test_accuracy = accuracy(model, held_out)
            record.final_loss = record.loss[-1]
        except DivergedError as error:
            record.failure = f"diverged at step {count}: {error}"
        except Exception as error:
            where = f"at step {count}" if record.steps else "before the first step"
            record.failure = f"{type(error).__name__} {where}: {str(error).split('. ')[0]}"
    return record


def make_step(
    model: nn.Module, optimizer_factory: OptimizerFactory, rule: Rule | None
) -> Callable[[Tensor, Tensor], float]:
    """One step of training, ready to be called: batch in, loss out; ``rule`` attached to the model."""
    optimizer = optimizer_factory(model.parameters())
    if rule is not None:
        # "raise" and not "skip": plain training has no such net, and a comparison must not give one to some
        copy.copy(rule).attach(model, optimizer, on_nonfinite="raise")

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def endless_batches(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(split.y))
    while True:
        order = torch.randperm(len(split.y), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield split.x[rows], split.y[rows]


@torch.no_grad()
def mean_loss(model: nn.Module, split: Split) -> float:
    """Mean loss over a whole set."""
    return nn.functional.cross_entropy(model(split.x), split.y).item()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of a set that the model gets right."""
    return float((model(split.x).argmax(1) == split.y).float().mean())


def _measure(
    record: Record, model: nn.Module, train: Split, watched: Split | None, step: int, clock: float
) -> None:
    model.eval()
    loss = mean_loss(model, train)
    if watched is not None:
        record.validation_loss.append(mean_loss(model, watched))
    model.train()
    record.steps.append(step)
    record.loss.append(loss)
    record.cpu_seconds.append(clock)
    _check(loss, "training")


def _check(loss: float, what: str) -> None:
    if not math.isfinite(loss) or loss > HOPELESS:
        raise DivergedError(f"the {what} loss is {loss:.3g}")
