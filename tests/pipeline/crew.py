"""Four processes that do one job after another, each with a process group of its own."""

import io
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from processes import CONTEXT

SIZE = 4
DEADLINE = 90.0

Job = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """What a process returned, or what it raised."""

    value: Any
    error: str
    raised: str = ""
    """The error's type."""


class Crew:
    """Processes that wait for jobs; close it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0
        self._hire()

    def _hire(self) -> None:
        pairs = [CONTEXT.Pipe() for _ in range(SIZE)]
        self._ends = [ours for ours, _ in pairs]
        self._processes = [CONTEXT.Process(target=serve, args=(theirs,)) for _, theirs in pairs]
        for process in self._processes:
            process.start()

    def run(self, world: int, job: Job, *args: Any) -> list[Any]:
        """What the processes return; raises if one raises."""
        outcomes = self.outcomes(world, job, *args)
        assert not any(outcome.error for outcome in outcomes), "\n".join(o.error for o in outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(self, world: int, job: Job, *args: Any) -> list[Outcome]:
        """What each process of ``world`` made of ``job(*args)``."""
        self._jobs += 1
        meeting = str(Path(self._folder.name) / f"meeting {self._jobs}")
        end = time.monotonic() + DEADLINE
        for rank, connection in enumerate(self._ends[:world]):
            connection.send((job, args, rank, world, meeting))
        outcomes = []
        for rank, connection in enumerate(self._ends[:world]):
            if not connection.poll(max(end - time.monotonic(), 0.0)):
                self._dismiss()
                self._hire()
                raise AssertionError(f"rank {rank} missed the deadline; before it: {outcomes}")
            outcomes.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False))
        return outcomes

    def _dismiss(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)

    def close(self) -> None:
        """End the processes."""
        self._dismiss()
        self._folder.cleanup()


def serve(connection: Connection) -> None:
    """Do jobs until the other end is closed."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            job, args, rank, world, meeting = connection.recv()
        except EOFError:
            return
        try:
            init, limit = f"file://{meeting}", timedelta(seconds=60)
            dist.init_process_group("gloo", init, rank=rank, world_size=world, timeout=limit)
            try:
                dist.barrier()  # who is done at once must not leave before the others have met it
                outcome = Outcome(job(*args), "")
            finally:
                dist.destroy_process_group()
        except Exception as error:
            outcome = Outcome(str(error), traceback.format_exc(), type(error).__name__)
        file = io.BytesIO()
        torch.save(outcome, file)
        connection.send_bytes(file.getvalue())
