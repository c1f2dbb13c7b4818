"""Runs trials on the machines of a Ray cluster."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from plywise._util.extras import import_extra
from plywise._util.scratch import Scratch
from plywise.arena.run.config import TIMEOUT_S
from plywise.arena.run.executor import ProcessExecutor
from plywise.arena.run.job import TrialJob
from plywise.data.parts import Data
from plywise.errors import MORE, BenchError

GRACE = 10.0
"""Seconds that cancelled trials have to end, and that a cluster has to answer."""
POLL_S = 0.5
"""Seconds between two looks whether `RayExecutor.stop` has been called."""


class RayExecutor:
    """The CPUs of a Ray cluster, a process for each trial.

    A trial runs as with `ProcessExecutor`: its process is forked from one that has imported torch. If it is
    killed, takes longer than ``timeout_s``, or its machine is lost, the trial has failed. Each workload's
    data are sent once. When the caller stops early, or calls `stop`, running trials are ended.

    The machines need the same Python, torch and plywise. A model, data or method of your own, as module:name,
    must be importable there: from the same folder, where the machines share their disks, or installed.

    This process connects to the cluster, or starts one, and leaves it when it ends. If Ray is connected
    already, that connection is used, whatever the address.

    Args:
        address: ``host:port`` of a cluster that this machine is part of; "auto" finds it; "local" starts one
            on this machine's cores.
        threads: torch's threads in each trial, and CPUs that each one takes.
        timeout_s: seconds that a trial may take.

    Attributes:
        count: trials at once.

    Raises:
        PlywiseError: Ray is not installed, there is no cluster, or no machine of it has that many CPUs.

    Example:
        >>> RayExecutor("local", threads=0)
        Traceback (most recent call last):
        plywise.errors.BenchError: Threads are at least 1, not 0.
        More: plywise help bench-error
    """

    start_s = ProcessExecutor.start_s

    def __init__(self, address: str = "auto", threads: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        if threads < 1:
            raise BenchError(f"Threads are at least 1, not {threads}.")
        self.threads, self.timeout_s = threads, timeout_s
        self._ray = _connect(address)
        cpus = [node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]]
        self.count = sum(int(own // threads) for own in cpus)
        if not self.count:
            raise BenchError(
                f"No machine of the Ray cluster {address} has {threads} CPUs: they have "
                f"{', '.join(f'{own:g}' for own in cpus)}. Take fewer --threads."
            )
        self._stopped = False

    def stop(self) -> None:
        """See `Executor.stop`."""
        self._stopped = True

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Each job with its ledger line, in the order in which they end.

        Raises:
            PlywiseError: the cluster cannot run trials at all: it is gone, or plywise or your module is not
                on its machines.
        """
        queue = iter(jobs)
        sent: dict[str, Any] = {}
        running: dict[Any, TrialJob] = {}
        try:
            while not self._stopped:
                while len(running) < self.count and (job := next(queue, None)) is not None:
                    running[self._start(job, sent)] = job
                if not running:
                    return
                yield from self._collect_ended(running, POLL_S)
            if running:
                yield from self._collect_ended(running, 0.0)
        finally:
            for answer in running:
                self._ray.cancel(answer)
            if running:  # this process may end next, and Ray's would not live to end the trials
                self._ray.wait(list(running), num_returns=len(running), timeout=GRACE)

    def _collect_ended(
        self, running: dict[Any, TrialJob], wait_s: float
    ) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Wait for a trial to end, so many seconds: all that have, and their lines, leave those that run."""
        self._ray.wait(list(running), timeout=wait_s)
        ready, _ = self._ray.wait(list(running), num_returns=len(running), timeout=0)
        for answer in ready:
            job = running.pop(answer)
            yield job, self._outcome(job, answer)

    def _start(self, job: TrialJob, sent: dict[str, Any]) -> Any:
        """Start a trial; the first trial that needs data sends them."""
        if job.data not in sent:
            sent[job.data] = self._ray.put(Data.load(Path(job.data)))
        gpus = float(job.device.startswith("cuda"))
        task = self._ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=0)(_work)
        place = (os.getcwd(), tuple(sys.path))
        return task.remote(job, sent[job.data], self.threads, self.timeout_s, place)

    def _outcome(self, job: TrialJob, answer: Any) -> dict[str, Any]:
        """Return the trial's line, or the line of its failure."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            return job.failed(f"its process was lost ({type(error).__name__} on Ray)")
        except errors.RayError as error:
            raise BenchError(
                f"The Ray cluster cannot run {job.key.method}: {_find_last_line(error)}. Its machines need "
                "the same Python, torch and plywise as this one, and your own modules at the same place or "
                "installed."
            ) from error


def _work(
    job: TrialJob, data: Data, threads: int, timeout_s: float, place: tuple[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Run a trial as a task of Ray: start it in another process, and wait for it."""
    folder, path = place
    if Path(folder).is_dir():
        os.chdir(folder)
    sys.path[:] = [*path, *(one for one in sys.path if one not in path)]
    job.source.find_method(job.key.method)  # what is not on this machine is not an outcome of the trial
    job.source.require()
    # what Ray cancels by does not end a wait: a signal each second does, and then the interrupt is seen
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    with Scratch() as scratch:
        data.save(file := scratch.path / "data.pt")
        executor = ProcessExecutor(1, threads, timeout_s)
        return next(line for _, line in executor.run([replace(job, data=str(file))]))


def _connect(address: str) -> Any:
    """Return the module `ray`, connected."""
    ray = import_extra("ray", "--ray needs Ray: pip install 'plywise[ray]'.")
    if ray.is_initialized():
        return ray
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # at Ray's niceness of 15 a trial beside other work would meet its time limit while it imports
    os.environ.setdefault("RAY_worker_niceness", "0")
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray would try for minutes where nobody listens
            socket.create_connection((host, int(port)), timeout=GRACE).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise BenchError(
            f"There is no Ray cluster at {address!r} ({_find_last_line(error)}). Start one with `ray start "
            "--head` on one machine and `ray start --address=HOST:PORT` on the others, or take --ray local."
        ) from error
    return ray


def _find_last_line(error: BaseException) -> str:
    """The last line of an error, without a full stop: Ray's first ones are a traceback, its last our note."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(MORE)]
    return lines[-1].rstrip(".") if lines else type(error).__name__
