"""Flags and progress of `plywise train` and `plywise pipeline`."""

from __future__ import annotations

import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from plywise.errors import CommandError
from plywise.training.config import BLOCKS, TrainConfig, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from plywise.training.metrics_log import StepMetrics
    from plywise.training.session import Session

Words = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
Switch = Annotated[bool, Parameter(negative=(), show_default=False)]
PAINT = 0.1  # seconds between two pictures of the progress bar


@Parameter(name="*")
@dataclass(frozen=True)
class Flags:
    """Flags of a training, as `TrainConfig` describes them. A missing one is taken from the file."""

    model: str | None = None
    data: str | None = None
    read: str | None = None
    keep_batches: int | None = None
    step: str | None = None
    metric: str | None = None
    learner: str | None = None
    set: Words = ()
    blocks: int | None = None
    split: str | None = None
    optimizer: str | None = None
    optimizer_set: Words = ()
    rate: float | None = None
    rule: str | None = None
    rule_set: Words = ()
    epochs: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    threads: int | None = None
    out: Path | None = None
    every: int | None = None
    keep: int | None = None
    tensorboard: Annotated[bool | None, Parameter(negative=())] = None


Flags.__doc__ = TrainConfig.__doc__  # for --help


def plan_from(first: str | None, flags: Flags | None, **more: Any) -> TrainConfig:
    """Return the plan of the first word, which is a file or a model, and of flags."""
    given = {**vars(flags or Flags()), **more}
    if first is None or ":" not in first or Path(first).exists():
        return read_config(None if first is None else Path(first), given)
    if given["model"] is not None:
        raise CommandError(f"The model is given twice: as {first}, and as --model {given['model']}.")
    return read_config(None, {**given, "model": first})


def again() -> str:
    """Return the command that resumes the run: this one without --fresh."""
    return shlex.join(["plywise", *(word for word in sys.argv[1:] if word != "--fresh")])


def introduce(session: Session, screen: Console, *more: str) -> None:
    """Say what will be trained, and from which step."""
    if session.finished:
        return
    plan, record = session.plan, session.folder.record()
    rule = f"{plan.rule}{_settings(plan.rule_set)}, " if plan.rule else ""
    test = f"{session.test_samples:,} to test on" if session.test_samples else "none to test on"
    lines = [
        f"{_what(session)}, {session.parameters:,} parameters; {rule}{plan.optimizer}"
        f"{_settings(plan.optimizer_set)} at rate {plan.rate:g}; seed {plan.seed}.",
        f"{plan.data}: {session.samples:,} samples of {_kind(session)}, {test}; "
        f"{session.per_epoch} steps of {plan.batch_size} an epoch.",
    ]
    if session.note:
        lines.append(session.note)
    count = len(session.engine.learner.trainers)
    if plan.model and not (plan.step or plan.blocks or plan.split) and count < BLOCKS:
        blocks = f"{count} block{'s' if count > 1 else ''}"
        lines.append(f"{plan.model} can be cut into {blocks}, fewer than the default of {BLOCKS}.")
    if record is not None and record.starts:
        cut = ",".join(map(str, record.starts))
        lines.append(f"{plan.model} is cut at units {cut}; --split {cut} cuts it there again.")
    without = [f"component {one.index}" for one in session.engine.learner.trainers if one.rule is None]
    if plan.rule and without:
        lines.append(f"Without {plan.rule}, which finds nothing to do there: {', '.join(without)}.")
    lines += more
    if session.began:
        lines.append(f"Goes on from the checkpoint of step {session.began} in {plan.out}.")
    for line in lines:
        screen.print(line)


def conclude(session: Session, screen: Console) -> None:
    """Say what has been done, where it is, and what to do next."""
    plan, line = session.plan, session.folder.last_line()
    judged = _format_result(session, line.get("accuracy"), line.get("error"))
    known = f", {judged}" if judged else ""
    if session.step == session.began:
        screen.print(
            f"The run in {plan.out} is finished: {session.step} steps{known}. More --epochs go on with it, "
            "--fresh starts again."
        )
        return
    if session.skipped:
        screen.print(f"Steps of a component skipped, since gradients were not finite: {session.skipped}.")
    screen.print(
        f"\nTrained {session.step} steps in {line.get('seconds', 0.0):.1f} s{known}.\n"
        f"Log and checkpoints: {plan.out}. In Python the network is "
        f"plywise.training.session.load_trained({str(plan.out)!r})."
    )


@contextmanager
def following(session: Session, screen: Console) -> Iterator[Callable[[StepMetrics], None]]:
    """Shows each epoch by a line, and in a terminal the steps by a bar."""
    epochs = _Epochs(session, screen)
    if not screen.is_terminal:
        yield epochs.show
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # painted by hand: a thread that paints would take time from the training
    with Progress(*columns, console=screen, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=session.total, completed=session.step)
        painted = 0.0

        def show(line: StepMetrics) -> None:
            nonlocal painted
            epochs.show(line)
            bar.update(task, completed=line.step)
            if time.monotonic() - painted > PAINT:
                bar.refresh()
                painted = time.monotonic()

        yield show


class _Epochs:
    """Sums up each epoch in a line: means over the steps of this session."""

    def __init__(self, session: Session, screen: Console) -> None:
        self._session, self._screen = session, screen
        self._sums: dict[int, float] = defaultdict(float)
        self._steps = 0

    def show(self, line: StepMetrics) -> None:
        for component, loss in line.losses.items():
            self._sums[component] += loss
        self._steps += 1
        if line.step % self._session.per_epoch:
            return
        means = "  ".join(f"{total / self._steps:.3f}" for total in self._sums.values())
        first, last = min(self._sums), max(self._sums)
        which = f"component {first}" if first == last else f"components {first}–{last}"
        count = self._session.plan.epochs
        judged = _format_result(self._session, line.accuracy, line.error, 6)
        known = f"   {judged}" if judged else ""
        self._screen.print(
            f"epoch {line.epoch:{len(str(count))}}/{count}   losses of {which}  {means}{known}   "
            f"{line.seconds:.1f} s"
        )
        self._sums.clear()
        self._steps = 0


def _what(session: Session) -> str:
    plan = session.plan
    if plan.step is not None:
        return f"{plan.model} as a whole by {plan.step}"
    return f"{plan.learner}{_settings(plan.set)} of {len(session.engine.learner.trainers)} components"


def _kind(session: Session) -> str:
    counted = {
        "classes": f"{session.outputs} classes",
        "tokens": f"{session.outputs} tokens",
        "labels": f"{session.outputs} labels",
        "numbers": f"{session.outputs} number" + "s" * (session.outputs > 1),
    }
    return counted.get(session.kind, "your own")


def _format_result(session: Session, accuracy: float | None, error: float | None, width: int = 0) -> str:
    if accuracy is not None:
        return f"test accuracy {accuracy:{width}.1%}"
    if error is None:
        return ""
    name = session.plan.metric or ("loss" if session.plan.step else "squared error")
    return f"test {name} {error:.4g}"


def _settings(values: Any) -> str:
    return f"({', '.join(f'{name}={value!r}' for name, value in values.items())})" if values else ""
