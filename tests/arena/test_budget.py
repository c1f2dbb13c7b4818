"""Budgets: how many trials fit, and the message when none do."""

from dataclasses import replace

import pytest

from plywise._util.progress import format_duration
from plywise.arena.run.budget import (
    SLACK,
    TRIALS,
    choose_steps,
    estimate,
    fit_budget,
    parse_duration,
    set_timeout,
)
from plywise.arena.run.config import TIMEOUT_S, BenchConfig, WorkloadSpec
from plywise.arena.run.costs import Cost, estimate_seconds
from plywise.errors import PlywiseError

PLAN = BenchConfig((WorkloadSpec("a"), WorkloadSpec("own", "m:f", "m:d")), ("sgd", "adamw"), seeds=3)
COSTS = {
    ("a", "sgd"): Cost(0.01, 1.0),
    ("a", "adamw"): Cost(0.02, 1.0),
    ("own", "sgd"): Cost(0.1, 2.0),
    ("own", "adamw"): Cost(0.1, 2.0),
}
STEPS = {"a": 100, "own": 50}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "two hours", "1h x", "-1h", "0s"])
def test_invalid_durations_are_refused(text):
    with pytest.raises(PlywiseError, match="duration"):
        parse_duration(text)


def test_estimate_by_hand():
    alone = (2 + 3) + (7 + 7)  # seconds of one run of each method on each workload
    assert estimate(PLAN, COSTS, STEPS, workers=1) == pytest.approx((8 + 6) * alone)
    assert estimate(PLAN, COSTS, STEPS, workers=2) == pytest.approx((8 + 6) * alone / 2)


@pytest.mark.parametrize("budget", [300, 500, 1000])
def test_the_budget_runs_as_many_trials_as_fit(budget):
    plan = fit_budget(PLAN, COSTS, STEPS, 1, budget)
    assert estimate(plan, COSTS, STEPS, 1) <= SLACK * budget
    more = [trials for trials in TRIALS if trials > plan.trials]
    assert all((trials + 6) * 19 > SLACK * budget for trials in more)


def test_too_little_data_is_reported_with_the_minimum():
    with pytest.raises(PlywiseError, match=r"1 min are not enough|60 s are not enough") as raised:
        fit_budget(PLAN, COSTS, STEPS, 1, 60)
    assert "about 4 min" in str(raised.value)  # (4 + 6) * 19 / 0.9
    assert "adamw on own" in str(raised.value) or "sgd on own" in str(raised.value)


def test_steps_of_ones_own_model_follow_from_the_budget():
    few, many = (choose_steps(PLAN, COSTS, STEPS, 1, budget) for budget in (3600, 7200))
    assert few["a"] == many["a"] == 100, "a workload of ours keeps its length"
    assert 200 < few["own"] < many["own"]
    assert fit_budget(PLAN, COSTS, few, 1, 3600).trials >= 8
    chosen = BenchConfig((WorkloadSpec("own", "m:f", "m:d", steps=70),), ("sgd",))
    own = {pair: cost for pair, cost in COSTS.items() if pair[0] == "own"}
    assert choose_steps(chosen, own, {"own": 70}, 1, 9e9) == {"own": 70}


def test_a_trial_that_is_planned_is_not_killed():
    steps = choose_steps(PLAN, COSTS, STEPS, 1, 86_400)
    longest = max(cost.run(steps[workload]) for (workload, _), cost in COSTS.items())
    assert longest > TIMEOUT_S / 3, "what used to be killed"
    assert set_timeout(PLAN, COSTS, steps).timeout_s == pytest.approx(3 * longest, rel=0.01)
    assert set_timeout(PLAN, COSTS, STEPS).timeout_s == TIMEOUT_S
    given = replace(PLAN, timeout_s=90.0)
    assert set_timeout(given, COSTS, steps).timeout_s == 90
    assert choose_steps(given, COSTS, STEPS, 1, 86_400)["own"] == 280  # 2 s + 280 * 0.1 s


def test_no_tuning_stays_no_tuning():
    plan = replace(PLAN, trials=0)
    assert fit_budget(plan, COSTS, STEPS, 1, 1000).trials == 0
    with pytest.raises(PlywiseError, match="0 tuning trials and 3 seeds take about 63 s"):
        fit_budget(plan, COSTS, STEPS, 1, 60)  # 3 * 19 / 0.9
    with_tuning, without = (choose_steps(one, COSTS, STEPS, 1, 3600) for one in (PLAN, plan))
    assert without["own"] > with_tuning["own"]


def test_durations_in_words():
    assert [format_duration(seconds) for seconds in (5, 60, 150, 3600, 9000)] == [
        "5 s",
        "60 s",
        "2 min",
        "1 h 0 min",
        "2 h 30 min",
    ]


def test_an_unknown_arm_takes_as_long_as_others_on_its_workload():
    costs = {("small", "sgd"): Cost(1.0, 0.0), ("large", "sgd"): Cost(10.0, 0.0)}
    steps = {"small": 3, "large": 3, "new": 3}
    known = estimate_seconds({("large", "sgd"): 1}, costs, steps, workers=1)
    assert estimate_seconds({("large", "muon"): 1}, costs, steps, workers=1) == known == 30.0
    assert estimate_seconds({("new", "sgd"): 2}, costs, steps, workers=2) == (3.0 + 30.0) / 2
    assert estimate_seconds({("new", "sgd"): 2}, {}, steps, workers=2) == 0.0
