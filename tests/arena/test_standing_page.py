"""The page of a bench in which methods miss the target, or nothing was trained."""

from __future__ import annotations

import math

import pytest
from fake_bench import line, make_bench, write_bench
from test_standing import make_final_runs

from plywise.arena.reports.bench_page import write_page

METHODS = ["sgd", "proxprop", "nlms", "bad", "local"]


@pytest.fixture
def page(open_page, tmp_path):
    """sgd reaches the target; proxprop and nlms never do, bad fails at its first step, local does not fit."""
    bench = make_bench(METHODS, ["digits"], tracks=["tuned"])
    bench["workloads"]["digits"]["target"] = 0.1
    bench["refused"] = [{"workload": "digits", "method": "local", "reason": "it has no blocks"}]
    lines = make_final_runs("sgd", [100] * 3, peak_mib=30.0)
    for method, end in {"proxprop": 0.3, "nlms": 0.2}.items():
        lines += make_final_runs(method, [math.inf] * 3, peak_mib=30.0)
        for run in lines[-3:]:
            run["validation"][-1] = end
    early = {name: [0.0] for name in ("steps", "cpu", "wall")} | {"loss": [2.3], "validation": [0.9]}
    lines += [
        line("digits", "bad", "final", seed=seed, failure="ValueError at step 1", peak_mib=7.5, **early)
        for seed in range(3)
    ]
    return open_page(write_page(write_bench(tmp_path, bench, lines))[0])


def read_cells(page, table, column):
    rows = page.locator(f"#{table} tbody tr")
    return {
        row.locator("th").inner_text().strip(): row.locator("td").nth(column).inner_text().split("\n")[0]
        for row in rows.all()
    }


def test_a_shared_rank_is_marked_and_listed_in_order(page):
    ranks = read_cells(page, "standing", 0)
    assert list(ranks) == ["sgd", "nlms", "proxprop", "bad", "local"]
    assert [rank.replace("\u00a0", " ") for rank in ranks.values()] == ["1", "2 =", "2 =", "2 =", "2 ="]
    assert "methods with equal areas share a rank" in page.locator("main").inner_text()


def test_memory_of_what_never_trained_is_a_dash(page):
    heads = page.locator("#results thead th").all_inner_texts()
    peaks = read_cells(page, "results", heads.index("Peak MiB") - 1)
    assert peaks == {"sgd": "30", "proxprop": "30", "nlms": "30", "bad": "–"}
