"""Shows the trials of a bench as they end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from plywise._util.progress import Step, follow
from plywise.arena.given import shorten
from plywise.arena.scoring.records import TUNING, TrialRecord

if TYPE_CHECKING:
    from rich.console import Console

    from plywise.arena.run.bench import Bench
    from plywise.arena.run.experiment import Progress


def show_trials(pieces: Iterator[Progress], bench: Bench, screen: Console, verbose: bool = False) -> None:
    """Run a bench and show each trial as it ends; failures stay on the screen.

    Args:
        pieces: what `Bench.run` gives.
        bench: the bench.
        screen: where to show it; nothing is shown on a quiet one.
        verbose: let the lines of all trials stay.
    """
    steps = (
        Step(
            piece.done,
            piece.total,
            describe_trial(piece.line),
            left=piece.seconds_left if bench.experiment.costs else None,
            stays=bool(piece.line["failure"]),
        )
        for piece in pieces
    )
    follow(steps, screen, done=bench.experiment.done, total=bench.total, verbose=verbose)


def describe_trial(line: TrialRecord) -> str:
    """Return a trial in one line."""
    is_tuning = line["purpose"] == TUNING
    which = f"trial {line['trial']}" if is_tuning else f"{line['track']}, seed {line['seed']}"
    last = next((value for value in reversed(line["validation"]) if value is not None), None)
    outcome = line["failure"] or ("nothing measured" if last is None else f"validation {last:.4g}")
    return f"{shorten(line['workload'])}: {shorten(line['method'])}, {which}: {outcome}"
