"""A bench's ranking and its trials as tables for spreadsheets."""

import csv
import io
from collections.abc import Iterable, Iterator

from plywise.arena.scoring.ranking import MethodOnWorkload, Spread
from plywise.arena.scoring.results import BenchResults
from plywise.arena.scoring.score import CLOCKS, find_best, find_last, is_trained, to_target


def format_ranking_csv(found: Iterable[MethodOnWorkload]) -> str:
    """Return the rows as a table for spreadsheets: a miss is "inf", and what was not measured is empty."""
    header = ["track", "workload", "method", "runs", "reached", "reached_loose", "failed"]
    spans = [f"{what}_{end}" for what in ("validation", "test") for end in Spread._fields]
    timing = [
        f"{clock}_{what}"
        for clock in CLOCKS
        for what in ("low", "median", "high", "ratio_low", "ratio", "ratio_high", "ratio_mark")
    ]
    lines: list[list[object]] = []
    for row in found:
        line: list[object] = [getattr(row, name) for name in header]
        for spread in (row.validation, row.test):
            line += spread or [None] * 3
        for clock in CLOCKS:
            line += [*row.times[clock][:3], *(row.ratios[clock] or [None] * 4)]
        lines.append([*line, row.step_cost, row.seconds, row.peak_mib, _format_numbers(row.numbers)])
    return _format_csv(
        [*header, *spans, *timing, "step_cost", "cpu_seconds_of_a_run", "peak_mib", "numbers"], lines
    )


def format_runs_csv(results: BenchResults) -> Iterator[str]:
    """Yield the lines of a table of all trials: what each reached, when, and how it ended."""
    header = [
        "workload",
        "method",
        "purpose",
        "track",
        "trial",
        "seed",
        "numbers",
        "best_validation",
        "last_validation",
        "test",
    ]
    clocks = [f"{clock}_to_target" for clock in CLOCKS]
    yield _format_row([*header, *clocks, "steps_to_loose_target", "peak_mib", "failure"])
    for workload in results.workloads:
        target = results.targets[workload]
        for method in results.methods:
            for line in results.trials(workload, method):
                yield _format_row(
                    [
                        *(line[name] for name in header[:6]),
                        _format_numbers(line["numbers"]),
                        find_best(line),
                        find_last(line),
                        line.get("test"),
                        *(to_target(line, target.strict, clock) for clock in CLOCKS),
                        to_target(line, target.loose),
                        line.get("peak_mib") if is_trained(line) else None,
                        line["failure"],
                    ]
                )


def _format_numbers(numbers: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in numbers.items())


def _format_csv(header: list[str], lines: Iterable[Iterable[object]]) -> str:
    return "".join(_format_row(line) for line in (header, *lines))


def _format_row(cells: Iterable[object]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(map(_make_inert, cells))
    return file.getvalue()


def _make_inert(cell: object) -> object:
    """Make a cell that no spreadsheet takes for a formula, because a user's names may begin like one."""
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", "\n")  # which is quoted
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text
