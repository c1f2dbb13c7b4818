"""Temporary folders of a command; what a killed command leaves is removed by the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from plywise._util.files import require_writable

PREFIX = ".plywise-scratch-"
_LOCK = "lock"


class Scratch:
    """A folder of its own; a context manager, too.

    It is removed by `close`, with this object, or at the end of this process, and it is locked until then.
    First, folders in the same parent whose lock is free are removed: they are left by killed processes.

    Args:
        parent: where to make it; it is made where missing. Default: the folder for temporary files.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        require_writable(parent)
        sweep(parent)
        # it gets its name with the lock held, or another process might sweep it
        making = Path(tempfile.mkdtemp(prefix=".plywise-making-", dir=parent))
        lock = FileLock(making / _LOCK)
        lock.acquire()
        self.path = making.rename(making.with_name(making.name.replace(".plywise-making-", PREFIX)))
        self._end = weakref.finalize(self, _remove, self.path, lock, made, os.getpid())

    def close(self) -> None:
        """Remove the folder, and those above it that were made for it and hold nothing else."""
        self._end()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: Path, lock: FileLock, made: Sequence[Path], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has a copy of the object, and the same folder
        return
    shutil.rmtree(path, ignore_errors=True)
    lock.release()
    with suppress(OSError):  # something is in it
        for folder in made:
            folder.rmdir()


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
