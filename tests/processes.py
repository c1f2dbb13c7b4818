"""Processes of the tests' own: forked from one that has imported torch, waited for, and never left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["plywise.pipeline.pipeline", "plywise.local.local_loss", "plywise.rules.foof", "torch._dynamo"]
)  # the last is what the first step of an optimizer imports
DEADLINE = 120.0


class ForkedCommand:
    """A command of plywise in a process forked from one that has imported torch, with the methods of `Popen`.

    It works in this process's folder. A Python of its own would take seconds to start.

    Args:
        words: what follows ``plywise`` on the command line.
        environment: what is added to the environment.
        out: where its standard output goes.
        err: where its standard error goes.
    """

    def __init__(self, words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
        out.touch()
        err.touch()
        self._process = CONTEXT.Process(target=_run_command, args=(words, environment, str(out), str(err)))
        self._process.start()
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("plywise", timeout)
        return self._process.exitcode


def _run_command(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        with open(path, "wb", 0) as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["plywise", *words]
    from plywise.cli import main

    main(words)


def two_ranks(
    main: Callable[..., None], folder: Path, *args: Any, codes: tuple[int, int] = (0, 0)
) -> list[dict[str, Any]]:
    """What two processes of ``main(rank, folder, *args)`` left in ``folder/rank.pt``.

    They have to end with ``codes``.
    """
    processes = [CONTEXT.Process(target=main, args=(rank, folder, *args)) for rank in range(2)]
    end = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(end - time.monotonic(), 0.0))
        found = tuple(process.exitcode for process in processes)
        assert found == codes, "a rank failed or missed the deadline"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
