"""`plywise demo`: the main methods on one page, in about half a minute."""

from __future__ import annotations

import os
import shlex
import sys
import time
import webbrowser
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from plywise._util.files import require_writable
from plywise._util.plain_json import drop_infinite
from plywise._util.tables import format_number
from plywise.cli.console import VOLUME, console, notes, table
from plywise.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from plywise.arena.demo.preset import DemoConfig
    from plywise.arena.scoring.summary import BenchSummary


def demo(*, seeds: int = 3, out: Path = Path("runs/demo"), open: bool = True) -> None:
    """Compare eight methods on handwritten digits and write a report.

    AdamW, Muon and SGD, what `plywise.recommend` makes, and the methods of the four papers that plywise began
    with. Takes about half a minute on one core and needs no network. Interrupted, it writes what it has.

    Args:
        seeds: seeds for each method.
        out: folder of report.html, bench.json and trials.jsonl.
        open: open the report in a browser, if there is a screen.
    """
    if seeds < 1:
        raise CommandError(f"--seeds must be at least 1, not {seeds}.")
    require_writable(out)  # before the work, not after it

    from plywise.arena.demo.preset import DemoConfig

    run(DemoConfig(seeds=seeds), out, shlex.join(["plywise", *sys.argv[1:]]))
    if open and _has_screen():
        webbrowser.open((out / "report.html").resolve().as_uri())


def run(config: DemoConfig, out: Path, command: str) -> None:
    """Run the demo, show it, and write its report to ``out``.

    Raises:
        KeyboardInterrupt: it was interrupted; says what was kept.
    """
    from plywise.arena.demo.preset import open_demo
    from plywise.arena.reports.bench_page import load_summary, write_page
    from plywise.arena.reports.progress import show_trials
    from plywise.arena.run.executor import InlineExecutor

    start = time.monotonic()
    executor = InlineExecutor(threads=1)  # matrices this small only wait for one another on several threads
    with open_demo(config, out, command) as bench:
        try:
            bench.experiment.probe(executor)  # the first step of a rule imports and warms up: off every clock
            with closing(bench.run(executor)) as pieces:
                show_trials(pieces, bench, notes(), VOLUME.verbose)
        except KeyboardInterrupt:
            page, _ = write_page(out)
            raise KeyboardInterrupt(
                f"{bench.experiment.done} of {bench.total} runs had finished and are kept in {page} and "
                f"{bench.ledger.path}."
            ) from None
    summary = load_summary(out)
    screen = console()
    screen.print(results(summary))
    screen.print(f"{summary.verdict}\n")
    for sentence in summary.conclusions:
        screen.print(f"- {sentence}")
    page, _ = write_page(out, summary)  # last: a disk that is full costs the page alone
    screen.print(f"\n{time.monotonic() - start:.0f} seconds. The report: {page}")


def results(summary: BenchSummary) -> Table:
    """Return the rows of a bench on one workload as a table for the terminal."""
    columns = ("reached the target", "steps to it", "CPU s to it", "test error, %", "step cost", "failed")
    shown = table("method", *columns, numbers=columns)
    for row in summary.rows:
        steps, seconds = (drop_infinite(row.times[clock].value) for clock in ("steps", "cpu"))
        shown.add_row(
            row.method,
            f"{row.reached} of {row.runs}",
            format_number(steps, "g"),
            format_number(seconds, ".2f"),
            format_number(100 * row.test.median if row.test else None, ".1f"),
            format_number(row.step_cost, ".2f") + "×",
            f"{row.failed} of {row.runs}",
        )
    return shown


def _has_screen() -> bool:
    """Return whether a browser would open a window, and not take over a terminal or a log."""
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
