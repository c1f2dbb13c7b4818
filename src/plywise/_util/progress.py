"""Shows the progress of work: a bar in terminals and notebooks, a line for each step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@dataclass(frozen=True)
class Step:
    """A piece of work that is done.

    Attributes:
        done: how many are.
        total: of how many.
        text: its result, in a line.
        left: estimated seconds of the rest, if the work knows them; else they follow from the pace so far.
        stays: whether the line is to stay on the screen, as a failure's does.
    """

    done: int
    total: int
    text: str
    left: float | None = None
    stays: bool = False


def follow(
    steps: Iterable[Step],
    screen: Console,
    *,
    done: int = 0,
    total: int | None = None,
    verbose: bool = False,
) -> None:
    """Do the work that ``steps`` does between its steps, and show each.

    Args:
        steps: the work.
        screen: where to show it. A quiet one shows nothing.
        done: pieces that were done before.
        total: pieces in all, if known before the first step.
        verbose: leave a line of each step on the screen.
    """
    pace = _Pace(done)
    if screen.quiet or not (screen.is_terminal or screen.is_jupyter):
        for step in steps:
            screen.print(format_step(step, pace.find_left(step)), soft_wrap=True)
        return
    from rich.live import Live

    bar = _make_bar(screen)
    task = bar.add_task("starting", total=total, completed=done, left="")

    # refreshed by hand: a thread that paints would run on the clocks that are being read
    with Live(bar, console=screen, auto_refresh=False, transient=True) as live:
        for step in steps:
            left = format_left(pace.find_left(step))
            bar.update(task, completed=step.done, total=step.total, description=step.text, left=left)
            if step.stays or verbose:
                screen.print(step.text)
            live.refresh()


def _make_bar(screen: Console) -> Progress:
    """Make a line in which only the text of the step is cut off where the terminal is narrow."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        BarColumn(bar_width=min(40, screen.width // 5), table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=rest),
        console=screen,
        expand=True,
    )


class _Pace:
    """Estimates the rest from the pace of the steps so far."""

    def __init__(self, done: int) -> None:
        self._start, self._before = time.monotonic(), done

    def find_left(self, step: Step) -> float:
        if step.left is not None:
            return step.left
        each = (time.monotonic() - self._start) / max(step.done - self._before, 1)
        return each * (step.total - step.done)


def format_step(step: Step, left: float) -> str:
    """Return a step in one line.

    Example:
        >>> format_step(Step(3, 12, "sgd: 0.1"), 95.0)
        '[ 3/12] sgd: 0.1; about 95 s left'
    """
    return f"[{step.done:{len(str(step.total))}}/{step.total}] {step.text}; {format_left(left)}"


def format_left(seconds: float) -> str:
    """Seconds that are left, in words.

    Example:
        >>> format_left(7.6)
        'about 8 s left'
    """
    return f"about {format_duration(seconds)} left"


def format_duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> format_duration(5400), format_duration(42)
        ('1 h 30 min', '42 s')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
