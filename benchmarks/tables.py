"""Write the tables of README.md and the documentation from the figures that the repository keeps.

A table in a page is between two comments, and this script replaces it:

    <!-- table: bad-scaling -->
    | method | good | ...
    <!-- end of table -->

    python benchmarks/tables.py            # write the tables of all pages
    python benchmarks/tables.py --check    # name the pages whose tables are not up to date
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arena_tables
import figure_tables
import pipeline_tables
import records
from figure_tables import read_figures
from plywise._util.files import write_whole
from plywise.arena.reproductions import tables as reproduction_tables

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
PAGES = (
    REPOSITORY / "docs" / "explanation" / "results.md",
    REPOSITORY / "docs" / "explanation" / "records.md",
    HERE / "README.md",
    HERE / "arena" / "README.md",
    HERE / "reproduce" / "README.md",
    REPOSITORY / "docs" / "how-to" / "low-memory.md",
)
MARKED = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- end of table -->\n", re.DOTALL)
PAPERS = ("proxprop", "associated-learning", "back-matching", "consequentialism")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    check = parser.parse_args().check
    stale = [
        path for path in PAGES if fill(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")
    ]
    for path in stale:
        print(f"{path.relative_to(REPOSITORY)}: {'tables differ from the figures' if check else 'written'}")
        if not check:
            write_whole(path, fill(path.read_text(encoding="utf-8")))
    sys.exit(bool(stale) and check)


def fill(text: str) -> str:
    """Return a page with all its marked tables replaced by those of the figures."""
    return MARKED.sub(
        lambda match: (
            f"<!-- table: {match['name']} -->\n{TABLES[match['name']](match['table'])}<!-- end of table -->\n"
        ),
        text,
    )


# docs/explanation/results.md: only the last column of these tables is written, the others are written by hand

STEP_ROWS = {
    "`ProxProp`": "ProxProp exact",
    '`ProxProp(solver="cg")`': "ProxProp CG(3)",
    "`Consequentialism`": "Consequentialism",
    "`BackMatching`": "BackMatching rate (trace)",
    '`BackMatching(mode="exact")`': "BackMatching exact",
    "`NLMS`": "NLMS (diagonal)",
    "`Backprop`": "Backprop (identity)",
    "(a second plain step, the null control)": "plain again (null control)",
}
CYCLE_ROWS = {
    "`Foof`": "Foof (rank 128)",
    "`FeatureWhitening`": "FeatureWhitening (rank 128)",
    "`RLS`": "RLS",
    "`AdaBK(rank=32)`": "AdaBK, rank 32",
    "`KFAC(rank=32)`": "KFAC, rank 32",
    "`Coordinates`": "Coordinates on AdamW",
}


def make_last_column_writer(figures: Callable[[], dict[str, str]]) -> Callable[[str], str]:
    """Return a function that writes the last column of the rows whose first cell is known."""

    def write(before: str) -> str:
        known, lines = figures(), []
        for line in before.splitlines(keepends=True):
            first = line.removeprefix("| ").partition(" |")[0]
            if first in known:
                line = f"{line.rstrip().removesuffix(' |').rpartition('| ')[0]}| {known[first]} |\n"
            lines.append(line)
        return "".join(lines)

    return write


def make_cost_finder(rows: dict[str, str], name: str) -> Callable[[], dict[str, str]]:
    """Return a function that finds the cost of a step on each network, by the first cell of a row."""

    def find() -> dict[str, str]:
        nets = read_figures(name)["nets"].values()
        return {cell: " / ".join(f"{net[row]['cpu']:.2f}" for net in nets) for cell, row in rows.items()}

    return find


def find_peaks() -> dict[str, str]:
    """Find the peak memory of each method on 16 blocks; names of classes are in backquotes too."""
    ways = read_figures("local_memory")["blocks"]["ways"]
    match = {way: f"{row['peak_mib']:.1f}" for way, row in ways.items()}
    return match | {re.sub(r"^(\w+L\w+)", r"`\1`", way): peak for way, peak in match.items()}


def make_reproduction_writer(name: str) -> Callable[[str], str]:
    """Return a function that writes all experiments of a paper, like `plywise reproduce`."""

    def write(_: str) -> str:
        return reproduction_tables.make_markdown(_read_divergence(read_figures(f"reproduce/{name}")))

    return write


def _read_divergence(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_divergence(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_divergence(item) for item in value]
    return math.nan if value == "diverged" else value


def write_default_kinds(_: str) -> str:
    """Write rules with their default kinds of maps and with all kinds, on each workload: three seeds."""
    match = read_figures("default_kinds")
    header = "| workload | arm | rate | validation loss at the end | steps to the target |"
    rows = [header, "|---|---|---|---|---|"]
    for workload, results in match.items():
        for name, arm in results["arms"].items():
            ends = " / ".join("failed" if end is None else f"{end:.3f}" for end in arm["validation"])
            steps = " / ".join("not" if count is None else str(count) for count in arm["steps to target"])
            rows.append(f"| {workload} | {name} | {arm['rate']} | {ends} | {steps} |")
    return "\n".join(rows) + "\n"


TABLES: dict[str, Callable[[str], str]] = {
    "default-kinds": write_default_kinds,
    "cost-of-rules": make_last_column_writer(make_cost_finder(STEP_ROWS, "step_cost_1_thread")),
    "cost-of-rules-with-memory": make_last_column_writer(make_cost_finder(CYCLE_ROWS, "cycle_cost")),
    "local-memory-peaks": make_last_column_writer(find_peaks),
    **figure_tables.TABLES,
    **pipeline_tables.TABLES,
    **{f"reproduce-{name}": make_reproduction_writer(name) for name in PAPERS},
    **arena_tables.TABLES,
    **records.TABLES,
}
"""A function for each marked table: it gets the table of the page, and returns the new one."""


if __name__ == "__main__":
    main()
