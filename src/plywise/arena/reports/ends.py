"""The table of a bench: the ranking, or where methods ended if it ranks nobody or has no target."""

from collections.abc import Sequence

from plywise.arena.scoring.conclusions import format_span
from plywise.arena.scoring.ranking import MethodRanking, rank_methods
from plywise.arena.scoring.summary import BenchSummary

RANKING_HEADINGS = ("method", "rank", "time to the target over the best baseline's", "reached")
END_HEADINGS = ("method", "reached", "validation metric", "test metric", "failed")


def has_ranking(summary: BenchSummary) -> bool:
    """Tell whether there is a ranking to show: without a target, all runs miss and all methods are equal."""
    results = summary.results
    return any(results.targets[name].strict is not None for name in results.ranked)


def list_standing(summary: BenchSummary) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return headings and rows, for the first track: the ranking by CPU time if there is one, or the ends."""
    if not has_ranking(summary):
        return END_HEADINGS, _list_ends(summary)
    results = summary.results
    return RANKING_HEADINGS, _list_ranking(rank_methods(results, results.tracks[0], "cpu"))


def _list_ranking(ranking: Sequence[MethodRanking]) -> list[list[str]]:
    return [
        [
            one.method,
            "null control" if one.rank is None else f"{one.rank.value:g}{' =' if one.level else ''}",
            "–" if one.ratio is None else format_span(one.ratio),
            f"{one.reached} of {one.runs}",
        ]
        for one in ranking
    ]


def _list_ends(summary: BenchSummary) -> list[list[str]]:
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
