"""Write summaries of the arena's benches, which the repository keeps instead of their ledgers.

The ledger of a bench (`trials.jsonl`) has several megabytes, so it is not part of the repository:
`archives.py` packs ledgers into release files. The repository keeps a summary with the digest of the ledger;
`tables.py` prints the tables of arena/README.md from it.

    python benchmarks/summaries.py runs/mine NAME    # writes benchmarks/arena/NAME/summary.json
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from plywise._util.files import write_whole
from plywise.arena.reports.bench_charts import thin
from plywise.arena.reports.bench_page import read_bench
from plywise.arena.scoring.intervals import Interval
from plywise.arena.scoring.ranking import MethodOnWorkload, MethodRanking, rank_methods
from plywise.arena.scoring.summary import summarize_bench

ARENA = Path(__file__).parent / "arena"

DIGITS = 5
"""Significant digits of a summary's figures: two more than any table prints."""

CLOCKS = ("steps", "cpu")
"""The clocks whose figures a summary holds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bench", type=Path, help="folder of bench.json and trials.jsonl")
    parser.add_argument("name", help="name of the bench in our results")
    options = parser.parse_args()
    path = write_whole(ARENA / options.name / "summary.json", format_summary(summarise(options.bench)))
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


def list_benches(arena: Path = ARENA) -> list[str]:
    """List the names of the benches that have a summary."""
    return sorted(path.parent.name for path in arena.glob("*/summary.json"))


def summarise(folder: Path) -> dict[str, Any]:
    """Summarise a bench: its plan, every method on every workload, rankings, and findings.

    Args:
        folder: folder of bench.json and trials.jsonl.
    """
    bench, lines = read_bench(folder)
    summary = summarize_bench(bench, lines)
    return {
        "ledger": describe_ledger((folder / "trials.jsonl").read_bytes()),
        "bench": bench,
        "findings": summary.conclusions,
        "failed": sum(line["failure"] is not None for line in lines),
        "rankings": {
            track: {
                clock: [summarise_rank(r) for r in rank_methods(summary.results, track, clock)]
                for clock in CLOCKS
            }
            for track in summary.results.tracks
        },
        "rows": [summarise_row(row) for row in summary.rows],
    }


def describe_ledger(content: bytes) -> dict[str, Any]:
    """Return the size and digests that identify a ledger; ``git_blob`` is its object name in git."""
    return {
        "trials": content.count(b"\n"),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "git_blob": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }


def summarise_row(row: MethodOnWorkload) -> dict[str, Any]:
    """Summarise a method on a workload, with the clocks that a summary holds."""
    kept = {name: value for name, value in vars(row).items() if name not in ("times", "ratios")}
    for clock in CLOCKS:
        kept |= {clock: row.times[clock], f"{clock}_ratio": row.ratios[clock]}
    return kept


def summarise_rank(rank: MethodRanking) -> dict[str, Any]:
    """Summarise a method over all workloads."""
    names = ("method", "rank", "level", "area", "ratio", "compared", "reached", "runs", "end")
    return {name: getattr(rank, name) for name in names}


def format_summary(summary: dict[str, Any]) -> str:
    """Format a summary as JSON with one method per line; infinite figures are the word "inf"."""
    parts = {
        name: _dump(value) for name, value in summary.items() if name not in ("bench", "rankings", "rows")
    }
    parts["bench"] = _dump(summary["bench"], digits=None)
    parts["rankings"] = _format_block(
        {
            track: _format_block({clock: _format_table(ranks) for clock, ranks in clocks.items()})
            for track, clocks in summary["rankings"].items()
        }
    )
    parts["rows"] = _format_table(summary["rows"])
    return _format_block(parts) + "\n"


def read_summary(name: str, arena: Path = ARENA) -> dict[str, Any]:
    """Read a summary as `summarise` made it, with fewer digits and intervals as `Interval`.

    Args:
        name: name of the bench.
        arena: folder of the benches.
    """
    summary: dict[str, Any] = json.loads((arena / name / "summary.json").read_text(encoding="utf-8"))
    summary["rows"] = _parse_rows(summary["rows"])
    for clocks in summary["rankings"].values():
        clocks.update({clock: _parse_rows(table) for clock, table in clocks.items()})
    return summary


def _format_block(parts: dict[str, str]) -> str:
    return "{\n" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}"


def _format_table(rows: list[dict[str, Any]]) -> str:
    lines = [_dump(list(rows[0]) if rows else []), *(_dump(list(row.values())) for row in rows)]
    return "[\n" + ",\n".join(lines) + "\n]"


def _parse_rows(table: list[list[Any]]) -> list[dict[str, Any]]:
    columns, *rows = table
    return [
        {name: _parse_value(name, value) for name, value in zip(columns, row, strict=True)} for row in rows
    ]


def _parse_value(column: str, value: Any) -> Any:
    if isinstance(value, list):
        value = [math.inf if item == "inf" else item for item in value]
        return value if column in ("validation", "test") else Interval(*value)
    return math.inf if value == "inf" else value


def _dump(value: Any, digits: int | None = DIGITS) -> str:
    value = value if digits is None else _spell_infinity(thin(value, digits))
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _spell_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spell_infinity(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_spell_infinity(item) for item in value]
    return "inf" if value == math.inf else value


if __name__ == "__main__":
    main()
