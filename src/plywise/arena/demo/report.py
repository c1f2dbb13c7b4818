"""One study, one page: a self-contained HTML report that opens offline.

The page carries its own styles, scripts and numbers, so it can be mailed, archived or opened from a
disk without a network. `table_rows` makes the summary that both the page and the terminal show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plywise._util.files import write_whole
from plywise.arena.reports.page import clean, fill


def table_rows(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Summarise each method of a study over its seeds.

    A failed run counts as a failure, and whatever it measured before failing still counts too. A
    number that no run measured is None.

    Args:
        study: The study, as written by the arena.

    Returns:
        One row a method, in the study's order, with the keys `name`, `accuracy_mean` and
        `accuracy_std` (in percent; the sample standard deviation, None for fewer than two seeds),
        `final_loss` and `cpu_seconds` (medians), `relative_step_cost`, `failures` and `runs`.
    """
    rows = []
    for method in study.get("methods") or []:
        runs = method.get("runs") or []
        accuracies = [100 * value for value in _finite(run.get("test_accuracy") for run in runs)]
        losses = _finite(run.get("final_loss") for run in runs)
        clocks = [_finite(run.get("cpu_seconds") or []) for run in runs]
        rows.append(
            {
                "name": method["name"],
                "accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
                "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "final_loss": statistics.median(losses) if losses else None,
                "cpu_seconds": _median_or_none(clock[-1] for clock in clocks if clock),
                "relative_step_cost": next(iter(_finite([method.get("relative_step_cost")])), None),
                "failures": sum(1 for run in runs if run.get("failure")),
                "runs": len(runs),
            }
        )
    return rows


def render(study: dict[str, Any]) -> str:
    """Render a study as one HTML page that needs nothing else.

    Args:
        study: The study, as written by the arena. Values may be None or not finite.

    Returns:
        The page. Text of the study is escaped everywhere it appears.
    """
    study = clean(study)
    return fill(
        "report.html",
        styles=[],
        scripts=["report.js"],
        data=study,
        title=study["title"],
        study=study,
        rows=table_rows(study),
        failures=_failures(study),
    )


def write_report(study: dict[str, Any], path: Path) -> Path:
    """Write the report of a study, whole or not at all.

    Args:
        study: The study, as written by the arena.
        path: Where the page goes; its folder is made when missing.

    Returns:
        The path of the page.
    """
    return write_whole(Path(path), render(study))


def _finite(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _median_or_none(values: Iterable[float]) -> float | None:
    present = list(values)
    return statistics.median(present) if present else None


def _failures(study: dict[str, Any]) -> list[dict[str, Any]]:
    """List every failed run with its method, seed and reason."""
    return [
        {"name": method["name"], "seed": run.get("seed"), "reason": run["failure"]}
        for method in study.get("methods") or []
        for run in method.get("runs") or []
        if run.get("failure")
    ]
