"""Ctrl-C during `plywise bench` and `plywise reproduce`."""

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

    Attributes:
        presses: how often it was pressed.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.presses = 0

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # as a shell's background jobs have it
            signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self.presses and kind is None:
            raise KeyboardInterrupt

    def more(self, end: float | None) -> bool:
        """Whether another trial may begin, within the budget if there is one."""
        return not self.presses and (end is None or time.monotonic() < end)

    def _stop(self, *_: object) -> None:
        self.presses += 1
        if self.presses > 1:
            raise KeyboardInterrupt
        os.write(2, f"\n{STOPPING}\n".encode())  # standard error itself: a print may have been interrupted
        self._executor.stop()
