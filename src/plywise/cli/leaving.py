"""The user's code that ends the process of a command."""

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plywise._util.import_path import format_line, user_line


class ProcessExit(SystemExit):
    """Raised in place of a call of ``os._exit`` by the user's code."""

    def __str__(self) -> str:
        return f"os._exit({self.code!r})"


@contextmanager
def catch_exits() -> Iterator[None]:
    """Make ``os._exit`` raise where the user's code calls it in this process: it would end without a word.

    Elsewhere it does what it did: in processes that were forked, and where a library calls it.
    """
    leave, process = os._exit, os.getpid()

    def raise_or_leave(status: int) -> Any:
        line = format_line(traceback.extract_stack(sys._getframe(1)))
        if os.getpid() != process or not line:
            leave(status)
        if threading.current_thread() is threading.main_thread():
            raise ProcessExit(status)
        print(describe_exit(f"os._exit({status!r}){line}"), file=sys.stderr, flush=True)
        leave(status or 1)

    os._exit = raise_or_leave
    try:
        yield
    finally:
        os._exit = leave


def describe_exit(exit: SystemExit | str) -> str:
    """Say that the user's code has ended the command, and where.

    Args:
        exit: what it raised, or the call.
    """
    if isinstance(exit, SystemExit):
        code = "" if exit.code is None else repr(exit.code)
        name = "os._exit" if isinstance(exit, ProcessExit) else "sys.exit"
        exit = f"{name}({code}){user_line(exit)}"
    return (
        f"plywise: code that this command has run called {exit}, and the command ends unfinished: let it "
        "raise an exception, or return, instead."
    )
