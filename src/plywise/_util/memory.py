"""How much memory this process may still take."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that can be taken before the machine, or the container around this process, is full.

    None where the system does not say.

    Example:
        >>> free = free_memory()
        >>> free is None or free > 0
        True
    """
    known = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(known) if known else None


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):  # not Linux
        return None


def _of_container() -> int | None:
    try:
        most, taken = (
            int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # no limit is the word "max"
        return None
    return max(1, most - taken)
