"""The verdict at the top of a report, and the first methods of its pictures."""

from __future__ import annotations

import math

import pytest
from fake_bench import SPEEDS, make_bench, make_lines
from test_standing import make_final_runs

from plywise.arena.scoring.headline import SHOWN, find_shown
from plywise.arena.scoring.ranking import rank_methods
from plywise.arena.scoring.summary import summarize_bench


def write_verdict(lines, methods=("sgd", "sgd-again", "proxprop"), **other):
    bench = make_bench(methods, ["digits"], tracks=["tuned"], **other)
    bench["workloads"]["digits"]["target"] = 0.1
    return summarize_bench(bench, lines).verdict


def make_noisy_runs(name, steps):
    return make_final_runs(name, [steps - 2, steps, steps + 2])


def test_a_clear_lead_is_named_with_its_interval_and_its_basis():
    verdict = write_verdict(
        [*make_noisy_runs("sgd", 100), *make_noisy_runs("sgd-again", 100), *make_noisy_runs("proxprop", 20)]
    )
    assert verdict.startswith("proxprop needs 0.2")
    assert "CPU time of the best baseline" in verdict
    assert "(3 seeds, 1 workload)" in verdict


def test_fewer_but_more_expensive_steps_lead_in_steps_only():
    ours = make_noisy_runs("proxprop", 20)
    for line in ours:
        line["cpu"] = [6 * value for value in line["cpu"]]
    verdict = write_verdict([*make_noisy_runs("sgd", 100), *make_noisy_runs("sgd-again", 100), *ours])
    assert verdict.startswith("No method is ahead in CPU time beyond noise, but proxprop needs 0.2")
    assert "the steps of the best baseline" in verdict


@pytest.mark.parametrize("steps", [100, 140])
def test_without_a_lead_no_method_is_named(steps):
    verdict = write_verdict(
        [
            *make_noisy_runs("sgd", 100),
            *make_noisy_runs("sgd-again", 101),
            *make_noisy_runs("proxprop", steps),
        ]
    )
    assert verdict.startswith("No method is ahead of the best baseline in CPU time or steps")


def test_a_lead_that_the_null_control_shows_too_does_not_count():
    verdict = write_verdict(
        [*make_noisy_runs("sgd", 100), *make_noisy_runs("sgd-again", 18), *make_noisy_runs("proxprop", 20)]
    )
    assert verdict.startswith("No method is ahead")


def test_too_little_gives_no_verdict():
    three = [
        *make_noisy_runs("sgd", 100),
        *make_noisy_runs("sgd-again", 100),
        *make_noisy_runs("proxprop", 20),
    ]
    two = [line for line in three if line["seed"] != three[0]["seed"]]
    assert write_verdict([]).startswith("There is no verdict: no final run")
    assert write_verdict(two).startswith("There is no verdict on who is ahead: 2 seeds cannot tell")
    assert write_verdict(three[-3:], methods=("proxprop",)).startswith("There is no verdict: no baseline")


def test_no_method_is_ranked_where_every_run_failed():
    lost = [
        one
        for name in ("sgd", "adamw")
        for one in make_final_runs(
            name, [math.inf], failure="RuntimeError before the first step: out of luck"
        )
    ]
    bench = make_bench(("sgd", "adamw"), ["digits"], tracks=["tuned"])
    summary = summarize_bench(bench, lost)
    assert summary.verdict == (
        "Every run failed, so there is no ranking. The first: sgd on digits: RuntimeError before the first "
        "step: out of luck."
    )
    assert not summary.results.ranked
    assert not rank_methods(summary.results, "tuned", "cpu")
    assert find_shown(summary.results) == ["sgd", "adamw"]
    assert "No method is ranked where every final run failed: digits." in summary.conclusions
    some = summarize_bench(bench, [*lost[:1], *make_final_runs("adamw", [20])])
    assert some.results.ranked == ["digits"]


def test_pictures_begin_with_the_best_baselines_and_the_best_others():
    bench = make_bench()
    results = summarize_bench(bench, make_lines(bench)).results
    assert find_shown(results) == ["proxprop", "adamw", "sgd", "nlms"]
    assert len(find_shown(results)) == SHOWN < len(SPEEDS)
    few = make_bench(["sgd", "sgd-again", "nlms"])
    assert find_shown(summarize_bench(few, make_lines(few)).results) == ["sgd", "nlms"]
    none = make_bench(["proxprop", "nlms", "local", "bad"], ["digits"])
    assert len(find_shown(summarize_bench(none, make_lines(none)).results)) == SHOWN
