"""Runs one trial: trains one configuration once, and records what happened, failures included."""

import math
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from plywise._util.import_path import user_line
from plywise._util.plain_json import drop_infinite, map_floats
from plywise._util.seeded import seeded
from plywise.arena.method import Trainer
from plywise.arena.task import Task, mean
from plywise.data.batches import endless_batches
from plywise.data.parts import Data

DIVERGED_FACTOR = 1e3
"""Training has diverged if its loss is this many times the first one (or 1, if that is more)."""

TRAIN_EVAL_SIZE = 500
"""Training samples that the training loss is measured on."""

_CHECK = re.compile(r"^\[enforce fail at \S+\] .*?\. (?=\w*Allocator)")
"""Where torch's allocator checks, which stands before what it has to say."""

MOST_ROWS = 250
"""Samples per call while measuring, or a batch if that is fewer, so that measuring takes no more memory."""


@dataclass
class TrialResult:
    """What one trial measured.

    Attributes:
        seed: seed of the initial weights and of the order of the batches.
        steps: the steps at which measurements were made, from 0.
        loss: loss on training samples, by default the first 500, after each of ``steps``; None
            where the method's outputs are not what the task's loss takes.
        validation: metric on the validation set after each of ``steps``.
        cpu: processor seconds that training (and nothing else) had taken after each of ``steps``.
        wall: the same in wall-clock seconds.
        test: metric on the test set at the end, if it was asked for.
        measuring: seconds of all measurements, which are not in ``cpu`` and ``wall``.
        failure: why training stopped early, or None.
    """

    seed: int
    steps: list[int] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    test: float | None = None
    measuring: float = 0.0
    failure: str | None = None

    @property
    def final_loss(self) -> float | None:
        """The last of ``loss``; None if the trial failed."""
        return self.loss[-1] if self.loss and self.failure is None else None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON can say it: what is not finite is None, and ``failure`` says why."""
        return map_floats(asdict(self), drop_infinite)


class DivergedError(ArithmeticError):
    """The loss is not finite, or far above the first one."""


def run_trial(
    begin: Callable[[], Trainer],
    data: Data,
    task: Task,
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    measure_every: int = 10,
    test: bool = False,
    train_eval_size: int = TRAIN_EVAL_SIZE,
    meter: AbstractContextManager[Any] | None = None,
) -> TrialResult:
    """Train once. The same seed gives every method the same initial weights and the same batches.

    A failure is an outcome: a loss that is not finite or a thousand times the first one, or any exception,
    ends the training and is written into the record. The caller's random states are left alone: torch's, on
    every GPU in use, too, NumPy's and Python's.

    Args:
        begin: makes model and trainer; called with the seed set.
        data: trained on, measured on, and read once at the end if ``test``.
        task: loss and metric.
        seed: seed of weights and batches.
        steps: how many steps to take.
        batch_size: samples a batch; an incomplete batch at the end of an epoch is left out.
        measure_every: measure after every so many steps, and after the last; never on the clock.
        test: measure on the test set at the end.
        train_eval_size: training samples that the training loss is measured on.
        meter: entered after the measurement before the first step, left before the test set is read.
    """
    record, progress = TrialResult(seed), _Progress()
    with seeded(seed):
        try:
            trainer = begin()
            batches = endless_batches(data.train, batch_size, seed)
            seen = replace(data, train=data.train.head(train_eval_size))
            rows = min(MOST_ROWS, batch_size)
            _measure(record, trainer, seen, task, progress, rows)
            with meter or nullcontext():
                while progress.step < steps:
                    _check(progress.take_step(trainer, *next(batches)), record, "batch")
                    if progress.step % measure_every == 0 or progress.step == steps:
                        _measure(record, trainer, seen, task, progress, rows)
            if test:
                record.test = task.measure(trainer.predict, data.test, rows)
        except DivergedError as error:
            record.failure = f"diverged at step {progress.step}: {error}"
        except (Exception, SystemExit) as error:
            where = f"at step {progress.step}" if record.steps else "before the first step"
            why = _CHECK.sub("", str(error)).split(". ")[0]  # the first sentence that says something
            record.failure = f"{type(error).__name__} {where}: {why}{user_line(error)}"
    return record


@dataclass
class _Progress:
    """Steps that a trial has begun, and the seconds that they took."""

    step: int = 0
    cpu: float = 0.0
    wall: float = 0.0

    def take_step(self, trainer: Trainer, x: Any, y: Any) -> float:
        """Take one more step; return its loss."""
        self.step += 1
        cpu, wall = time.process_time(), time.perf_counter()
        loss = trainer.step(x, y)
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        return loss


def _measure(
    record: TrialResult, trainer: Trainer, data: Data, task: Task, progress: _Progress, rows: int
) -> None:
    start = time.perf_counter()
    loss = None
    if trainer.plain:
        loss = mean(task.loss, trainer.predict, data.train, rows)
    record.steps.append(progress.step)
    record.loss.append(loss)
    record.validation.append(task.measure(trainer.predict, data.validation, rows))
    record.cpu.append(progress.cpu)
    record.wall.append(progress.wall)
    record.measuring += time.perf_counter() - start
    if loss is not None:
        _check(loss, record, "training")
    if not math.isfinite(record.validation[-1]):
        raise DivergedError(f"the validation {task.metric_name} is {record.validation[-1]:.3g}")


def _check(loss: float, record: TrialResult, what: str) -> None:
    first = record.loss[0]
    if not math.isfinite(loss) or (first is not None and loss > DIVERGED_FACTOR * max(1.0, first)):
        raise DivergedError(f"the {what} loss is {loss:.3g}")
