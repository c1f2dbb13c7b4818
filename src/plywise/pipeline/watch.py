"""Heartbeats: every process notices, and can name, a stage that was killed, stopped or cut off.

Each process counts up a key of its own in a store and looks at everyone's. A count that stands still for
``timeout_s`` seconds belongs to a stage that is gone; so does the store itself, which lives in the first one.
A process that fails, or notices that another is gone, writes this into the store, so that all report the
first cause.
"""

import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from plywise.errors import PipelineError

EVERY = 0.5  # seconds between two looks
FAILED = "failed"
STOP = "stop"
DONE = "done"


def prepare(store: TCPStore, processes: int) -> None:
    """Make a store ready for the watches of so many processes; before the others know of it."""
    store.set(FAILED, "")
    store.set(STOP, "")
    for rank in range(processes):
        store.set(_beat(rank), "0")


def decline(store: TCPStore, rank: int, why: str) -> None:
    """Say in a store why a process will not take part."""
    store.set(FAILED, why)
    store.set(_beat(rank), DONE)


class Watch:
    """Watches the processes of a pipeline.

    Only one thread talks to the store, which may not answer. Another one compares with the clock.

    Args:
        store: a connection for this object alone, after `prepare`.
        rank: this process.
        names: what each process is called, by rank.
        timeout_s: seconds without a sign of life until a process counts as lost.
        alarm: called once, when there is trouble and the others had time to learn of it.

    Attributes:
        stop_asked: whether some process has asked to stop.
    """

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        names: list[str],
        timeout_s: float,
        alarm: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._rank, self._names, self._alarm = store, rank, names, alarm
        self.timeout_s = timeout_s
        self.stop_asked = False
        self._trouble: str | None = None
        self._news: str | None = None  # for the others
        self._first = threading.Lock()  # of several causes, the first counts
        self._looks, self._looked = 0, time.monotonic()
        self._seen = {other: ("", self._looked) for other in range(len(names)) if other != rank}
        self._leaving, self._wake = threading.Event(), threading.Event()
        self._told, self._over = threading.Event(), threading.Event()
        store.set_timeout(timedelta(seconds=timeout_s))
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True, name="plywise watch").start()

    def ask_to_stop(self) -> None:
        """Let every process's ``stop_asked`` say so soon. Takes no lock: for signal handlers."""
        self.stop_asked = True

    def check(self, because: BaseException | None = None) -> None:
        """Raise PipelineError if some process is lost or has failed."""
        if self._trouble is not None:
            raise PipelineError(
                f"{self._names[self._rank]} stops: {self._trouble}. Start again from the last checkpoint; "
                "torchrun --max-restarts does so by itself.",
                see="pipeline-lost",
            ) from because

    def wait_for_failure(self, looks: int | None = None) -> None:
        """After a connection broke: wait until there is trouble, or nobody can know of any.

        Args:
            looks: so many looks at the store are enough; default: until silence would have been noticed.
        """
        looked, start = self._looks, time.monotonic()
        while self._trouble is None and not self._over.is_set():
            if looks is not None and self._looks >= looked + looks:
                return
            if time.monotonic() - start > self.timeout_s + 2 * EVERY:
                return
            time.sleep(EVERY / 20)

    def explain(self, error: BaseException, meaning: str, suspect: int | None = None) -> NoReturn:
        """Raise PipelineError after a connection broke: a neighbour may only have stopped because of a third.

        Args:
            error: what happened.
            meaning: the same in words, for the case that no process knows more.
            suspect: the rank at the other end, if it was one.
        """
        # who stops for a reason has said so before; the second look began after the connection broke
        self.wait_for_failure(None if suspect is None else 2)
        who = "" if suspect is None else f"{self._name_process(suspect)} is gone: "
        self._sound_alarm(f"{who}{meaning} ({str(error).partition(chr(10))[0][:160]})")
        self.check(error)
        raise AssertionError

    def report_failure(self, what: str) -> None:
        """Let the others know why this process fails, unless they know of something earlier; best effort."""
        with self._first:
            self._news = self._news or f"{self._name_process(self._rank)} failed: {what}"
        self._wake.set()
        if not self._over.is_set():
            self._told.wait(2 * EVERY)

    def close(self) -> None:
        """Stop looking, and tell the others not to wait for this process any more.

        The first process has the store: it stays until every other one has left or is lost.
        """
        self._leaving.set()
        self._wake.set()
        start = time.monotonic()
        while not self._over.wait(EVERY / 10):
            if self._rank == 0:
                limit = math.inf if self._trouble is None else self.timeout_s / 2
            else:
                limit = self.timeout_s if self._trouble is None else 2 * EVERY
            if time.monotonic() - start > limit:
                return

    def _talk(self) -> None:
        try:
            while not self._leaving.is_set():
                self._exchange(str(self._looks))
                self._wake.wait(EVERY)
                self._wake.clear()
            self._exchange(str(self._looks))  # news, if there are any
            self._store.set(_beat(self._rank), DONE)
            while self._rank == 0 and self._is_awaited():
                time.sleep(EVERY / 10)
                self._exchange(DONE)
        except (RuntimeError, DistError) as error:
            if not self._leaving.is_set():
                first_line = str(error).partition("\n")[0][:120]
                self._sound_alarm(
                    f"{self._name_process(0)} was killed or cut off: its store is gone ({first_line})"
                )
        finally:
            self._over.set()

    def _exchange(self, beat: str) -> None:
        news = self._news
        self._store.set(_beat(self._rank), beat)
        if news is not None:
            self._store.compare_set(FAILED, "", news)
        if self.stop_asked:
            self._store.set(STOP, "asked")
        answers = self._store.multi_get([FAILED, STOP, *map(_beat, self._seen)])
        failed, stop, *beats = (answer.decode() for answer in answers)
        self.stop_asked = self.stop_asked or bool(stop)
        now = time.monotonic()
        for other, new in zip(self._seen, beats, strict=True):
            if new != self._seen[other][0]:
                self._seen[other] = new, now
        self._looks, self._looked = self._looks + 1, now
        if news is not None:
            self._told.set()
        if failed:
            self._sound_alarm(failed)

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._over.wait(EVERY / 5) and self._trouble is None:
            now = time.monotonic()
            if now - last > self.timeout_s / 2:  # it was this process that stood still: look again first
                self._looked = now
                self._seen = {other: (beat, now) for other, (beat, _) in self._seen.items()}
            last = now
            if now - self._looked > self.timeout_s:
                self._sound_alarm(f"{self._name_process(0)} has not answered for {now - self._looked:.0f} s")
            elif silent := [other for other in self._seen if self._is_silent(other)]:
                who = ", ".join(map(self._name_process, silent))
                self._sound_alarm(f"no sign of life from {who} for {self.timeout_s:.0f} s")
        if self._trouble is not None:
            self._told.wait(2 * EVERY)  # before connections break
            self._alarm()

    def _is_silent(self, other: int) -> bool:
        beat, when = self._seen[other]
        return beat != DONE and self._looked - when > self.timeout_s  # as of the store's last answer

    def _is_awaited(self) -> bool:
        return any(beat != DONE and not self._is_silent(other) for other, (beat, _) in self._seen.items())

    def _sound_alarm(self, trouble: str) -> None:
        with self._first:
            self._trouble = self._trouble or trouble
            self._news = self._news or trouble
        self._wake.set()

    def _name_process(self, rank: int) -> str:
        return f"{self._names[rank]} (rank {rank})"


def _beat(rank: int) -> str:
    return f"beat {rank}"
