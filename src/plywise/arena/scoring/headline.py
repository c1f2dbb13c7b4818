"""Says in one sentence what a bench has shown, and chooses the methods to show first."""

from collections.abc import Iterable

from plywise.arena.scoring.conclusions import FEWEST, WORDS, find_different, format_span
from plywise.arena.scoring.ranking import MethodOnWorkload, MethodRanking, measure_noise, rank_methods
from plywise.arena.scoring.results import BenchResults
from plywise.arena.scoring.sentences import format_count

SHOWN = 4
"""Number of methods that pictures show at first; a click adds others."""


def state_verdict(results: BenchResults, rows: Iterable[MethodOnWorkload]) -> str:
    """Say whether a method is ahead of the best baseline in CPU time, or else in steps, beyond noise.

    Args:
        results: the sorted trials.
        rows: their `plywise.arena.scoring.ranking.compare_methods`.

    Returns:
        A sentence, with the number of seeds and workloads.
    """
    seeds = min((row.runs for row in rows if row.track == results.tracks[0]), default=0)
    if not seeds:
        return "There is no verdict: no final run has ended yet."
    if len(results.failed) == len(results.workloads):
        return f"Every run failed, so there is no ranking. The first: {_find_reason(results)}."
    if not results.ranked:
        return "There is no verdict: no target is near enough to the best run to rank methods by."
    basis = f"{format_count(seeds, 'seed')}, {format_count(len(results.ranked), 'workload')}"
    if seeds < FEWEST:
        return (
            f"There is no verdict on who is ahead: {format_count(seeds, 'seed')} cannot tell a gain from "
            f"noise. Run at least {FEWEST} (--seeds {FEWEST})."
        )
    if not results.baselines:
        return f"There is no verdict: no baseline to compare with ({basis})."
    for clock, before in (("cpu", ""), ("steps", "No method is ahead in CPU time beyond noise, but ")):
        ahead = _list_ahead(results, clock)
        if ahead and ahead[0].ratio:
            others = len(ahead) - 1
            more = f", and {others} more {'is' if others == 1 else 'are'} ahead" if others else ""
            return (
                f"{before}{ahead[0].method} needs {format_span(ahead[0].ratio)} the {WORDS[clock]} of the "
                f"best baseline to the target, beyond noise{more} ({basis})."
            )
    return (
        f"No method is ahead of the best baseline in CPU time or steps to the target, beyond noise ({basis})."
    )


def find_shown(results: BenchResults) -> list[str]:
    """Choose the methods that pictures show first: the two best baselines, the best others, by CPU time.

    Where no method is ranked, the first ones stand in their order.
    """
    ranked = [one.method for one in rank_methods(results, results.tracks[0], "cpu")] or results.methods
    ranked = [name for name in ranked if name not in results.nulls]
    peers = [name for name in ranked if name in results.baselines][: SHOWN // 2]
    others = [name for name in ranked if name not in results.baselines][: SHOWN - len(peers)]
    rest = [name for name in ranked if name not in (*peers, *others)]
    chosen = [*peers, *others, *rest][:SHOWN]
    return [name for name in ranked if name in chosen]


def _find_reason(results: BenchResults) -> str:
    runs = [run for cell in results.cells.values() for run in cell.runs if run["failure"]]
    return f"{runs[0]['method']} on {runs[0]['workload']}: {str(runs[0]['failure']).rstrip('.')}"


def _list_ahead(results: BenchResults, clock: str) -> list[MethodRanking]:
    """List the methods ahead of the best baseline over all workloads, beyond noise, the quickest first."""
    track = results.tracks[0]
    found = rank_methods(results, track, clock)
    different = find_different(results, found, measure_noise(results, track, clock))
    whole = [one for one in different if one.compared == len(results.ranked)]
    quicker = [(one.ratio.value, one.method, one) for one in whole if one.ratio and one.ratio.value < 1]
    return [one for *_, one in sorted(quicker, key=lambda item: item[:2])]
