"""Runs a training by its plan, in one or several processes, and resumes it after interruptions."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plywise._util.extras import TENSORBOARD, import_extra
from plywise._util.file_errors import explaining_files
from plywise._util.seeded import make_seed
from plywise.data.batches import Batch, count_samples, take_samples
from plywise.data.models import NAN_HINT
from plywise.data.own_data import explaining
from plywise.data.training_data import NUMBERS, WHOLE, TrainingData
from plywise.engine.health import SKIPPED
from plywise.errors import BlockError, NonFiniteError, PlywiseError, StateError
from plywise.local.learner import Learner, Report
from plywise.local.trainer import LocalTrainer
from plywise.training.build import ResolvedTraining, resolve_training
from plywise.training.config import TrainConfig
from plywise.training.judge import judge
from plywise.training.metrics_log import MetricsLog, StepMetrics
from plywise.training.run_folder import RunFolder
from plywise.training.single_process import SingleProcessEngine


class Engine(Protocol):
    """Takes the steps: a `SingleProcessEngine`, or a `plywise.pipeline.pipeline.Pipeline`."""

    @property
    def learner(self) -> Learner:
        """The whole learner; in a pipeline, only this process's components are up to date."""

    @property
    def trainers(self) -> Sequence[LocalTrainer]:
        """Those of this process."""

    stage: int
    replica: int
    replicas: int

    def ask_to_stop(self) -> None:
        """Ask for no more batches to be read; a signal handler may call this."""

    def stopping(self) -> bool:
        """Return whether a stop has been requested; called before each batch is read."""

    def run(self, batches: Iterator[tuple[Tensor, Tensor]], after: Callable[[int], None]) -> int:
        """Train on batches; ``after`` is called with the number of steps done after each."""

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint."""

    def restore(self, folder: Path, step: int) -> int:
        """Go on from one."""

    def gather(self) -> Learner:
        """Bring all components up to date in this process."""


class Session:
    """One training by a plan; made by `open_session` or `plywise.training.open_pipeline.open_pipeline`.

    Args:
        plan: the plan.
        data: the data.
        engine: takes the steps.
        folder: where checkpoints and logs are.
        step: the step of the checkpoint to go on from; None to begin.
        log: name of this process's log; None for none.

    Raises:
        StateError: the checkpoint cannot be read, or is another learner's.

    Attributes:
        began: number of steps done before this session.
        kind: what the targets are (`plywise.data.training_data`).
        note: what was chosen about the data, and what was damaged, one sentence in each line.
        per_epoch: steps in an epoch.
        total: steps in the whole training.
    """

    def __init__(
        self,
        plan: TrainConfig,
        data: TrainingData,
        engine: Engine,
        folder: RunFolder,
        step: int | None,
        log: str | None,
    ) -> None:
        self.plan, self.engine, self.folder = plan, engine, folder
        self.samples, self.kind, self.outputs = len(data.train), data.kind, data.outputs
        self.test_samples = 0 if data.test is None else len(data.test)
        self.note = "\n".join(filter(None, [data.note, *folder.notes]))
        self.per_epoch = data.train.count_batches(plan.batch_size)
        self.total = plan.epochs * self.per_epoch
        self._reads = engine.stage == 0
        self._judges = engine.stage == 0 and engine.replica == 0
        self._data = data if self._reads else None  # the other stages need not keep it
        self._log = None if log is None else folder.path / log
        self._saved = step
        self._written: MetricsLog | None = None
        self._held: StepMetrics | None = None  # an epoch's last line waits for the accuracy
        self.began = 0 if step is None else self._restore(step)
        self._clock = time.monotonic() - float(folder.last_line().get("seconds", 0.0))

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.engine.learner.steps

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.step >= self.total

    @property
    def skipped(self) -> int:
        """Steps of this process's components that were skipped: the loss was finite, a gradient was not."""
        return sum(trainer.health.total(SKIPPED) for trainer in self.engine.trainers)

    def run(self, show: Callable[[StepMetrics], None] = lambda line: None) -> bool:
        """Train to the end. Ctrl-C (or SIGTERM) lets the step finish; a second one interrupts it.

        Args:
            show: is called after each step.

        Returns:
            Whether the training is finished; if not, a stop has been requested. Either way there is a
            checkpoint of the last step.

        Raises:
            NonFiniteError: a loss is not finite. The last checkpoint stays.
            PlywiseError: a step fails; a process of the pipeline is lost; a checkpoint cannot be written.
        """
        log = self._log
        journal = nullcontext() if log is None else MetricsLog(log, self.step, self.plan.tensorboard)
        with journal as self._written, signals_to(self.engine.ask_to_stop), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*so this step was not taken", RuntimeWarning)  # see `skipped`

            def tell(line: StepMetrics) -> None:
                if self._written is not None:
                    self._written.write(line)
                show(line)

            on_step = self._make_callback(tell)
            self.engine.learner.callbacks.append(on_step)
            try:
                return self._run(tell)
            finally:
                self.engine.learner.callbacks.remove(on_step)
                self.folder.release()

    def _run(self, tell: Callable[[StepMetrics], None]) -> bool:
        if self._saved is None:
            self._save()  # there is always something to go on from
        while not self.finished:
            end = (self.step // self.per_epoch + 1) * self.per_epoch
            self._train(end)
            if self.step < end:
                self._save()
                return False
            assert self._held is not None
            accuracy, error = self._judge()
            tell(replace(self._held, accuracy=accuracy, error=error, seconds=self._seconds))
            if self.step % self.plan.every == 0:
                self._save()
        self._save()
        return True

    def _train(self, end: int) -> None:
        try:
            self.engine.run(self._batches(self.step, end), self._finish_step)
        except Exception as error:
            # a block that fails is the user's, as what raises other errors is
            if isinstance(error, PlywiseError) and not (isinstance(error, BlockError) and error.__cause__):
                raise
            rows = self.samples % self.plan.batch_size if self.step == end - 1 and self.kind != WHOLE else 0
            hint = f" It is the odd end of an epoch, of {rows}: --batch-size changes that." if rows else ""
            raise PlywiseError(
                f"Step {self.step + 1} fails: {format_error(error)}.{hint}{self._kept}"
            ) from error

    def _batches(self, step: int, end: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of the rest of an epoch, until a stop is requested."""
        assert self._data is not None
        train, size = self._data.train, self.plan.batch_size
        order = permutation(self.plan.seed, step // self.per_epoch, train.count_places())
        for place in range(step % self.per_epoch, self.per_epoch):
            if self.engine.stopping():
                return
            x, y = train.batch(place, size, order)
            if self.engine.replicas > 1:
                rows = share(torch.arange(count_samples(x)), self.engine.replica, self.engine.replicas)
                x, y = take_samples(x, rows), y[rows]
            yield x, y

    def _make_callback(self, tell: Callable[[StepMetrics], None]) -> Callable[[Report], None]:
        def on_step(report: Report) -> None:
            first = self.engine.trainers[0].index
            losses = dict(enumerate(report.losses.tolist(), first))
            self._check(report.step, losses)
            epoch = (report.step - 1) // self.per_epoch + 1
            line = StepMetrics(report.step, epoch, losses, self._seconds)
            if report.step % self.per_epoch:
                tell(line)
            else:
                self._held = line

        return on_step

    def _check(self, step: int, losses: dict[int, float]) -> None:
        for component, loss in losses.items():
            if not math.isfinite(loss):
                untrained = step == 1 and component == 0
                hint = f"No weight has changed yet. {NAN_HINT}" if untrained else "Try a lower rate"
                raise NonFiniteError(
                    f"The loss of component {component} is {loss} at step {step}.{self._kept} {hint} (in "
                    "another --out, or with --fresh)."
                )

    def _finish_step(self, step: int) -> None:
        if step % self.plan.every == 0 and step % self.per_epoch:  # after an epoch: once that is judged
            self._save()

    def _save(self) -> None:
        if self._saved == self.step:
            return
        try:
            if self._written is not None:
                self._written.sync()  # the log reaches as far as the checkpoint, whatever happens
            self.engine.save(self.folder.checkpoints, self.plan.keep)
        except PlywiseError:
            raise
        except Exception as error:
            raise StateError(
                f"No checkpoint of step {self.step}: {format_error(error)}.{self._kept}", see="state-run"
            ) from error
        self._saved = self.step

    def _restore(self, step: int) -> int:
        try:
            return self.engine.restore(self.folder.checkpoints, step)
        except PlywiseError:
            raise
        except Exception as error:
            raise StateError(
                f"The checkpoint of step {step} in {self.folder.checkpoints} cannot be read: "
                f"{format_error(error)}.",
                see="state-run",
            ) from error

    def _judge(self) -> tuple[float | None, float | None]:
        """Accuracy or error on the test data; None without any, and in all processes but one."""
        if not self.test_samples:
            return None, None
        learner = self.engine.gather()
        if not self._judges:
            return None, None
        assert self._data is not None
        assert self._data.test is not None
        value = judge(learner, self._data.test, self.kind)
        return (None, value) if self.kind in (NUMBERS, WHOLE) else (value, None)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._clock

    @property
    def _kept(self) -> str:
        if self._saved is None:
            return ""
        return f" The checkpoint of step {self._saved} in {self.folder.checkpoints} stays."

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of all components."""
        return sum(p.numel() for t in self.engine.learner.trainers for p in t.component.parameters())


@explaining_files()
def open_session(plan: TrainConfig, *, fresh: bool = False) -> Session:
    """Open a training in this process; it resumes from the last checkpoint in the plan's folder, if any.

    Args:
        plan: the plan.
        fresh: start again; what the folder holds of another run is thrown away.

    Raises:
        PlywiseError: something in the plan does not exist, does not fit or fails; the folder holds a run of
            another plan. Nothing has been written or thrown away then.
    """
    if plan.tensorboard:
        import_extra("torch.utils.tensorboard", TENSORBOARD)
    torch.set_num_threads(plan.threads)
    training, folder = resolve_training(plan, plan.out), RunFolder(plan.out)
    data = training.data
    record = None if fresh else folder.check(plan, data)
    with explaining(data.note.splitlines()):
        learner, starts = _make_learner(training, record.starts if record else ())
    engine = SingleProcessEngine(learner)
    step = folder.begin(plan, data, starts, fresh=fresh)
    return Session(plan, data, engine, folder, step, "log.jsonl")


def _make_learner(training: ResolvedTraining, starts: Sequence[int]) -> tuple[Learner, tuple[int, ...]]:
    """Return the learner of a training, and where its model was cut."""
    if training.config.step is not None:
        return training.make_whole(), ()
    blocks, starts = training.make_blocks(starts)
    return training.make_learner(blocks), starts


@explaining_files()
def load_trained(out: Path | str) -> nn.Module:
    """Load the network of a run from its last checkpoint.

    Args:
        out: the folder of the run.

    Raises:
        PlywiseError: there is no run, or what its plan names is not what it was.
    """
    folder = RunFolder(Path(out))
    plan, record = folder.plan(), folder.record()
    assert record is not None
    training = resolve_training(plan)
    engine = SingleProcessEngine(_make_learner(training, record.starts)[0])
    engine.restore(folder.checkpoints, None)
    return engine.learner.as_module().eval()


def permutation(seed: int, epoch: int, samples: int) -> Tensor:
    """Return the order of the samples in an epoch, which depends on these arguments only.

    Example:
        >>> permutation(0, 0, 5).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    generator = torch.Generator().manual_seed(make_seed(f"{seed}/{epoch}"))
    return torch.randperm(samples, generator=generator)


def share(rows: Tensor, replica: int, replicas: int) -> Tensor:
    """Return a replica's share of a batch. All shares are equally large, for gradients are averaged equally.

    If the batch cannot be divided evenly, the last shares are filled up with samples of the first.

    Example:
        >>> [share(torch.arange(5), replica, 2).tolist() for replica in (0, 1)]
        [[0, 1, 2], [3, 4, 0]]
    """
    if replicas == 1:
        return rows
    size = -(-len(rows) // replicas)
    return rows[torch.arange(replica * size, (replica + 1) * size) % len(rows)]


def format_error(error: BaseException) -> str:
    """Return an exception in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0].rstrip('.')}"


@contextmanager
def signals_to(ask: Callable[[], None]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM call ``ask``; after it, and after the block, old handlers are back."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(*_: Any) -> None:
        give_back()
        ask()

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        give_back()
