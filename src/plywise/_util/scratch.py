"""Temporary folders of a command; what a killed command leaves is removed by the next one."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from plywise._util.files import require_writable

PREFIX = ".plywise-scratch-"
_LOCK = "lock"


class Scratch:
    """A folder of its own, removed by `close`; a context manager, too.

    It holds a lock as long as this process lives. First, folders in the same parent whose lock is free are
    removed: they are left by killed processes.

    Args:
        parent: where to make it; it is made where missing. Default: the folder for temporary files.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        require_writable(parent)
        sweep(parent)
        # it gets its name with the lock held, or another process might sweep it
        making = Path(tempfile.mkdtemp(prefix=".plywise-making-", dir=parent))
        self._lock = FileLock(making / _LOCK)
        self._lock.acquire()
        self.path = making.rename(making.with_name(making.name.replace(".plywise-making-", PREFIX)))

    def close(self) -> None:
        """Remove the folder, and those above it that were made for it and hold nothing else."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        with suppress(OSError):  # something is in it
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep(parent: Path) -> None:
    """Remove the folders that killed processes have left."""
    for left in parent.glob(f"{PREFIX}*"):
        lock = FileLock(left / _LOCK)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # it is in use, or another user's
            continue
        shutil.rmtree(left, ignore_errors=True)
        lock.release()
