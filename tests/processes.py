"""Processes of the tests' own: forked from one that has imported torch."""

import os
import subprocess
import sys
from pathlib import Path

from plywise.testing.processes import CONTEXT, DEADLINE, two_ranks

__all__ = ["CONTEXT", "DEADLINE", "ForkedCommand", "two_ranks"]


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
