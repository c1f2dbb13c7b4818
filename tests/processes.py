"""Processes of the tests' own: forked from one that has imported torch."""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from plywise.testing.processes import CONTEXT, DEADLINE, run_two_ranks

__all__ = ["CONTEXT", "DEADLINE", "ForkedCommand", "run_two_ranks"]


class ForkedCommand:
    """A command in a process forked from one that has imported torch, with the methods of `Popen`.

    It works in this process's folder and finds the modules that this process finds. A Python of its own would
    take seconds of a processor to start. What tests a start itself (which modules are imported, where modules
    are searched) needs one.

    Args:
        words: the command line, which begins with ``plywise``, ``torchrun`` or ``python`` and a file.
        environment: what is added to the environment.
        out: where its standard output goes.
        err: where its standard error goes.
        session: whether it begins a session, so that a signal to its process group reaches what it starts.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        out: Path = Path("out"),
        err: Path = Path("err"),
        *,
        session: bool = False,
    ) -> None:
        self._out, self._err = out, err
        for path in (out, err):
            path.write_bytes(b"")
        args = (list(words), dict(environment or {}), str(out.resolve()), str(err.resolve()), session)
        self._process = CONTEXT.Process(target=_run_command, args=args)
        self._process.start()
        self.kill = self._process.kill

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = DEADLINE) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("plywise", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = DEADLINE) -> tuple[str, str]:
        """Wait for its end; return what it has written to standard output and error."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()


def _run_command(words: list[str], environment: dict[str, str], out: str, err: str, session: bool) -> None:
    if session:
        os.setsid()
    # a server of forks that a bench has started blocks Ctrl-C, and what it forks inherits that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        with open(path, "wb", 0) as file:
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    program, *rest = words
    if program == "plywise":
        from plywise.cli import main
    elif program == "torchrun":
        from torch.distributed.run import main
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name="__main__")
        return
    sys.argv = words
    main(rest)
