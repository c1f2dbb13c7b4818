"""One study, one page: a self-contained HTML report that opens offline.

The page carries its own styles, scripts and numbers, so it can be mailed, archived or opened from a
disk without a network. `table_rows` makes the summary that both the page and the terminal show.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plywise.files import write_whole

TEMPLATES = Path(__file__).parent / "templates"
PALETTE_SIZE = 8  # colours --c0 … --c7 in report.css


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
    import jinja2
    from markupsafe import Markup

    library, script = _asset("vendor/uplot/uPlot.iife.min.js"), _asset("report.js")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    study = _clean(study)
    return environment.get_template("report.html").render(
        study=study,
        rows=table_rows(study),
        failures=_failures(study),
        palette_size=PALETTE_SIZE,
        data=Markup(_inline_json(study)),
        styles=Markup(_asset("vendor/uplot/uPlot.min.css") + _asset("report.css")),
        library=Markup(library),
        library_licence=Markup(_asset("vendor/uplot/LICENSE")),
        script=Markup(script),
        # The browser runs these two scripts and no other, whatever a name in the study contains.
        script_hashes=Markup(" ".join(_csp_hash(source) for source in (library, script))),
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


def _clean(value: Any) -> Any:
    """Replace what JSON cannot say (nan, inf) by None, all the way down."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _inline_json(value: Any) -> str:
    """Write JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _number(value: float | None, pattern: str = ".3g") -> str:
    return "–" if value is None else format(value, pattern)


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _csp_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
