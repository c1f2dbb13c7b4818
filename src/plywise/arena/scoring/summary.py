"""Computes everything that a report says about a bench's trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
        lines: the same as they were read, in the order of the ledger.
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
    lines = list(lines)
    results = gather_results(bench, lines)
    rows = compare_methods(results)
    return BenchSummary(results, lines, rows, draw_conclusions(results, rows), state_verdict(results, rows))
