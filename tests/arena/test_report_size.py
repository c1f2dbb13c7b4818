"""The report of a long bench: work and page grow no faster than the ledger."""

import csv
import gc
import io
import math
import random
import sys

import pytest
from fake_bench import line, make_bench, make_lines, write_bench

from plywise.arena.reports import bench_page
from plywise.arena.reports.bench_charts import find_best_after_trials
from plywise.arena.reports.bench_page import LARGEST, make_page, write_page
from plywise.arena.reports.spreadsheets import format_runs_csv
from plywise.arena.scoring.summary import summarize_bench


def work(trials: int, seeds: int) -> tuple[int, int]:
    """Count the lines of a bench and the function calls for its page, which do not depend on the machine."""
    names = {"methods": ("sgd", "adamw", "proxprop"), "workloads": ("digits",)}
    bench = make_bench(**names, trials=trials, seeds=list(range(seeds)))
    lines = make_lines(bench)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        make_page(summarize_bench(bench, lines))
    finally:
        sys.setprofile(None)
    return len(lines), calls


@pytest.mark.parametrize(("trials", "seeds"), [(50, 2), (4, 20)])
def test_work_grows_with_the_lines(trials, seeds):
    work(4, 2)  # templates are compiled once
    (lines, calls), (more_lines, more_calls) = work(trials, seeds), work(4 * trials, 4 * seeds)
    assert more_calls / calls <= 1.1 * more_lines / lines


@pytest.mark.slow
def test_the_page_of_a_long_bench_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "LARGEST", LARGEST // 2)  # half of the lines that its own size takes
    names = {"methods": ("sgd", "adamw", "proxprop"), "workloads": ("digits",)}
    bench = make_bench(**names, trials=2000, seeds=list(range(20)))
    path, summary = write_page(write_bench(tmp_path, bench, make_lines(bench)))
    assert len(summary.lines) > 6_000
    assert path.stat().st_size <= LARGEST // 2


def test_the_garbage_collector_rests_while_a_page_is_made(tmp_path):
    """Trials hold no cycles, and with 100,000 of them it would take as long as all the rest."""
    bench = make_bench(methods=("sgd", "adamw"), workloads=("digits",), trials=200)
    folder = write_bench(tmp_path, bench, make_lines(bench))
    write_page(folder)
    begun = []
    gc.callbacks.append(count := lambda phase, info: begun.append(phase))
    try:
        write_page(folder)
    finally:
        gc.callbacks.remove(count)
    assert begun.count("start") <= 1, "right after it"
    assert gc.isenabled()


def slow_definition(values):
    ordered, n = sorted(values), len(values)

    def quantile(k, share):
        for place in range(1, n + 1):
            if 1 - math.comb(n - place, k) / math.comb(n, k) >= share - 1e-12:
                return ordered[place - 1]
        return ordered[-1]

    return [tuple(quantile(k, share) for share in (0.25, 0.5, 0.75)) for k in range(1, n + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13, 16, 64, 150])
def test_the_best_of_k_is_as_defined(count):
    values = [random.Random(count).choice([1.0, 2.5, 3.0, math.inf, chance]) for chance in range(count)]
    assert find_best_after_trials(values) == slow_definition(values)
    assert find_best_after_trials(list(range(count))) == slow_definition(list(range(count)))


@pytest.mark.parametrize("words", ['=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_of_a_table_is_a_formula(words):
    """Spreadsheets run cells that begin like a formula, and error messages come from users' code."""
    bench = make_bench(methods=("sgd",), workloads=("digits",))
    text = "".join(format_runs_csv(summarize_bench(bench, [line(failure=words), line(trial=1)]).results))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["failure"] for row in rows] == [f"'{words}".replace("\r", "\n"), ""]
    assert rows[1]["best_validation"] == "0.1", "numbers stay numbers"
