"""The command line, one file a command.

Nothing here imports torch: commands import what is heavy when they run, so that ``--help`` answers at once.
"""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from plywise._util.file_errors import describe_failure, explaining_files
from plywise._util.process_groups import end_with_torchrun
from plywise._util.suggest import suggestion
from plywise._util.version import __version__
from plywise.cli import (
    bench,
    completion,
    demo,
    diagnose,
    doctor,
    explain,
    help,
    methods,
    pipeline,
    report,
    reproduce,
    train,
    workloads,
)
from plywise.cli.console import VOLUME, plain_warnings, take_any_encoding
from plywise.cli.leaving import catch_exits, describe_exit
from plywise.errors import PlywiseError
from plywise.registry.find import ROOMS
from plywise.registry.names import WORKLOAD_MODULES

THREADS_S = 5.0
"""Seconds that threads of the user's code may run on after the end of a command."""

app = App(
    name="plywise",
    help="Train PyTorch networks layer by layer: every layer solves its own local problem.",
    version=__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # ours says what was kept
)
for _command in (
    demo.demo,
    bench.bench,
    report.report,
    reproduce.reproduce,
    train.train,
    pipeline.pipeline,
    methods.app,
    workloads.app,
    explain.explain,
    diagnose.diagnose,
    doctor.doctor,
    help.help,
    completion.completion,
):
    app.command(_command)
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Annotated[
        bool, Parameter(("--quiet", "-q"), negative=(), show_default=False, group="Any command")
    ] = False,
    verbose: Annotated[
        bool, Parameter(("--verbose", "-v"), negative=(), show_default=False, group="Any command")
    ] = False,
) -> Any:
    """Run a command.

    Args:
        words: the command and what it is given.
        quiet: print results and errors only: no plans, no progress.
        verbose: leave a line for each piece of work, and show where an error comes from.
    """
    VOLUME.quiet, VOLUME.verbose = quiet, verbose
    # cyclopts prints what is wrong with the words itself
    return app(words, exit_on_error=False, result_action="return_value")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 it failed, 2 wrong usage, 130 interrupted.

    Args:
        arguments: the words after ``plywise``; those of the process by default.
    """
    end_with_torchrun()  # here for `torchrun ... $(which plywise)`: what a command imports takes seconds
    before = threading.enumerate()
    take_any_encoding()
    status = _run(arguments)
    _limit_threads(before, status)
    sys.exit(status)


def _limit_threads(before: list[threading.Thread], status: int) -> None:
    """End the process with threads that the user's code has left running: Python would wait for ever."""
    left = [thread for thread in threading.enumerate() if not (thread.daemon or thread in before)]
    if left:
        timer = threading.Timer(THREADS_S, _leave, (left, status))
        timer.daemon = True
        timer.start()


def _leave(threads: list[threading.Thread], status: int) -> None:
    names = ", ".join(thread.name for thread in threads if thread.is_alive())
    print(
        f"plywise: threads that your code has started still run {THREADS_S:g} s after the end: {names}. They "
        "are ended now; join them, or make them daemons.",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with catch_exits(), plain_warnings(), explaining_files():
            status = app.meta(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError as error:
        _suggest_command(error)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {str(interrupt) or 'Nothing new was kept.'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _end_unread()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich raises it so
            return _end_unread()
        print(describe_exit(leaving), file=sys.stderr)
        return 1
    except (PlywiseError, OSError) as error:
        if VOLUME.verbose:
            traceback.print_exception(error)
            return 1
        print(f"plywise: {_describe(error)}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    finally:
        VOLUME.quiet = VOLUME.verbose = False
    return status if isinstance(status, int) else 0


def _describe(error: PlywiseError | OSError) -> str:
    if isinstance(error, PlywiseError):
        return str(error)
    # errors about a file have become errors of ours
    is_output = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return f"{describe_failure(error, Path('standard output') if is_output else None)}."


def _end_unread() -> int:
    """Return the exit code of a command whose output is read no more, as in ``plywise methods | head``."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python writes what is left at its end
    return 128 + signal.SIGPIPE


def _suggest_command(error: CycloptsError) -> None:
    """Say what a wrong word below `plywise methods` and `plywise workloads` is near to, and what there is."""
    if not isinstance(error, UnusedCliTokensError) or not error.unused_tokens:
        return
    word = error.unused_tokens[0]
    uses = (
        (methods.app, "plywise methods info", tuple(name for names in ROOMS.values() for name in names)),
        (workloads.app, "plywise bench --workloads", tuple(WORKLOAD_MODULES)),
    )
    for group, command, things in uses:
        if error.command_chain and error.command_chain[0] == group.name[0]:
            names = tuple(name for name in group if not name.startswith("-"))
            hint = suggestion(word, names) or suggestion(word, things, f"{command} ")
            print(f"{hint}Below `plywise {group.name[0]}` there are: {', '.join(names)}.", file=sys.stderr)
