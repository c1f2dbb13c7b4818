"""Pictures of a bench and a diagnosis, by matplotlib, which is an extra."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from plywise._util.extras import import_extra
from plywise.arena.diagnostics.diagnosis import Diagnosis
from plywise.arena.reports.bench_charts import find_front, make_curves, make_rates
from plywise.arena.scoring.ranking import rank_methods
from plywise.arena.scoring.summary import BenchSummary
from plywise.errors import BenchError

WIDTH, HEIGHT = 5.0, 3.6
"""Inches of one picture in a row."""
COLUMNS = 3
"""Pictures in a row, at most."""


def draw(summary: BenchSummary, what: str) -> Any:
    """Return a matplotlib Figure of a bench; see `plywise.arena.reports.notebook.BenchReport.plot`.

    Raises:
        PlywiseError: ``what`` is not a picture, or matplotlib is not installed.
    """
    if what == "ranking":
        return _draw_ranking(summary)
    pictures: dict[str, Callable[[Any, BenchSummary, str], None]] = {
        "curves": _draw_curves,
        "rates": _draw_rates,
        "pareto": _draw_pareto,
    }
    if what not in pictures:
        names = ", ".join([*pictures, "ranking"])
        raise BenchError(f"Pictures are {names}, not {what!r}.")
    workloads = summary.results.workloads
    figure, axes = _make_axes(len(workloads))
    for one, workload in zip(axes, workloads, strict=True):
        pictures[what](one, summary, workload)
        one.set_title(workload)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize="small")
    return figure


def draw_layers(diagnosis: Diagnosis) -> Any:
    """Backward values and effective rates, layer by layer.

    Raises:
        PlywiseError: matplotlib is not installed.
    """
    figure, axes = _make_axes(2)
    names = [layer.name or "(model)" for layer in diagnosis.layers]
    for one, number, title in zip(
        axes,
        ("backward", "rate"),
        ("backward values, root mean square", "a plain step at rate 1 over the weight"),
        strict=True,
    ):
        values = [getattr(layer, number) or math.nan for layer in diagnosis.layers]
        one.plot(names, values, marker="o", linestyle="none")
        one.set_yscale("log")
        one.set_title(title)
        one.tick_params(axis="x", rotation=60)
    return figure


def _make_axes(count: int) -> tuple[Any, Sequence[Any]]:
    import_extra("matplotlib", "plot needs matplotlib: pip install 'plywise[bench]'.")
    from plywise.arena.reports.figures import ShownFigure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = ShownFigure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, axes


def _name_metric(summary: BenchSummary, workload: str) -> str:
    named = summary.results.bench["workloads"].get(workload, {}).get("metric", "validation metric")
    return str(named)


def _draw_curves(axis: Any, summary: BenchSummary, workload: str) -> None:
    results = summary.results
    for curve in make_curves(results, results.tracks[0], workload):
        middle, *limits = ([math.nan if v is None else v for v in one] for one in curve["validation"])
        (line,) = axis.plot(curve["steps"], middle, label=curve["name"])
        if limits:
            axis.fill_between(curve["steps"], *limits, alpha=0.15, color=line.get_color(), linewidth=0)
    target = results.targets[workload].strict
    if target is not None:
        axis.axhline(target, color="grey", linestyle="--", linewidth=1, label="target")
    axis.set(xlabel="steps", ylabel=f"{_name_metric(summary, workload)}, validation")


def _draw_rates(axis: Any, summary: BenchSummary, workload: str) -> None:
    for one in make_rates(summary.results, workload):
        known = [(number, value) for number, value, failure in one["points"] if failure is None]
        if known:
            numbers, values = zip(*known, strict=True)
            axis.plot(numbers, values, marker="o", markersize=3, label=f"{one['name']} ({one['number']})")
    axis.set(xscale="log", xlabel="tuned number", ylabel=f"{_name_metric(summary, workload)} at the end")
    axis.tick_params(axis="x", which="both", labelsize="small", rotation=30)  # within a decade they are many


def _draw_pareto(axis: Any, summary: BenchSummary, workload: str) -> None:
    track = summary.results.tracks[0]
    rows = [row for row in summary.rows if row.workload == workload and row.track == track]
    best = find_front(rows)
    for row in rows:
        end = (row.test or row.validation).median
        if row.seconds is not None and math.isfinite(end):
            name, marker = row.method, "o"
            if row.method not in best:
                name, marker = f"{name} (dominated)", "x"
            axis.scatter(row.seconds, end, marker=marker, label=name)
    part = "test" if any(row.test for row in rows) else "validation"
    axis.set(xlabel="CPU seconds of a run", ylabel=f"{_name_metric(summary, workload)} at the end, {part}")


def _draw_ranking(summary: BenchSummary) -> Any:
    results = summary.results
    figure, (axis,) = _make_axes(1)
    ranked = [one for one in rank_methods(results, results.tracks[0], "cpu") if one.ratio is not None]
    for place, one in enumerate(reversed(ranked)):
        assert one.ratio is not None
        low, value, high = (min(limit, 1e3) for limit in one.ratio[:3])
        axis.plot([low, high], [place, place], color="C0")
        axis.plot([value], [place], marker="o" if not one.ratio.mark else ">", color="C0")
    axis.set_yticks(range(len(ranked)), [one.method for one in reversed(ranked)])
    axis.axvline(1, color="grey", linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel="CPU time to the target / best baseline's")
    return figure
