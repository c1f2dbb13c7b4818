"""The report of a bench: its folder's bench.json and trials.jsonl as one HTML file that opens offline."""

import base64
import gc
import json
import math
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plywise._util.file_errors import require_file
from plywise._util.files import write_whole
from plywise._util.sealed import unseal
from plywise.arena.reports import bench_charts as charts
from plywise.arena.reports.page import fill
from plywise.arena.reports.spreadsheets import format_ranking_csv, format_runs_csv
from plywise.arena.run.ledger import read
from plywise.arena.scoring.conclusions import WORDS, format_span
from plywise.arena.scoring.headline import find_shown
from plywise.arena.scoring.intervals import COUNT, LEVEL
from plywise.arena.scoring.ranking import (
    FURTHEST,
    MethodOnWorkload,
    find_null_ratio,
    rank_methods,
)
from plywise.arena.scoring.records import TrialRecord
from plywise.arena.scoring.results import BenchResults
from plywise.arena.scoring.score import CLOCKS, choose_best
from plywise.arena.scoring.sentences import format_count
from plywise.arena.scoring.summary import BenchSummary, summarize_bench
from plywise.arena.scoring.targets import ENOUGH, SHARE
from plywise.errors import BenchError

PAGE = "report.html"
"""Name of the page in the folder of its bench."""
LARGEST = 1_900_000
"""Largest size of a page with its raw trials, in bytes."""

NEEDED = {"workloads", "methods", "tracks", "trials", "seeds"}
"""Fields without which a description of a bench is none."""


def read_bench(folder: Path) -> tuple[dict[str, Any], list[TrialRecord]]:
    """Read the files of a bench, finished or not.

    Args:
        folder: where bench.json and trials.jsonl are.

    Returns:
        What bench.json holds, and the trials.

    Raises:
        PlywiseError: a file is missing or is not what a bench writes.
    """
    try:
        bench = unseal(require_file(folder / "bench.json").read_text(encoding="utf-8"))
        if not isinstance(bench, dict) or not bench.keys() >= NEEDED:
            raise ValueError(f"it lacks {', '.join(sorted(NEEDED))}, or some of them")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BenchError(
            f"{folder} is not a bench: it has no bench.json. Name the folder of a bench."
        ) from error
    except ValueError as error:
        raise BenchError(
            f"{folder / 'bench.json'} is not the JSON that a bench writes, or damaged: {error}."
        ) from error
    return bench, list(read(folder / "trials.jsonl", _name_command(folder, bench)))


def _name_command(folder: Path, bench: dict[str, Any]) -> str:
    """Name the command that goes on with a bench, or starts a demo again."""
    began = str(bench.get("command", ""))
    if began.startswith("plywise bench"):
        return f"`plywise bench --resume --out {shlex.quote(str(folder))}`"
    return f"`{began}`" if began else "The command that wrote them"


@contextmanager
def _pausing_collector() -> Iterator[None]:
    """Pause Python's garbage collector, which looks through all trials again and again and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_pausing_collector()
def load_summary(folder: Path) -> BenchSummary:
    """Read a bench, and compute what its files say; see `read_bench`."""
    return summarize_bench(*read_bench(folder))


@_pausing_collector()
def write_page(folder: Path, summary: BenchSummary | None = None) -> tuple[Path, BenchSummary]:
    """Write the report of a bench, whole or not at all.

    Args:
        folder: of the bench.
        summary: what `load_summary` gives, if it is known.

    Returns:
        The path of the page, report.html in the folder, and what it is about.
    """
    summary = load_summary(folder) if summary is None else summary
    return write_whole(folder / PAGE, make_page(summary)), summary


def make_page(summary: BenchSummary) -> str:
    """Make the report as text: an HTML page that loads no other file.

    It holds the raw trials, with as many digits as fit into `LARGEST` bytes, if any do.
    """
    context, data = _make_context(summary), _make_data(summary.results, summary.rows)

    def fill_page(downloads: list[dict[str, str]], note: str) -> str:
        context.update(downloads=downloads, download_note=note)
        return fill("bench.html", styles=["bench.css"], scripts=["bench.js"], data=data, **context)

    ranking = _make_download("standing.csv", "Standing (CSV)", "text/csv", [format_ranking_csv(summary.rows)])
    tables = [ranking] if ranking else []
    room = LARGEST - len(fill_page(tables, "").encode("utf-8"))
    label, lines = "All trials, one a line (CSV)", format_runs_csv(summary.results)
    table = _make_download("trials.csv", label, "text/csv", lines, room)
    if table is None:
        return fill_page(
            tables, "The trials are too large for this page: trials.jsonl of the bench has them."
        )
    tables, room = [*tables, table], room - len(table["href"])
    for digits in (None, 6, 4, 3):
        label, texts = (
            "All trials with their curves (JSON lines)",
            (_format_raw(line, digits) for line in summary.lines),
        )
        raw = _make_download("trials.jsonl", label, "application/x-ndjson", texts, room)
        if raw is not None:
            cut = f"The curves are cut to {digits} digits; trials.jsonl of the bench has them all."
            return fill_page([*tables, raw], cut if digits else "")
    return fill_page(tables, "The curves are too large for this page: trials.jsonl of the bench has them.")


def _make_context(summary: BenchSummary) -> dict[str, Any]:
    """Return what the page's template is filled with."""
    results, lines = summary.results, summary.lines
    return {
        "title": results.bench["title"],
        "bench": results.bench,
        "verdict": summary.verdict,
        "lead": _format_lead(results),
        "several": len(results.workloads) > 1,
        "missing": _list_missing(results),
        "findings": summary.conclusions,
        "targets": [
            {"name": name, **target._asdict(), **results.bench["workloads"].get(name, {})}
            for name, target in results.targets.items()
        ],
        "controls": _list_controls(results),
        "failures": _list_failures(lines),
        "failed": sum(line["failure"] is not None for line in lines),
        "trials": len(lines),
        "methods": _list_methods(results),
        "clock_words": WORDS,
        "rules": {"share": SHARE, "enough": ENOUGH, "furthest": FURTHEST, "level": LEVEL, "count": COUNT},
    }


def _make_data(results: BenchResults, rows: list[MethodOnWorkload]) -> dict[str, Any]:
    """Return what the page's script draws; infinite and missing numbers alike become null."""

    def map_tracks(make: Any) -> dict[str, Any]:
        return {
            track: {name: make(results, track, name) for name in results.workloads}
            for track in results.tracks
        }

    def make_rows(_: BenchResults, track: str, workload: str) -> list[dict[str, Any]]:
        shown = [row for row in rows if (row.track, row.workload) == (track, workload)]
        front, same = charts.find_front(shown), ("track", "workload")
        plain = [{name: value for name, value in asdict(row).items() if name not in same} for row in shown]
        return [{**charts.thin(row, 4), "front": row["method"] in front} for row in plain]

    return {
        "methods": results.methods,
        "before": charts.BEFORE,
        "nulls": results.nulls,
        "shown": find_shown(results),
        "baselines": results.baselines,
        "tracks": results.tracks,
        "clocks": {clock: WORDS[clock] for clock in CLOCKS},
        "furthest": FURTHEST,
        "workloads": {name: _describe_workload(results, name) for name in results.workloads},
        "ranking": {
            track: {
                clock: [charts.thin(asdict(one), 4) for one in rank_methods(results, track, clock)]
                for clock in CLOCKS
            }
            for track in results.tracks
        },
        "rows": map_tracks(make_rows),
        "curves": map_tracks(charts.make_curves),
        "layers": map_tracks(charts.make_layers),
        "rates": {name: charts.make_rates(results, name) for name in results.workloads},
        "tuning": {name: charts.make_tuning_cost(results, name) for name in results.workloads},
    }


def _describe_workload(results: BenchResults, name: str) -> dict[str, Any]:
    return {
        **results.bench["workloads"].get(name, {}),
        "target": charts.thin(results.targets[name].strict, 4),
        "loose": charts.thin(results.targets[name].loose, 4),
        "refused": {m: reason for (w, m), reason in results.refused.items() if w == name},
    }


def _format_lead(field: BenchResults) -> str:
    bench = field.bench
    if "lead" in bench:
        return str(bench["lead"])
    methods = len(field.methods) - len(field.nulls)
    return (
        f"{format_count(methods, 'method')} on {format_count(len(field.workloads), 'workload')}: "
        f"{format_count(bench['trials'], 'tuning trial')} each where tuned, then "
        f"{format_count(len(bench['seeds']), 'fresh seed')}."
    )


def _list_missing(field: BenchResults) -> list[str]:
    bench, sentences = field.bench, []
    if bench.get("unfinished"):
        sentences.append(" ".join(["Not finished.", *bench["unfinished"]]))
    absent = [
        f"{method} on {workload} ({track}, {len(cell.runs) if cell else 0} of {len(bench['seeds'])} runs)"
        for track in bench["tracks"]
        for workload in field.workloads
        for method in field.methods
        if (workload, method) not in field.refused
        and (
            (cell := field.cells.get((track, workload, method))) is None
            or len(cell.runs) < len(bench["seeds"])
        )
    ]
    if absent:
        more = f", and {len(absent) - 12} more" if len(absent) > 12 else ""
        sentences.append(f"Final runs that are missing: {', '.join(absent[:12])}{more}.")
    return sentences


def _list_controls(field: BenchResults) -> list[dict[str, Any]]:
    """Make a line for each track and null control: its ratios by clock, as text."""
    return [
        {
            "track": track,
            "null": null,
            "original": original,
            "ratios": [
                format_span(ratio) if (ratio := find_null_ratio(field, track, clock, null)) else "–"
                for clock in CLOCKS
            ],
        }
        for track in field.tracks
        for null, original in field.nulls.items()
    ]


def _list_failures(lines: list[TrialRecord]) -> list[dict[str, Any]]:
    """Group failed trials whose reasons differ only in numbers; the most frequent group comes first."""
    groups: Counter[tuple[str, ...]] = Counter()
    examples: dict[tuple[str, ...], TrialRecord] = {}
    for line in lines:
        if line["failure"] is not None:
            reason = re.sub(r"\d[\d.e+-]*", "#", line["failure"])
            key = (line["method"], line["workload"], line["purpose"], line["track"], reason)
            groups[key] += 1
            examples.setdefault(key, line)
    return [{**examples[key], "count": count} for key, count in groups.most_common()]


def _list_methods(field: BenchResults) -> list[dict[str, Any]]:
    """Describe each method: what it is, which numbers may be tuned, and what was chosen on each workload."""
    found = []
    for name in field.methods:
        picks = {
            workload: best["numbers"]
            for workload in field.workloads
            if (best := choose_best(field.tuning.get((workload, name), []), field.targets[workload].strict))
        }
        found.append({"name": name, **field.bench["methods"].get(name, {}), "chosen": picks})
    return found


def _format_raw(line: TrialRecord, digits: int | None) -> str:
    short = line if digits is None else charts.thin(line, digits)
    return json.dumps(short, ensure_ascii=False, separators=(",", ":")) + "\n"


def _make_download(
    name: str, label: str, kind: str, pieces: Iterable[str], room: float = math.inf
) -> dict[str, str] | None:
    """Make a download inside the page: a link to the compressed file, which the page's script unpacks.

    Returns:
        The link; None as soon as it is seen to take ``room`` bytes or more: what does not fit takes no time.
    """
    packer = zlib.compressobj(wbits=31)  # as gzip
    packed = bytearray()
    for piece in pieces:
        packed += packer.compress(piece.encode("utf-8"))
        if 4 * len(packed) / 3 >= room:
            return None
    packed += packer.flush()
    href = f"data:application/gzip;base64,{base64.b64encode(packed).decode('ascii')}"
    return None if len(href) >= room else {"name": name, "label": label, "kind": kind, "href": href}
