"""Where methods ended: what there is to show of a bench that ranks nobody or has no target."""

from __future__ import annotations

from plywise.arena.scoring.summary import BenchSummary

END_HEADINGS = ("method", "reached", "validation metric", "test metric", "failed")


def has_ranking(summary: BenchSummary) -> bool:
    """Tell whether there is a ranking to show: without a target, all runs miss and all methods are equal."""
    results = summary.results
    return any(results.targets[name].strict is not None for name in results.ranked)


def list_ends(summary: BenchSummary) -> list[list[str]]:
    """Return a row for each method on each workload, in the first track: medians over its runs."""
    results = summary.results
    several = len(results.workloads) > 1
    return [
        [
            f"{row.workload}: {row.method}" if several else row.method,
            f"{row.reached} of {row.runs}",
            f"{row.validation.median:.4g}",
            "–" if row.test is None else f"{row.test.median:.4g}",
            f"{row.failed} of {row.runs}",
        ]
        for row in summary.rows
        if row.track == results.tracks[0]
    ]
