"""Jobs that do what users' code may do to the process of a trial."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Starts:
    """Starts a process that would live for an hour, and ends itself, by a signal, or too late."""

    note: str
    ends: str

    def run(self) -> dict[str, Any]:
        pid = os.fork()
        if not pid:
            time.sleep(3600)
            os._exit(0)
        Path(self.note).write_text(str(pid))
        if self.ends == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ends == "late":
            time.sleep(3600)
        return {"failure": None}

    def failed(self, why: str) -> dict[str, Any]:
        return {"failure": why}


@dataclass(frozen=True)
class Sleeps:
    """Sleeps for some seconds."""

    seconds: float

    def run(self) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {"failure": None}

    def failed(self, why: str) -> dict[str, Any]:
        return {"failure": why}
