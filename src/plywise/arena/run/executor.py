"""Trials in processes of their own: what kills one harms no other."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from plywise.arena.run.job import TrialJob
from plywise.errors import PlywiseError

TIMEOUT_S = 600.0
"""Seconds that a trial may take, all in all, unless told otherwise or planned to take long."""

PRELOADED = (
    *("plywise.arena.run.executor", "plywise.arena.methods.peers", "plywise.arena.methods.rules"),
    *("plywise.arena.methods.learners", "torch._dynamo"),  # torch.optim imports it with the first optimizer
    "pytorch_optimizer",  # where it is installed
)
"""What the process has imported that trials are forked from."""


class Executor(Protocol):
    """Runs trials.

    Attributes:
        count: trials at once.
        threads: torch's threads in each.
        timeout_s: seconds that each may take.
    """

    count: int
    threads: int
    timeout_s: float

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its ledger line, in the order in which they end."""
        ...

    def stop(self) -> None:
        """End the running trials, for good: `run` gives those that have ended, and no more.

        May be called from a signal's handler while `run` waits.
        """
        ...


class InlineExecutor:
    """This very process, one trial after the other: nothing to start, and no trial can be ended from outside.

    Args:
        threads: torch's threads in each trial; None: as they are.
    """

    count = 1

    def __init__(self, threads: int | None = None) -> None:
        import torch

        self.threads, self.timeout_s = threads or torch.get_num_threads(), math.inf
        self._stopped = False

    def stop(self) -> None:
        """Begin no other trial."""
        self._stopped = True

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its ledger line, in the order in which they come."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for job in jobs:
                if self._stopped:
                    return
                yield job, json.loads(json.dumps(job.run(), allow_nan=False))
        finally:
            torch.set_num_threads(before)


class ProcessExecutor:
    """This machine's cores, a process for each trial.

    A process that is killed, or takes longer than ``timeout_s``, is an outcome of its trial. When the caller
    stops early, or calls `stop`, the running trials are ended.

    Args:
        count: trials at once.
        threads: torch's threads in each.
        timeout_s: seconds that a trial may take.
    """

    def __init__(self, count: int = 1, threads: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        if count < 1 or threads < 1:
            raise PlywiseError(
                f"Workers and threads are at least 1, not {count} and {threads}.", see="error-bench"
            )
        self.count, self.threads, self.timeout_s = count, threads, timeout_s
        # forked from a process that has imported torch and has no threads: a start takes milliseconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._stopped, self._bell = self._context.Pipe(duplex=False)

    def stop(self) -> None:
        """End the running trials, for good: `run` gives those that have ended, and no more.

        May be called from a signal's handler while `run` waits.
        """
        self._bell.send_bytes(b"stop")

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its line, in the order in which they end."""
        queue = iter(jobs)
        running: dict[Connection, _Worker] = {}
        try:
            while not self._stopped.poll():
                while len(running) < self.count and (job := next(queue, None)) is not None:
                    _start_forking()
                    worker = _Worker(self._context, job, self.threads, self.timeout_s)
                    running[worker.connection] = worker
                if not running:
                    return
                wait_s = min(worker.end for worker in running.values()) - time.monotonic()
                yield from self._ended(running, max(0.0, wait_s))
            yield from self._ended(running, 0.0)
        finally:
            for worker in running.values():
                worker.stop()

    def _ended(
        self, running: dict[Connection, _Worker], wait_s: float
    ) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Wait until trials have ended, or `stop` is called: they, and their lines, leave those that run."""
        ready = wait([*running, self._stopped], timeout=wait_s)
        now = time.monotonic()
        for connection in [own for own, one in running.items() if own in ready or one.end <= now]:
            worker = running.pop(connection)
            yield worker.job, worker.outcome()


def _start_forking() -> None:
    """Start the process that trials are forked from, unless it is there: deaf to Ctrl-C, as they are then.

    In a terminal Ctrl-C reaches it, too, and would end it while it imports torch.
    """
    resource_tracker.ensure_running()  # else the next line starts it, and leaves Ctrl-C to be heard
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    except OSError as error:  # a socket's name holds 107 bytes
        raise PlywiseError(
            f"No process can be started for a trial: {error}. Its socket is in the folder for temporary "
            f"files, {tempfile.gettempdir()}: set TMPDIR to one with a short path.",
            see="error-bench",
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """The process of one trial."""

    def __init__(self, context: Any, job: TrialJob, threads: int, timeout_s: float) -> None:
        self.job, self.timeout_s = job, timeout_s
        self.end = time.monotonic() + timeout_s
        self.connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(job, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def outcome(self) -> dict[str, Any]:
        """The line that it sent, or that it did not."""
        try:
            if self.connection.poll():
                line: dict[str, Any] = json.loads(self.connection.recv_bytes())
                return line
            return self.job.failed(f"took longer than {self.timeout_s:g} s")
        except (EOFError, OSError):
            self._process.join(10)
            return self.job.failed(f"its process was lost ({_exit(self._process.exitcode)})")
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join(10)
        self.connection.close()  # last: the process would complain that nobody reads it


def _work(job: TrialJob, threads: int, connection: Connection) -> None:
    """What the process of a trial does."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who ends this process
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    line = job.run()
    with suppress(BrokenPipeError):  # the caller may have been interrupted, and gone
        connection.send_bytes(json.dumps(line, allow_nan=False).encode())
        connection.close()
    os._exit(0)  # torch's and a user's atexit handlers have nothing to do here


def _exit_with(parent: int) -> None:
    """End this process when the one that forks trials has gone: nobody waits for its line any more."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"
