"""Processes of a pipeline that may come to harm; none outlives its test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from processes import CONTEXT

from . import stage
from .starting import enter, environment

START = 90.0  # seconds; a machine with other work is slow to import torch
PROMISE = 15.0
"""Seconds until every other stage has noticed and named a lost one."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Fleet:
    """``pipeline.stage`` in processes of its own; a context manager that kills what is left.

    Args:
        folder: for reports and checkpoints.
        world: number of processes.
        settings: see `pipeline.stage.main`.
        fresh: ranks that are a Python of their own, which ends as a script does. Others are forked from one
            that has imported torch: much faster.
        hosts: of forked ones, by rank, the network namespace that each is in. Default: none of its own.
        **places: more of the environment.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        settings: dict[str, Any],
        *,
        fresh: Collection[int] = (),
        hosts: Sequence[str] = (),
        **places: Any,
    ) -> None:
        self._folder = folder
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": world, **places}
        self.port = int(where["MASTER_PORT"])
        self._processes: list[_Forked | _Fresh] = []
        for rank in range(world):
            place = {name: str(value) for name, value in {"RANK": rank, **where}.items()}
            log = folder / f"{rank}.log"
            if rank in fresh:
                self._processes.append(_Fresh(place, log, folder, settings))
            else:
                host = hosts[rank] if hosts else None
                self._processes.append(_Forked(place, log, folder, settings, host))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            assert process.code(10) is not None

    def step(self, rank: int) -> int:
        """How far a process is."""
        path = self._folder / f"{rank}.step"
        return int((path.read_text() if path.exists() else "") or 0)

    def wait_for_step(self, rank: int, step: int) -> None:
        """Wait until a process is so far."""
        end = time.monotonic() + START
        while self.step(rank) < step:
            assert time.monotonic() < end, f"step {step} was not reached before the deadline\n{self.logs()}"
            assert all(process.code(0) is None for process in self._processes), self.logs()
            time.sleep(0.01)

    def hit(self, rank: int, how: signal.Signals) -> float:
        """Send a signal; the time of it."""
        now = time.monotonic()
        os.kill(self._processes[rank].pid, how)
        return now

    def report(self, rank: int, end: float) -> dict[str, Any]:
        """What a process's run ended with, once it has; by a moment that must not pass."""
        path = self._folder / f"{rank}.json"
        while not path.exists():
            assert time.monotonic() < end, f"nothing from rank {rank} before the deadline\n{self.logs()}"
            time.sleep(0.01)
        return dict(json.loads(path.read_text()))

    def exit_code(self, rank: int, end: float) -> int:
        """How a process ended; by a moment that must not pass."""
        code = self._processes[rank].code(max(end - time.monotonic(), 0.0))
        assert code is not None, f"rank {rank} does not end\n{self.logs()}"
        return code

    def listening(self) -> list[tuple[str, int]]:
        """Addresses and ports where these processes listen; from Linux's /proc."""
        sockets = set()
        for process in self._processes:
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(os.readlink(link))
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    address, port = fields[1].split(":")
                    found.append((_dotted(address), int(port, 16)))
        return found

    def log(self, rank: int) -> str:
        """What a process has printed."""
        return (self._folder / f"{rank}.log").read_text(errors="replace")

    def logs(self) -> str:
        """What all have printed."""
        return "\n".join(f"rank {rank}:\n{self.log(rank)[-3000:]}" for rank in range(len(self._processes)))


class _Fresh:
    """A Python of its own."""

    def __init__(self, place: dict[str, str], log: Path, folder: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "pipeline.stage", str(folder), json.dumps(settings)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, env=environment(**place), stdout=file, stderr=file)
        self.pid, self.kill = self._process.pid, self._process.kill

    def code(self, seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode


class _Forked:
    """A fork of a process that has imported torch."""

    def __init__(
        self, place: dict[str, str], log: Path, folder: Path, settings: dict[str, Any], host: str | None
    ) -> None:
        log.touch()
        args = (place, str(log), host, stage.main, folder, settings)
        self._process = CONTEXT.Process(target=enter, args=args)
        self._process.start()
        self.pid, self.kill = int(self._process.pid), self._process.kill

    def code(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


def _dotted(address: str) -> str:
    """An IPv4 address from the way Linux writes it; one of IPv6 as it stands."""
    return address if len(address) > 8 else socket.inet_ntoa(bytes.fromhex(address)[::-1])
