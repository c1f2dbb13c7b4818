"""`plywise report`: makes a bench's page and table from its trials, and exports curves to other viewers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plywise._util.file_errors import describe_failure
from plywise.cli.console import console, notes, print_json, table
from plywise.cli.training import Switch
from plywise.errors import BenchError

if TYPE_CHECKING:
    from rich.console import Console

    from plywise.arena.reports.trackers import Exported
    from plywise.arena.scoring.summary import BenchSummary


def report(
    runs: Path = Path("runs/bench"),
    /,
    *,
    tensorboard: Path | None = None,
    trackio: str | None = None,
    json: Switch = False,
) -> None:
    """Score the trials of a bench again and draw its report; nothing is trained.

    It works while the bench is running, and after an interruption. Trials can also be exported to other
    viewers, a run for each trial; trials that were exported before are not written again.

    For example:

        plywise report runs/bench
        # then: tensorboard --logdir boards
        plywise report --tensorboard boards
        # then: trackio show --project my-bench
        plywise report --trackio my-bench

    Args:
        runs: folder of bench.json and trials.jsonl.
        tensorboard: folder for TensorBoard's event files (pip install 'plywise[tensorboard]').
        trackio: name of a local Trackio project (pip install 'plywise[tracking]').
        json: print ranking and findings as JSON.
    """
    screen = notes(apart=json)
    if tensorboard is not None:
        from plywise.arena.reports.trackers import to_tensorboard

        _print_exported(screen, to_tensorboard(runs, tensorboard), f"in {tensorboard} for TensorBoard")
    if trackio is not None:
        from plywise.arena.reports.trackers import to_trackio

        _print_exported(screen, to_trackio(runs, trackio), f"in the Trackio project {trackio}")
    conclude(runs, json)  # last: a page that cannot be written costs no export


def _print_exported(screen: Console, exported: Exported, where: str) -> None:
    screen.print(f"{exported.written} trials are new {where}, {exported.before} were there.")


def conclude(folder: Path, json: bool = False) -> BenchSummary:
    """Write the page of a bench; print its ranking and what it finds.

    Raises:
        PlywiseError: there is no bench in the folder; or, after the printing, the page cannot be written.
    """
    from plywise.arena.reports.bench_page import PAGE, load_summary, write_page

    summary = load_summary(folder)
    path, failure = folder / PAGE, None
    try:
        write_page(folder, summary)
    except OSError as error:  # the folder may be another user's, or the disk full
        failure = error
    if json:
        print_json(_for_machines(None if failure else path, summary))
    else:
        _print_summary(summary)
    if failure:
        raise BenchError(
            f"The page could not be written: {describe_failure(failure, path)}. The ranking and what follows "
            f"from it are complete. `plywise report {shlex.quote(str(folder))}` writes the page later, of a "
            "copy of this folder, too."
        ) from failure
    if not json:
        console().print(f"\nThe report: {path}")
    return summary


def _print_summary(summary: BenchSummary) -> None:
    from plywise.arena.reports.ends import has_ranking, list_standing

    screen, title = console(), summary.results.tracks[0]
    if is_ranked := has_ranking(summary):
        title = f"{title}, by CPU time"
    headings, rows = list_standing(summary)
    if is_ranked or rows:
        shown = table(*headings, title=title, numbers=headings[1:])
        for row in rows:
            shown.add_row(*row)
        screen.print(shown)
    screen.print(f"{summary.verdict}\n")
    for sentence in summary.conclusions:
        screen.print(f"- {sentence}")


def _for_machines(path: Path | None, summary: BenchSummary) -> dict[str, Any]:
    """Return the ranking of each track by each clock, and the conclusions, for JSON."""
    from plywise.arena.scoring.ranking import rank_methods
    from plywise.arena.scoring.score import CLOCKS

    field = summary.results
    return {
        "report": None if path is None else str(path),
        "title": field.bench["title"],
        "unfinished": field.bench.get("unfinished"),
        "targets": {name: target._asdict() for name, target in field.targets.items()},
        "ranking": {
            track: {clock: rank_methods(field, track, clock) for clock in CLOCKS} for track in field.tracks
        },
        "methods": summary.rows,
        "verdict": summary.verdict,
        "findings": summary.conclusions,
    }
