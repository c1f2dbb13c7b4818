"""Describes the environment of a measurement: versions, processor, threads, devices."""

import os
import platform
import re
from pathlib import Path


def environment() -> dict[str, str | int]:
    """Versions and machine, in words, without the machine's name or any path.

    Example:
        >>> sorted(environment())[:3]
        ['blas', 'cores', 'cpu']
    """
    import numpy as np
    import torch

    from plywise._util.version import __version__

    return {
        "plywise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "blas": _blas(torch.__config__.show()),
        "devices": ", ".join(_devices()),
    }


def _cpu() -> str:
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_for(device: str, threads: int) -> int:
    """Return the default number of parallel trainings: the cores over the threads; 1 on any other device.

    On a GPU they would share its memory and disturb each other's times.
    """
    return max(1, cores() // max(1, threads)) if device == "cpu" else 1


def _blas(build: str) -> str:
    info = re.search(r"BLAS_INFO=(\w+)", build)
    return info[1] if info else "unknown"


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
