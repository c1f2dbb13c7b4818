"""Make records: the cost of a method to the targets, with the commit and command to reproduce it.

    plywise bench --workloads quick --methods sgd,sgd-again,adamw,muon,soap,mine --seeds 5 --out runs/mine
    python benchmarks/records.py runs/mine mine          # prints the entry
    python benchmarks/records.py runs/mine mine --add    # puts it into benchmarks/records.json
    python benchmarks/tables.py                          # prints docs/explanation/records.md from it

An entry has for each workload the median steps and CPU seconds to the target, the same figures of the fastest
baseline, and their difference in standard errors of the null control's noise (z). CONTRIBUTING.md lists what
an entry needs to be accepted.
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
MIN_TRIALS, MIN_SEEDS, MIN_BASELINES = 8, 5, 3
"""The minimum of trials, seeds and baselines of a bench for a record."""
FIELDS = {"method", "date", "commit", "command", "machine", "trials", "seeds", "workloads"}
FIGURES = {"target", "reached", *(f"{what}{clock}" for clock in CLOCKS for what in ("", "peer_", "z_"))}
FIGURES |= {"noise", *(f"best_peer_{clock}" for clock in CLOCKS)}
HERE, ELSEWHERE = "here", "elsewhere"
"""Whether the noise in z was measured on the same workload or on others."""


class RecordError(Exception):
    """The figures of a bench cannot be a record, or an entry is invalid."""


def make_record(bench: dict[str, Any], lines: Iterable[dict[str, Any]], method: str, commit: str) -> dict:
    """Make the entry of a method from a bench.

    Args:
        bench: content of bench.json.
        lines: the trials.
        method: name of the method in the bench.
        commit: commit of the code that ran the bench.

    Raises:
        RecordError: the bench has too few trials, seeds or baselines, no null control, or not this method.
    """
    results = gather_results(bench, lines)
    _require(method in results.methods, f"the bench has no method {method}")
    _require(bool(results.nulls), "a record needs the null control: add sgd and sgd-again")
    _require(bench["trials"] >= MIN_TRIALS, f"a record needs {MIN_TRIALS} tuning trials")
    _require(len(bench["seeds"]) >= MIN_SEEDS, f"a record needs {MIN_SEEDS} seeds")
    peers = [name for name in results.baselines if name != method]
    _require(
        len(peers) >= MIN_BASELINES, f"a record needs {MIN_BASELINES} baselines in addition to the method"
    )
    found = {
        name: figures
        for name in results.ranked
        if (figures := _compute_figures(results, name, method, peers)) is not None
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


def _compute_figures(results: BenchResults, workload: str, method: str, peers: list[str]) -> dict | None:
    """Return the figures of a method and of the fastest other baseline on a workload, for each clock."""
    cell = results.cells.get((TUNED, workload, method))
    others = {name: found for name in peers if (found := results.cells.get((TUNED, workload, name)))}
    target = results.targets[workload].strict
    if cell is None or not others or target is None:
        return None
    reached = sum(math.isfinite(to_target(run, target)) for run in cell.runs)
    found: dict[str, Any] = {"target": target, "reached": f"{reached} of {len(cell.runs)}"}
    for clock in CLOCKS:
        best = min(others, key=lambda name: others[name].times[clock].value)
        peer_value = _keep_finite(others[best].times[clock].value)
        noise, where = find_noise(results, workload, clock)
        z = find_z(_list_times(cell, target, clock), _list_times(others[best], target, clock), noise)
        found |= {clock: _keep_finite(cell.times[clock].value), f"peer_{clock}": peer_value, f"z_{clock}": z}
        found |= {f"best_peer_{clock}": None if peer_value is None else best, "noise": where}
    return thin(found)


def find_z(ours: list[float], theirs: list[float], noise: float | None) -> float | None:
    """Return the difference of log times in standard errors of the null control's noise.

    Args:
        ours: time to the target of each run, infinite if it missed the target.
        theirs: the same for the other method.
        noise: standard deviation of a run's log time, see `find_noise`.

    Returns:
        z, which is above 0 if ours are faster. None if a run missed the target, since it has no time, or if
        the noise is unknown.

    Example:
        >>> find_z([100.0, 100.0], [100.0 * math.e, 100.0 * math.e], 0.5)
        2.0
    """
    if not noise or not all(0 < time < math.inf for time in (*ours, *theirs)):
        return None
    difference = statistics.fmean(map(math.log, theirs)) - statistics.fmean(map(math.log, ours))
    return difference / (noise * math.sqrt(1 / len(ours) + 1 / len(theirs)))


def find_noise(results: BenchResults, workload: str, clock: str) -> tuple[float | None, str | None]:
    """Return the standard deviation of a run's log time, from a null control and the method that it repeats.

    It is computed around the mean of both, so it includes the effect of tuning with other seeds. If one of
    their runs missed the target, the deviation comes from all workloads where none did.

    Returns:
        The deviation and whether it was measured `HERE` or `ELSEWHERE`; both are None if neither exists.
    """
    here = _measure_null_spread(results, workload, clock)
    spreads = [here] if here else [_measure_null_spread(results, name, clock) for name in results.ranked]
    known = [spread for spread in spreads if spread]
    degrees = sum(count for _, count in known)
    if not degrees:
        return None, None
    return math.sqrt(sum(squares for squares, _ in known) / degrees), HERE if here else ELSEWHERE


def _measure_null_spread(results: BenchResults, workload: str, clock: str) -> tuple[float, int] | None:
    """Return the sum of squared deviations of a null control's log times, and the degrees of freedom."""
    target = results.targets[workload].strict
    for null, original in results.nulls.items():
        cells = [results.cells.get((TUNED, workload, name)) for name in (null, original)]
        times = [time for cell in cells if cell for time in _list_times(cell, target, clock)]
        if all(cells) and all(0 < time < math.inf for time in times) and len(times) > 2:
            logs = [math.log(time) for time in times]
            return sum((value - statistics.fmean(logs)) ** 2 for value in logs), len(logs) - 1
    return None


def _list_times(cell: Cell, target: float | None, clock: str) -> list[float]:
    return [to_target(run, target, clock) for run in cell.runs]


def _keep_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- the file of all records -----------------------------------------------------------------------


def read_records(path: Path = STORED) -> list[dict[str, Any]]:
    """Read and check all entries.

    Raises:
        RecordError: an entry is invalid.
    """
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for record in records:
        check_record(record)
    return records


def check_record(record: dict[str, Any]) -> None:
    """Check that an entry has all fields of the page, and that its methods and workloads exist.

    Raises:
        RecordError: a check failed; the message says which.
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
    require(record["trials"] >= MIN_TRIALS, f"it has fewer than {MIN_TRIALS} tuning trials")
    require(record["seeds"] >= MIN_SEEDS, f"it has fewer than {MIN_SEEDS} seeds")
    require(bool(record["workloads"]), "it has no workload")
    peers = {entry.get(f"best_peer_{clock}") for entry in record["workloads"].values() for clock in CLOCKS}
    peers -= {None}
    for find, names in ((find_method, [name, *peers]), (find_workload, record["workloads"])):
        for each in names:
            require(_is_known(find, each), f"nothing is called {each}")
    for workload, figures in record["workloads"].items():
        require(set(figures) == FIGURES, f"its figures on {workload} are {', '.join(sorted(FIGURES))}")
        values = [figures[key] for key in FIGURES if not key.startswith(("best", "reached", "noise"))]
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        require(numbers, f"a figure on {workload} is not a number")


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
    """Add an entry to the file; it replaces an entry of the same method, commit and command."""
    check_record(record)

    def key(entry: dict[str, Any]) -> tuple[str, ...]:
        return tuple(entry[name] for name in ("method", "commit", "command"))

    kept = [entry for entry in read_records(path) if key(entry) != key(record)]
    ordered = sorted([*kept, record], key=lambda entry: (entry["date"], entry["method"]))
    write_whole(path, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def format_records(_: str) -> str:
    """Format the table of the page: for each workload the entries that reached its target, fastest first."""
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
    return heading + "".join(_format_row(*row) for row in rows)


def _format_row(workload: str, figures: dict[str, Any], record: dict[str, Any]) -> str:
    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    cells, about = [], "~" if figures["noise"] == ELSEWHERE else ""
    for clock, form in (("steps", ".0f"), ("cpu", ".2g")):
        best, peer_value, z = (figures[f"{what}_{clock}"] for what in ("best_peer", "peer", "z"))
        peer = f"{best} {text(peer_value, form)}" if best else "no peer reached it"
        cells += [f"{text(figures[clock], form)} ({peer})", "–" if z is None else about + text(z, "+.1f")]
    first = f"{workload}, {figures['target']:.3g}"
    middle = " | ".join([first, record["method"], figures["reached"], *cells])
    return f"| {middle} | {record['date']}, `{record['commit'][:7]}` |\n"


TABLES: dict[str, Callable[[str], str]] = {"records": format_records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of bench.json and trials.jsonl")
    parser.add_argument("method", help="name of the method")
    parser.add_argument(
        "--commit", help="commit of the code that ran the bench; default: the commit that is checked out"
    )
    parser.add_argument("--add", action="store_true", help="add the entry to benchmarks/records.json")
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
    """Return the commit that is checked out.

    Raises:
        SystemExit: there is none, or files differ from it.
    """
    here = Path(__file__).parent
    command = ["git", "-C", str(here)]
    found = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*command, "diff", "--quiet", "HEAD"], check=False).returncode
    if found.returncode or changed:
        sys.exit("No clean checkout here: name the commit of the code that ran the bench with --commit.")
    return found.stdout.strip()


if __name__ == "__main__":
    main()
