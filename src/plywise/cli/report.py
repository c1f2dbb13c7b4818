"""`plywise report`: a bench's page and table, drawn anew from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plywise.cli.console import console

if TYPE_CHECKING:
    from rich.console import Console


def report(runs: Path = Path("runs/bench")) -> None:
    """Score the trials of a bench again and draw its report; nothing is trained.

    Works while the bench is running, and on one that was interrupted.

    Args:
        runs: folder of bench.json and trials.jsonl.
    """
    conclude(runs, console())


def conclude(folder: Path, screen: Console) -> Path:
    """Write the page of a bench; print what it finds."""
    from plywise.arena.bench_page import write_page

    page = write_page(folder)
    screen.print(f"The report: {page}", soft_wrap=True)
    return page
