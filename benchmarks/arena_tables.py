"""The tables of arena/README.md, printed from the summaries of the benches (see `tables.py`)."""

from collections.abc import Callable
from typing import Any

from plywise.arena.scoring.conclusions import format_span
from plywise.arena.scoring.intervals import Interval
from summaries import read_summary

NOTES = {"sgd-again": ", the null control", "backprop": " (the rule, SGD's control)"}
"""What is said of a method beside its name."""


def ranking(name: str) -> Callable[[str], str]:
    """All tuned methods of a bench by CPU time to the targets."""

    def write(_: str) -> str:
        tracks = read_summary(name)["rankings"]
        steps, untuned = (
            {one["method"]: one for one in tracks[track]["steps"]} for track in ("tuned", "defaults")
        )
        lines = [
            "| method | rank by CPU time | steps to target over the best baseline's | CPU time alike | "
            "reached the target | untuned | area under the profile, CPU / steps |\n"
            "|---|---|---|---|---|---|---|\n"
        ]
        for one in tracks["tuned"]["cpu"]:
            other, plain = steps[one["method"]], untuned[one["method"]]
            place = "–" if one["rank"] is None else f"{one['rank'].value:.0f}"
            areas = f"{one['area'].value:.2f} / {other['area'].value:.2f}"
            reached = f"{one['reached']} of {one['runs']} | {plain['reached']}"
            lines.append(
                f"| {one['method']}{NOTES.get(one['method'], '')} | {place} | {_ratio(other['ratio'])} | "
                f"{_ratio(one['ratio'])} | {reached} | {areas} |\n"
            )
        return "".join(lines)

    return write


def related_metrics(_: str) -> str:
    """Test metric of the related papers' methods after tuning: median of the seeds, least to most."""
    summary = read_summary("related")
    about = summary["bench"]["workloads"]
    cells = {
        (row["workload"], row["method"]): _spread(row["test"])
        for row in summary["rows"]
        if row["track"] == "tuned" and row["test"] is not None
    }
    heads = [f"{name}, {SHORT.get(name, one['metric'])}" for name, one in about.items()]
    lines = [f"| method | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}\n"]
    for method in summary["bench"]["methods"]:
        if summary["bench"]["methods"][method].get("null") is None:
            figures = [cells.get((workload, method), "–") for workload in about]
            lines.append(f"| {method} | {' | '.join(figures)} |\n")
    return "".join(lines)


SHORT = {
    "digits-rare": "1 - AUC",
    "digits-denoiser": "squared error",
    "vsml-episodes": "nats",
    "digits-mlp": "error",
    "digits-conv": "error",
}
"""Metrics by a shorter name."""


def _ratio(ratio: Interval | None) -> str:
    return "–" if ratio is None else format_span(ratio).removesuffix(" (without limits)")


def _count(
    summary: dict[str, Any], track: str, method: str, workloads: set[str] | None = None
) -> tuple[int, int]:
    rows = [row for row in summary["rows"] if (row["track"], row["method"]) == (track, method)]
    rows = [row for row in rows if workloads is None or row["workload"] in workloads]
    return sum(row["reached"] for row in rows), sum(row["runs"] for row in rows)


def _spread(values: list[float]) -> str:
    median, least, most = ("failed" if value == float("inf") else f"{value:.2g}" for value in values)
    return f"{median} ({least} to {most})"


TABLES: dict[str, Callable[[str], str]] = {
    "arena-standard": ranking("standard"),
    "arena-recommended": ranking("recommended"),
    "arena-coordinates": ranking("coordinates"),
    "arena-hidden": ranking("hidden"),
    "arena-related": related_metrics,
}
"""By the name that stands in the page."""
