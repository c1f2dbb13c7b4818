"""What the tests' processes find when they start: their place, their host, a file for their words."""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
"""What tells a process of a pipeline where it is."""


def environment(**more: Any) -> dict[str, str]:
    """This environment with tests/ to import from, without another run's places."""
    kept = {name: value for name, value in os.environ.items() if name not in PLACE}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in more.items()}}


def enter(
    places: Mapping[str, str], log: str, host: str | None, main: Callable[..., None], *args: Any
) -> None:
    """Begin a forked process: with this environment, its words in a file, on a host (a network namespace)."""
    os.environ.update(places)
    with open(log, "wb", 0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    if host is not None:
        with open(f"/var/run/netns/{host}") as namespace:
            entered = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0)
        assert entered == 0, os.strerror(ctypes.get_errno())
    main(*args)
