"""Runs each trial in its own process, so that a crash harms no other trial."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType, ModuleType
from typing import Any, Protocol

import torch

from plywise._util.file_errors import describe_failure
from plywise._util.process_groups import begin_group, end_group
from plywise.arena.run.config import TIMEOUT_S
from plywise.arena.run.job import TrialJob
from plywise.errors import BenchError

STARTING = 600.0
"""Seconds until the process of a trial must have started: the first one waits for the import of torch."""

_SAFE_PATH = "PYTHONSAFEPATH"
_SCRIPT = "__main__"
PRELOADED = (
    "plywise.arena.run.executor",
    "plywise.arena.methods.peers",
    "plywise.arena.methods.rules",
    "plywise.arena.methods.learners",
    "torch._dynamo",  # torch.optim imports it with the first optimizer
    "pytorch_optimizer",  # where it is installed
)
"""Modules imported by the process from which trials are forked."""


class Executor(Protocol):
    """Runs trials.

    Attributes:
        count: trials at once.
        threads: torch's threads in each.
        timeout_s: seconds that each may take.
        start_s: seconds until a trial begins, roughly.
    """

    count: int
    threads: int
    timeout_s: float
    start_s: float

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its ledger line, in the order in which they end."""
        ...

    def stop(self) -> None:
        """End the running trials, for good: `run` gives those that have ended, and no more.

        May be called from a signal's handler while `run` waits.
        """
        ...


class InlineExecutor:
    """Runs trials in this process, one after the other. No process is started, and no trial can be stopped.

    Args:
        threads: torch's threads in each trial; None: as they are.
    """

    count = 1
    start_s = 0.0

    def __init__(self, threads: int | None = None) -> None:
        self.threads, self.timeout_s = threads or torch.get_num_threads(), math.inf
        self._stopped = False

    def stop(self) -> None:
        """Begin no other trial."""
        self._stopped = True

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its ledger line, in the order in which they come."""
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
    """Runs trials on this machine's cores, each in its own process.

    If a process is killed, or takes longer than ``timeout_s``, its trial has failed. The time counts from the
    start of the trial in its process. When the caller stops early, or calls `stop`, the running trials are
    ended, and so are all processes that they have started.

    Args:
        count: trials at once.
        threads: torch's threads in each.
        timeout_s: seconds that a trial may take.
    """

    start_s = 0.3

    def __init__(self, count: int = 1, threads: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        if count < 1 or threads < 1:
            raise BenchError(f"Workers and threads are at least 1, not {count} and {threads}.")
        self.count, self.threads, self.timeout_s = count, threads, timeout_s
        # forked from a process that has imported torch and has no threads: a start takes milliseconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._stopped, self._bell = self._context.Pipe(duplex=False)

    def stop(self) -> None:
        """See `Executor.stop`."""
        self._bell.send_bytes(b"stop")

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its line, in the order in which they end."""
        queue = iter(jobs)
        running: dict[Connection, _Worker] = {}
        try:
            while not self._stopped.poll():
                while len(running) < self.count and (job := next(queue, None)) is not None:
                    with hold_interrupts():
                        _start_forking()
                        worker = _Worker(self._context, job, self.threads, self.timeout_s)
                    running[worker.connection] = worker
                if not running:
                    return
                wait_s = min(worker.end for worker in running.values()) - time.monotonic()
                yield from self._collect_ended(running, max(0.0, wait_s))
            yield from self._collect_ended(running, 0.0)
        finally:
            for worker in running.values():
                worker.stop()

    def _collect_ended(
        self, running: dict[Connection, _Worker], wait_s: float
    ) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Wait until trials have ended, or `stop` is called: they, and their lines, leave those that run."""
        # of a process that is killed the connection may stay open: what it has started holds it, too
        gone = [worker.sentinel for worker in running.values()]
        ready = wait([*running, *gone, self._stopped], timeout=wait_s)
        now = time.monotonic()
        over = [own for own, one in running.items() if {own, one.sentinel} & {*ready} or one.end <= now]
        for connection in over:
            worker = running[connection]
            if connection in ready and worker.begins() and not connection.poll():
                continue  # of a quick trial the line may have come with its beginning
            del running[connection]
            yield worker.job, worker.outcome()


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Answer Ctrl-C after the block: a process whose start it broke off would print an error of its own."""
    answer = signal.getsignal(signal.SIGINT)
    if not callable(answer) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *given: held.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, answer)
        for given in held:
            answer(*given)


def _start_forking() -> None:
    """Start the process that trials are forked from, unless it runs, with Ctrl-C blocked.

    In a terminal Ctrl-C reaches it, too, and would end it while it imports torch.
    """
    resource_tracker.ensure_running()  # otherwise the server starts it, and unblocks Ctrl-C for it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    safe = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"  # else it would import a jinja2.py of the current directory
    try:
        forkserver.ensure_running()
    except OSError as error:  # a socket's name holds 107 bytes
        raise BenchError(
            f"No process can be started for a trial: {describe_failure(error)}. Its socket is in the folder "
            f"for temporary files, {tempfile.gettempdir()}: set TMPDIR to one with a short path."
        ) from error
    finally:
        _set_safe_path(safe)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _hide_script(job: TrialJob) -> Iterator[None]:
    """Let the trial's process not run the user's script again, which may have no guard.

    It would begin the bench once more. Addresses lead to a trial, unless it names something of the script.
    """
    script = sys.modules[_SCRIPT]
    if _SCRIPT.encode() not in pickle.dumps(job):
        sys.modules[_SCRIPT] = ModuleType(_SCRIPT)
    try:
        yield
    finally:
        sys.modules[_SCRIPT] = script


def _set_safe_path(value: str | None) -> None:
    """Set the variable that keeps Python from importing from the current directory as it was."""
    if value is None:
        os.environ.pop(_SAFE_PATH, None)
    else:
        os.environ[_SAFE_PATH] = value


class _Worker:
    """The process of one trial."""

    def __init__(self, context: Any, job: TrialJob, threads: int, timeout_s: float) -> None:
        self.job, self.timeout_s = job, timeout_s
        self._begun = False
        self.end = time.monotonic() + STARTING
        self.connection, theirs = context.Pipe(duplex=False)
        safe = os.environ.get(_SAFE_PATH)
        self._process = context.Process(target=_work, args=(job, threads, theirs, safe), daemon=True)
        try:
            with _hide_script(job):
                self._process.start()
        except FileNotFoundError as error:
            raise BenchError(
                f"No process can be started for a trial: its socket in {tempfile.gettempdir()} is gone. "
                "Something has emptied that folder while the bench ran. The trials that have ended are kept: "
                "resume the bench with --resume."
            ) from error
        self.sentinel: int = self._process.sentinel
        theirs.close()

    def begins(self) -> bool:
        """Return whether what was sent says that the trial begins; its time counts from then on."""
        if self._begun:
            return False
        try:
            self.end = float(self.connection.recv_bytes()) + self.timeout_s
        except (EOFError, OSError):
            return False
        self._begun = True
        return True

    def outcome(self) -> dict[str, Any]:
        """Return the trial's line, or the line of its failure."""
        try:
            if self.connection.poll():
                return json.loads(self.connection.recv_bytes())
            if self._process.exitcode is not None:
                raise EOFError
            if not self._begun:
                return self.job.failed(f"its process had not begun after {STARTING:g} s")
            return self.job.failed(f"took longer than {self.timeout_s:g} s")
        except (EOFError, OSError):
            self._process.join(10)
            return self.job.failed(f"its process was lost ({_exit(self._process.exitcode)})")
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, whatever it does, and what it has started."""
        end_group(self._process.pid)
        self._process.kill()
        self._process.join(10)
        self.connection.close()  # last: the process would complain that nobody reads it


def _work(job: TrialJob, threads: int, connection: Connection, safe_path: str | None) -> None:
    _set_safe_path(safe_path)  # as in the caller's process, not in the one that this was forked from

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who ends this process
    begin_group()
    torch.set_num_threads(threads)
    with suppress(BrokenPipeError):
        connection.send_bytes(str(time.monotonic()).encode())  # one clock for all processes of a machine
    line = job.run()
    with suppress(BrokenPipeError):  # the caller may have been interrupted, and gone
        connection.send_bytes(json.dumps(line, allow_nan=False).encode())
        connection.close()
    os._exit(0)  # torch's and a user's atexit handlers have nothing to do here


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"
