"""The two ends of a boundary between stages: threads that send and receive while the stage computes."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plywise.data.batches import move_batch
from plywise.errors import PipelineError
from plywise.local.component import Signal
from plywise.pipeline.watch import EVERY, Watch
from plywise.pipeline.wire import END, measure_size, pack, unpack

DEPTH = 2
"""Batches that may wait at either end: enough to overlap, few enough to bound memory."""

LOOK = 0.2  # seconds between two looks at the watch while waiting


class Outbox:
    """Sends the signals of one run to the next stage."""

    def __init__(self, to: int, group: dist.ProcessGroup, watch: Watch) -> None:
        self._to, self._group, self._watch = to, group, watch
        self._queue: queue.Queue[Tensor | None] = queue.Queue(DEPTH)
        self._thread = _Thread(self._send, "the connection to it broke", to)
        self._capacity = 0

    def put(self, signal: Signal, step: int) -> None:
        """Send a signal; waits while the next stage is too far behind."""
        if self._capacity == 0:
            self._capacity = measure_size(signal)
            self._put(torch.tensor([self._capacity]))
        self._put(pack(signal, step, self._capacity))

    def end(self) -> None:
        """Send that nothing follows, and wait until the next stage has got everything."""
        self._put(pack(None, END, self._capacity) if self._capacity else torch.tensor([0]))
        self._put(None)
        while not self._thread.done(LOOK):
            self._watch.check()
        self._thread.check(self._watch)

    def close(self) -> None:
        """Let the thread end; its connection has been aborted."""
        _drain(self._queue)
        self._queue.put_nowait(None)
        self._thread.done(2 * EVERY)

    def _put(self, message: Tensor | None) -> None:
        while True:
            self._thread.check(self._watch)
            with suppress(queue.Full):
                return self._queue.put(message, timeout=LOOK)

    def _send(self) -> None:
        while (message := self._queue.get()) is not None:
            dist.send(message, self._to, group=self._group)


class Inbox:
    """Receives the signals of one run from the stage before."""

    def __init__(self, source: int, group: dist.ProcessGroup, watch: Watch, device: torch.device) -> None:
        self._source, self._group, self._watch, self._device = source, group, watch, device
        self._queue: queue.Queue[tuple[int, Signal | None]] = queue.Queue(DEPTH)
        self._thread = _Thread(self._receive, "the connection from it broke", source)

    def get(self) -> tuple[int, Signal | None]:
        """Return the next step and its signal; None at the end."""
        while True:
            try:
                step, signal = self._queue.get(timeout=LOOK)
            except queue.Empty:
                self._thread.check(self._watch)
                continue
            if signal is None or self._device.type == "cpu":
                return step, signal
            return step, Signal(*(move_batch(part, self._device) for part in vars(signal).values()))

    def close(self) -> None:
        """Let the thread end; its connection has been aborted."""
        _drain(self._queue)  # the thread may be waiting for room
        self._thread.done(2 * EVERY)

    def _receive(self) -> None:
        capacity = torch.zeros(1, dtype=torch.int64)
        dist.recv(capacity, self._source, group=self._group)
        step, signal = END, None
        while capacity:
            message = torch.empty(int(capacity), dtype=torch.uint8)  # its own: signals share its memory
            dist.recv(message, self._source, group=self._group)
            step, signal = unpack(message)
            if signal is None:
                break
            self._queue.put((step, signal))
        self._queue.put((END, None))


class _Thread:
    """A daemon thread that keeps the exception that ended it."""

    def __init__(self, work: Callable[[], None], meaning: str, suspect: int | None) -> None:
        self._work, self._meaning, self._suspect = work, meaning, suspect
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="plywise link")
        self._thread.start()

    def done(self, seconds: float) -> bool:
        """Return whether it is done, within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def check(self, watch: Watch) -> None:
        """Raise PipelineError if the thread has died, or the watch has bad news."""
        watch.check()
        if isinstance(self._error, PipelineError):
            raise self._error
        if self._error is not None:
            watch.explain(self._error, self._meaning, self._suspect)

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error


def within(watch: Watch, work: Callable[[], Any], meaning: str) -> Any:
    """Do blocking work in a thread, and look at the watch meanwhile."""
    result: list[Any] = []
    thread = _Thread(lambda: result.append(work()), meaning, None)
    try:
        while not thread.done(LOOK):
            watch.check()
        thread.check(watch)
    except BaseException:
        thread.done(2 * EVERY)  # the watch has the connections aborted
        raise
    return result[0]


def _drain(box: "queue.Queue[Any]") -> None:
    while not box.empty():
        box.get_nowait()
