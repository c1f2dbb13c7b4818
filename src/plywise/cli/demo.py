"""`plywise demo`: the whole package on one page, in about a minute."""

from __future__ import annotations

import os
import shlex
import sys
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plywise._util.progress import Step, follow
from plywise.cli.console import VOLUME, console, notes, number, table
from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from rich.table import Table

    from plywise.arena.demo.study import DemoConfig


def demo(*, seeds: int = 3, out: Path = Path("runs/demo"), open: bool = True) -> None:
    """Train SGD, AdamW and every rule on handwritten digits and write a report.

    Takes about a minute on one core and needs no network. Interrupted, it writes what it has.

    Args:
        seeds: seeds for each method.
        out: folder of report.html and study.json.
        open: open the report in a browser, if there is a screen.
    """
    if seeds < 1:
        raise PlywiseError(f"--seeds must be at least 1, not {seeds}.", see="error-command")
    out.mkdir(parents=True, exist_ok=True)  # before the work, not after it

    import torch

    from plywise.arena.demo.study import DemoConfig

    torch.set_num_threads(1)  # matrices this small only wait for one another on several threads
    run(DemoConfig(seeds=seeds), out, shlex.join(["plywise", *sys.argv[1:]]))
    if open and _has_screen():
        webbrowser.open((out / "report.html").resolve().as_uri())


def run(plan: DemoConfig, out: Path, command: str) -> None:
    """Perform ``plan`` before the user's eyes and write report and study to ``out``.

    Raises:
        KeyboardInterrupt: it was interrupted; says what was kept.
    """
    from plywise.arena.demo.conclusions import draw_demo_conclusions
    from plywise.arena.demo.study import new_study, perform, save

    start = time.monotonic()
    study = new_study(plan, command)
    interrupted = False
    steps = (Step(piece.done, piece.total, piece.text) for piece in perform(plan, study))
    try:
        follow(steps, notes(), above=lambda: results(study), verbose=VOLUME.verbose)
    except KeyboardInterrupt:
        interrupted = True
    study["elapsed_seconds"] = time.monotonic() - start
    study["reading"] = draw_demo_conclusions(study)
    runs = sum(len(method["runs"]) for method in study["methods"])
    if interrupted:
        kept = f"{runs} of {len(plan.setups) * plan.seeds} runs had finished"
        study["reading"].insert(0, f"The demo was interrupted: {kept}.")
    page = save(study, out)
    if interrupted:
        raise KeyboardInterrupt(f"{kept} and are kept in {page} and {page.with_name('study.json')}.")
    screen = console()
    screen.print(results(study))
    for sentence in study["reading"]:
        screen.print(f"- {sentence}", soft_wrap=not screen.is_terminal)
    screen.print(f"\n{study['elapsed_seconds']:.0f} seconds. The report: {page}", soft_wrap=True)


def results(study: dict[str, Any]) -> Table:
    """The summary of a study as a table for the terminal."""
    from plywise.arena.demo.report import table_rows

    numbers = ("test accuracy, %", "training loss", "CPU s", "step cost", "failed")
    shown = table("method", *numbers, numbers=numbers)
    for row in table_rows(study):
        spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.1f}"
        shown.add_row(
            row["name"],
            number(row["accuracy_mean"], ".1f") + spread,
            number(row["final_loss"], ".2g"),
            number(row["cpu_seconds"], ".2f"),
            number(row["relative_step_cost"], ".2f") + "×",
            f"{row['failures']} of {row['runs']}",
        )
    return shown


def _has_screen() -> bool:
    """Whether a browser would show up before somebody, instead of taking over a terminal or a log."""
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
