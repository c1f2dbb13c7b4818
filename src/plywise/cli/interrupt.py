"""Ctrl-C, and the end that a scheduler asks for, during `plywise bench` and `plywise reproduce`."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from plywise.arena.run.executor import Executor

STOPPING = "Stopping: what has ended is kept. The report is drawn next; Ctrl-C again leaves it out."


class Stop:
    """Answers Ctrl-C at once while trials run, and interrupts when all finished trials are in the ledger.

    SIGTERM counts as two of them: the process is killed soon, so there is no time to draw a report. But it
    raises nothing where it arrives, because a process that is just being started would print its own error.

    Attributes:
        presses: how often Ctrl-C was pressed; 2 after SIGTERM.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.presses = 0

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # as a shell's background jobs have it
            signal.signal(signal.SIGINT, self._stop)
        self._before_end = signal.signal(signal.SIGTERM, self._end)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        signal.signal(signal.SIGTERM, self._before_end)
        if self.presses and kind is None:
            raise KeyboardInterrupt

    def more(self, end: float | None) -> bool:
        """Return whether another trial may begin, within the budget if there is one."""
        return not self.presses and (end is None or time.monotonic() < end)

    def _end(self, *_: object) -> None:
        self.presses = 2
        self._executor.stop()

    def _stop(self, *_: object) -> None:
        self.presses += 1
        if self.presses > 1:
            raise KeyboardInterrupt
        os.write(2, f"\n{STOPPING}\n".encode())  # standard error itself: a print may have been interrupted
        self._executor.stop()
