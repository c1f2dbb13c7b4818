"""Print the tables of arena/README.md from the summaries of the benches (see `tables.py`)."""

from collections.abc import Callable
from typing import Any

from plywise.arena.scoring.conclusions import format_span
from plywise.arena.scoring.intervals import Interval
from summaries import read_summary

NOTES = {"sgd-again": ", the null control", "backprop": " (the rule, SGD's control)"}
"""Remarks that follow the names of some methods."""


def make_ranking_writer(name: str) -> Callable[[str], str]:
    """Return a function that writes all tuned methods of a bench by CPU time to the targets."""

    def write(_: str) -> str:
        tracks = read_summary(name)["rankings"]
        steps, untuned = (
            {entry["method"]: entry for entry in tracks[track]["steps"]} for track in ("tuned", "defaults")
        )
        lines = [
            "| method | rank by CPU time | steps to target / the best baseline's | CPU time / its | "
            "reached the target | untuned | area under the profile, CPU / steps |\n"
            "|---|---|---|---|---|---|---|\n"
        ]
        for entry in tracks["tuned"]["cpu"]:
            other, plain = steps[entry["method"]], untuned[entry["method"]]
            place = "–" if entry["rank"] is None else f"{entry['rank'].value:.0f}"
            areas = f"{entry['area'].value:.2f} / {other['area'].value:.2f}"
            reached = f"{entry['reached']} of {entry['runs']} | {plain['reached']}"
            ratios = f"{_format_ratio(other['ratio'])} | {_format_ratio(entry['ratio'])}"
            note = NOTES.get(entry["method"], "")
            lines.append(f"| {entry['method']}{note} | {place} | {ratios} | {reached} | {areas} |\n")
        return "".join(lines)

    return write


def write_related_metrics(_: str) -> str:
    """Write the test metric of the related papers' methods after tuning: median, lowest and highest seed."""
    summary = read_summary("related")
    about = summary["bench"]["workloads"]
    cells = {
        (row["workload"], row["method"]): _format_spread(row["test"])
        for row in summary["rows"]
        if row["track"] == "tuned" and row["test"] is not None
    }
    headings = [f"{name}, {SHORT.get(name, entry['metric'])}" for name, entry in about.items()]
    lines = [f"| method | {' | '.join(headings)} |\n|{'---|' * (len(headings) + 1)}\n"]
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
"""Short names of the metrics."""


def _format_ratio(ratio: Interval | None) -> str:
    return "–" if ratio is None else format_span(ratio).removesuffix(" (without limits)")


def _count_reached(
    summary: dict[str, Any], track: str, method: str, workloads: set[str] | None = None
) -> tuple[int, int]:
    rows = [row for row in summary["rows"] if (row["track"], row["method"]) == (track, method)]
    rows = [row for row in rows if workloads is None or row["workload"] in workloads]
    return sum(row["reached"] for row in rows), sum(row["runs"] for row in rows)


def _format_spread(values: list[float]) -> str:
    median, lowest, highest = ("failed" if value == float("inf") else f"{value:.2g}" for value in values)
    return f"{median} ({lowest} to {highest})"


TABLES: dict[str, Callable[[str], str]] = {
    "arena-standard": make_ranking_writer("standard"),
    "arena-recommended": make_ranking_writer("recommended"),
    "arena-coordinates": make_ranking_writer("coordinates"),
    "arena-hidden": make_ranking_writer("hidden"),
    "arena-related": write_related_metrics,
}
"""The tables by their name in the page."""
