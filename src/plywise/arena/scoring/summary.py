"""Computes everything that a report says about a bench's trials."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from plywise.arena.given import shorten_names
from plywise.arena.scoring.conclusions import draw_conclusions
from plywise.arena.scoring.headline import state_verdict
from plywise.arena.scoring.ranking import MethodOnWorkload, compare_methods
from plywise.arena.scoring.records import TrialRecord
from plywise.arena.scoring.results import BenchResults, gather_results


@dataclass(frozen=True)
class BenchSummary:
    """A bench, finished or interrupted, with results, comparison, conclusions and verdict.

    Attributes:
        results: its trials, sorted.
        lines: the same, in the order of the ledger.
        rows: every method on every workload.
        conclusions: what follows, in sentences.
        verdict: the one that matters most.
    """

    results: BenchResults
    lines: list[TrialRecord]
    rows: list[MethodOnWorkload]
    conclusions: list[str]
    verdict: str


def summarize_bench(bench: dict[str, Any], lines: Iterable[TrialRecord]) -> BenchSummary:
    """Score the trials of a bench.

    Args:
        bench: what bench.json holds.
        lines: the trials of the ledger; not all need be there.
    """
    bench, lines = shorten_names(bench, lines)
    results = gather_results(bench, lines)
    rows = compare_methods(results)
    conclusions = [*_say_missing(bench, lines), *draw_conclusions(results, rows)]
    return BenchSummary(results, lines, rows, conclusions, state_verdict(results, rows))


def _say_missing(bench: dict[str, Any], lines: list[TrialRecord]) -> list[str]:
    """Say how many trials are missing: the bench runs, or was killed, or its ledger has lost lines."""
    expected = bench.get("expected", 0)  # no bench of plywise 0.1 says it
    if len(lines) >= expected:
        return []
    return [
        f"The bench is not complete: {len(lines)} of {expected} trials are there. `plywise bench "
        "--resume` runs the others, or the same call from Python."
    ]
