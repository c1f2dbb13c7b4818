"""The command line, one file a command.

Nothing here imports torch: commands import what is heavy when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from plywise._util.version import __version__
from plywise.cli import (
    bench,
    demo,
    diagnose,
    doctor,
    explain,
    methods,
    pipeline,
    report,
    reproduce,
    train,
    workloads,
)
from plywise.errors import PlywiseError

app = App(
    name="plywise",
    help="Train PyTorch networks layer by layer: every layer solves its own local problem.",
    version=__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # ours says what was kept
)
for _command in (
    *(demo.demo, bench.bench, report.report, reproduce.reproduce, train.train, pipeline.pipeline),
    *(methods.app, workloads.app, explain.explain, diagnose.diagnose, doctor.doctor),
):
    app.command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 it failed, 2 wrong usage, 130 interrupted.

    Args:
        arguments: the words after ``plywise``; those of the process by default.
    """
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        # cyclopts prints what is wrong with the words itself
        status = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {str(interrupt) or 'Nothing new was kept.'}", file=sys.stderr)
        return 130
    except (PlywiseError, OSError) as error:
        print(f"plywise: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    return status if isinstance(status, int) else 0
