"""Process groups: what user code starts in a process ends with that process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress


def begin_group() -> None:
    """Make this child process, and all that it will start, a group that ends with its parent."""
    with suppress(OSError, AttributeError):  # not on Windows
        os.setpgid(0, 0)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def end_group(leader: int | None) -> None:
    """End all processes of a group, its leader among them, if there are any."""
    with suppress(OSError, AttributeError):
        if leader:
            os.killpg(leader, signal.SIGKILL)


def _leave_with_parent() -> None:
    """End this group when the process that asked for it has gone: nobody waits for its outcome any more.

    That is not the one that it was forked from: a fork server lives for as long as a process of its does.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    end_group(os.getpid())
    os._exit(1)
