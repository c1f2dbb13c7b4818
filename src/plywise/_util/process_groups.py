"""Process groups: they end what user code started in a process together with that process."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress

_following = threading.Lock()  # held for good by the one thread that follows torchrun


def begin_group() -> None:
    """Make this child process, and all that it will start, a group that ends with its parent."""
    with suppress(OSError, AttributeError):  # not on Windows
        os.setpgid(0, 0)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def end_with_torchrun() -> None:
    """End this process when the torchrun that started it is gone: the others of its run may never come.

    Call it as early as possible: a process that torchrun starts in its own last moment is not recognised.
    Without torchrun nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and _following.acquire(blocking=False):
        threading.Thread(target=_leave_with_torchrun, args=(os.getppid(),), daemon=True).start()


def end_group(leader: int | None) -> None:
    """End all processes of a group, its leader among them, if there are any."""
    with suppress(OSError, AttributeError):
        if leader:
            os.killpg(leader, signal.SIGKILL)


def _leave_with_parent() -> None:
    """End this group when the process that asked for it is gone: nothing waits for its result any more.

    This is not its parent: a fork server lives as long as any process that it forked.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    end_group(os.getpid())
    os._exit(1)


def _leave_with_torchrun(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    with suppress(OSError):  # it may be that nobody reads it
        sys.stderr.write("plywise: torchrun has gone, and this process ends with it.\n")
        sys.stderr.flush()
    os._exit(1)
