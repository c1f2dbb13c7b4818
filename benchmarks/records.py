"""Records: what a method took to the targets, with the commit and the command that show it again.

    plywise bench --workloads quick --methods sgd,sgd-again,adamw,muon,soap,mine --seeds 5 --out runs/mine
    python benchmarks/records.py runs/mine mine          # prints the entry
    python benchmarks/records.py runs/mine mine --add    # puts it into benchmarks/records.json
    python benchmarks/tables.py                          # prints docs/explanation/records.md from it

An entry has for each workload the median steps and CPU seconds to the target, the same of the quickest
baseline, and how many standard errors of the null control's noise lie between them (z). CONTRIBUTING.md says
what an entry needs to be accepted.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

from plywise._util.files import write_whole
from plywise.arena.methods import find_method
from plywise.arena.reports.bench_charts import thin
from plywise.arena.reports.bench_page import read_bench
from plywise.arena.scoring.records import TUNED
from plywise.arena.scoring.results import BenchResults, Cell, gather_results
from plywise.arena.scoring.score import to_target
from plywise.arena.workloads import find_workload
from plywise.errors import PlywiseError

STORED = Path(__file__).with_name("records.json")
CLOCKS = ("steps", "cpu")
LEAST_TRIALS, LEAST_SEEDS, LEAST_BASELINES = 8, 5, 3
"""What a bench must have for its figures to be a record."""
FIELDS = {"method", "date", "commit", "command", "machine", "trials", "seeds", "workloads"}
FIGURES = {"target", "reached", *(f"{what}{clock}" for clock in CLOCKS for what in ("", "peer_", "z_"))}
FIGURES |= {"noise", *(f"best_peer_{clock}" for clock in CLOCKS)}
HERE, ELSEWHERE = "here", "elsewhere"
"""Whether the noise that z is divided by was measured on the same workload."""


class RecordError(Exception):
    """A bench whose figures are no record, or an entry that is not as it must be."""


def make_record(bench: dict[str, Any], lines: Iterable[dict[str, Any]], method: str, commit: str) -> dict:
    """The entry of a method in a bench.

    Args:
        bench: what bench.json holds.
        lines: the trials.
        method: its name in the bench.
        commit: of the code that ran it.

    Raises:
        RecordError: the bench has too few trials, seeds or baselines, no null control, or not this method.
    """
    results = gather_results(bench, lines)
    _require(method in results.methods, f"the bench has no method {method}")
    _require(bool(results.nulls), "a record needs the null control: add sgd and sgd-again")
    _require(bench["trials"] >= LEAST_TRIALS, f"a record needs {LEAST_TRIALS} tuning trials")
    _require(len(bench["seeds"]) >= LEAST_SEEDS, f"a record needs {LEAST_SEEDS} seeds")
    peers = [name for name in results.baselines if name != method]
    _require(len(peers) >= LEAST_BASELINES, f"a record needs {LEAST_BASELINES} baselines beside the method")
    found = {
        name: figures
        for name in results.ranked
        if (figures := _figures(results, name, method, peers)) is not None
    }
    _require(bool(found), f"{method} was not run on a workload that ranks methods")
    return {
        "method": method,
        "date": bench["created"][:10],
        "commit": commit,
        "command": bench["command"],
        "machine": str(bench["environment"].get("cpu", "unknown")),
        "trials": bench["trials"],
        "seeds": len(bench["seeds"]),
        "workloads": found,
    }


def _require(right: bool, what: str) -> None:
    if not right:
        raise RecordError(f"No record: {what}.")


def _figures(results: BenchResults, workload: str, method: str, peers: list[str]) -> dict | None:
    """What a method took on a workload, and what the quickest other baseline did, clock by clock."""
    cell = results.cells.get((TUNED, workload, method))
    others = {name: found for name in peers if (found := results.cells.get((TUNED, workload, name)))}
    target = results.targets[workload].strict
    if cell is None or not others or target is None:
        return None
    reached = sum(math.isfinite(to_target(run, target)) for run in cell.runs)
    found: dict[str, Any] = {"target": target, "reached": f"{reached} of {len(cell.runs)}"}
    for clock in CLOCKS:
        best = min(others, key=lambda name: others[name].times[clock].value)
        there = _finite(others[best].times[clock].value)
        noise, where = find_noise(results, workload, clock)
        z = find_z(_times(cell, target, clock), _times(others[best], target, clock), noise)
        found |= {clock: _finite(cell.times[clock].value), f"peer_{clock}": there, f"z_{clock}": z}
        found |= {f"best_peer_{clock}": None if there is None else best, "noise": where}
    return thin(found)


def find_z(ours: list[float], theirs: list[float], noise: float | None) -> float | None:
    """How many standard errors of the null control's noise our log times lie below theirs.

    Args:
        ours: time to the target of each run, infinite for a miss.
        theirs: the same of the other method.
        noise: deviation of a run's log time, see `find_noise`.

    Returns:
        z, above 0 where ours are quicker. None where a run missed the target, so that it has no time, or
        where there is no noise to divide by.

    Example:
        >>> find_z([100.0, 100.0], [100.0 * math.e, 100.0 * math.e], 0.5)
        2.0
    """
    if not noise or not all(0 < time < math.inf for time in (*ours, *theirs)):
        return None
    apart = statistics.fmean(map(math.log, theirs)) - statistics.fmean(map(math.log, ours))
    return apart / (noise * math.sqrt(1 / len(ours) + 1 / len(theirs)))


def find_noise(results: BenchResults, workload: str, clock: str) -> tuple[float | None, str | None]:
    """The deviation of a run's log time, from a null control and what it repeats, which are one method.

    It is taken around the mean of both, so that what tuning with other seeds changes is in it. Where a run of
    them missed the target, it is that of all workloads where none did.

    Returns:
        The deviation and whether it was measured `HERE` or `ELSEWHERE`; twice None where there is neither.
    """
    here = _null_spread(results, workload, clock)
    spreads = [here] if here else [_null_spread(results, name, clock) for name in results.ranked]
    known = [spread for spread in spreads if spread]
    freedom = sum(count for _, count in known)
    if not freedom:
        return None, None
    return math.sqrt(sum(squares for squares, _ in known) / freedom), HERE if here else ELSEWHERE


def _null_spread(results: BenchResults, workload: str, clock: str) -> tuple[float, int] | None:
    """Squared distances of a null control's log times from their mean, summed, and degrees of freedom."""
    target = results.targets[workload].strict
    for null, original in results.nulls.items():
        cells = [results.cells.get((TUNED, workload, name)) for name in (null, original)]
        times = [time for cell in cells if cell for time in _times(cell, target, clock)]
        if all(cells) and all(0 < time < math.inf for time in times) and len(times) > 2:
            logs = [math.log(time) for time in times]
            return sum((value - statistics.fmean(logs)) ** 2 for value in logs), len(logs) - 1
    return None


def _times(cell: Cell, target: float | None, clock: str) -> list[float]:
    return [to_target(run, target, clock) for run in cell.runs]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- the file of all records -----------------------------------------------------------------------


def read_records(path: Path = STORED) -> list[dict[str, Any]]:
    """All entries, checked.

    Raises:
        RecordError: an entry is not as it must be.
    """
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for record in records:
        check_record(record)
    return records


def check_record(record: dict[str, Any]) -> None:
    """See that an entry has what the page needs, and names what exists.

    Raises:
        RecordError: it has not; the message says what is wrong.
    """
    name = record.get("method", "?")

    def require(right: bool, what: str) -> None:
        if not right:
            raise RecordError(f"The record of {name}: {what}.")

    require(set(record) == FIELDS, f"its fields are {', '.join(sorted(FIELDS))}")
    require(_is_date(record["date"]), f"{record['date']!r} is no date as 2026-11-22")
    require(
        bool(re.fullmatch("[0-9a-f]{7}|[0-9a-f]{40}", str(record["commit"]))),
        f"a commit has 7 or 40 hexadecimal digits, unlike {record['commit']!r}",
    )
    require(str(record["command"]).startswith("plywise bench "), "its command is no plywise bench")
    require(record["trials"] >= LEAST_TRIALS, f"it has fewer than {LEAST_TRIALS} tuning trials")
    require(record["seeds"] >= LEAST_SEEDS, f"it has fewer than {LEAST_SEEDS} seeds")
    require(bool(record["workloads"]), "it has no workload")
    peers = {one.get(f"best_peer_{clock}") for one in record["workloads"].values() for clock in CLOCKS}
    peers -= {None}
    for find, names in ((find_method, [name, *peers]), (find_workload, record["workloads"])):
        for each in names:
            require(_is_known(find, each), f"nothing is called {each}")
    for workload, figures in record["workloads"].items():
        require(set(figures) == FIGURES, f"its figures on {workload} are {', '.join(sorted(FIGURES))}")
        values = [figures[key] for key in FIGURES if not key.startswith(("best", "reached", "noise"))]
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        require(numbers, f"a figure on {workload} is no number")


def _is_date(text: Any) -> bool:
    try:
        return date.fromisoformat(str(text)).isoformat() == text
    except ValueError:
        return False


def _is_known(find: Callable[[str], Any], name: str) -> bool:
    try:
        find(name)
    except PlywiseError:
        return False
    return True


def add_record(record: dict[str, Any], path: Path = STORED) -> None:
    """Put an entry into the file, in place of one of the same method, commit and command."""
    check_record(record)

    def key(one: dict[str, Any]) -> tuple[str, ...]:
        return tuple(one[name] for name in ("method", "commit", "command"))

    kept = [one for one in read_records(path) if key(one) != key(record)]
    ordered = sorted([*kept, record], key=lambda one: (one["date"], one["method"]))
    write_whole(path, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def print_records(_: str) -> str:
    """The table of the page: for each workload the entries that reached it, fewest CPU seconds first."""
    rows = [
        (workload, figures, record)
        for record in read_records()
        for workload, figures in record["workloads"].items()
        if figures["cpu"] is not None
    ]
    rows.sort(key=lambda row: (row[0], row[1]["cpu"], row[2]["method"]))
    heading = (
        "| workload, target | method | reached | steps (best peer) | z | CPU seconds (best peer) | z | date, "
        "commit |\n|---|---|---|---|---|---|---|---|\n"
    )
    return heading + "".join(_print_row(*row) for row in rows)


def _print_row(workload: str, figures: dict[str, Any], record: dict[str, Any]) -> str:
    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    cells, about = [], "~" if figures["noise"] == ELSEWHERE else ""
    for clock, form in (("steps", ".0f"), ("cpu", ".2g")):
        best, there, z = (figures[f"{what}_{clock}"] for what in ("best_peer", "peer", "z"))
        peer = f"{best} {text(there, form)}" if best else "no peer reached it"
        cells += [f"{text(figures[clock], form)} ({peer})", "–" if z is None else about + text(z, "+.1f")]
    first = f"{workload}, {figures['target']:.3g}"
    middle = " | ".join([first, record["method"], figures["reached"], *cells])
    return f"| {middle} | {record['date']}, `{record['commit'][:7]}` |\n"


TABLES: dict[str, Callable[[str], str]] = {"records": print_records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="of bench.json and trials.jsonl")
    parser.add_argument("method", help="whose entry is made")
    parser.add_argument("--commit", help="of the code that ran the bench; default: what is checked out here")
    parser.add_argument("--add", action="store_true", help="put the entry into benchmarks/records.json")
    options = parser.parse_args()
    commit = options.commit or find_commit()
    try:
        record = make_record(*read_bench(options.folder), options.method, commit)
        check_record(record)
        if options.add:
            add_record(record)
    except RecordError as error:
        sys.exit(str(error))
    print(json.dumps(record, indent=1, ensure_ascii=False))


def find_commit() -> str:
    """The commit that is checked out.

    Raises:
        SystemExit: there is none, or files differ from it.
    """
    here = Path(__file__).parent
    command = ["git", "-C", str(here)]
    found = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*command, "diff", "--quiet", "HEAD"], check=False).returncode
    if found.returncode or changed:
        sys.exit("No clean checkout here: say with --commit which code ran the bench.")
    return found.stdout.strip()


if __name__ == "__main__":
    main()
