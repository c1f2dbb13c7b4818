"""Searches: equal numbers of trials, round by round, and the same numbers after a resume."""

import json
import os
import sys
from dataclasses import replace

import pytest

from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import ProcessExecutor
from plywise.arena.run.search import Sobol, find_search
from plywise.arena.scoring.records import TUNING
from plywise.arena.scoring.score import find_best
from plywise.arena.space import Range, draw_points
from plywise.errors import PlywiseError, StateError

HERE = "competitors"
OWN = WorkloadSpec("own", f"{HERE}:model", f"{HERE}:data", steps=6, batch_size=32)
SPACE = {"lr": Range(1e-4, 1.0, 1e-2), "width": Range(0.0, 10.0, 5.0, log=False)}
METHODS = ("sgd", f"{HERE}:Adamlike", f"{HERE}:fixed")
TRIALS = 6


@pytest.fixture
def optuna():
    pytest.importorskip("optuna", reason="optuna is not installed")
    return find_search("optuna")


@pytest.fixture
def resolved(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    with resolve_bench(BenchConfig((OWN,), METHODS, TRIALS, 1)) as resolved:
        yield resolved


def open_bench(folder, resolved, search="optuna"):
    return Bench(resolved.with_config(replace(resolved.config, search=search)), folder)


def make_line(trial, numbers, value, failure=None):
    return {"trial": trial, "numbers": numbers, "validation": [value], "failure": failure}


def run_search(search, space, judge, trials):
    """Run a search whose points get their metric from ``judge``; return the points and metrics."""
    past = []
    for round_ in search.rounds(trials):
        found = [search.numbers(space, trial, past) for trial in round_]
        past += [
            make_line(trial, numbers, judge(numbers)) for trial, numbers in zip(round_, found, strict=True)
        ]
    return [one["numbers"] for one in past], [find_best(one) for one in past]


def test_sobol_gives_the_same_points_as_before_in_one_round():
    assert Sobol().rounds(8) == [range(8)]
    assert Sobol().rounds(0) == [range(0)]
    assert [Sobol().numbers(SPACE, trial, []) for trial in range(8)] == draw_points(SPACE, 8)


def test_optuna_begins_with_the_same_design_for_all_and_then_learns(optuna):
    def judge(numbers):
        return abs(numbers["width"] - 9.0)

    found, metrics = run_search(optuna, SPACE, judge, 30)
    assert found[:4] == draw_points(SPACE, 4)
    late = sum(metrics[-10:]) / 10
    assert late < 1.5 < sum(map(judge, draw_points(SPACE, 30))) / 30, "late trials are near the best point"
    for numbers in found:
        assert all(SPACE[name].low <= value <= SPACE[name].high for name, value in numbers.items())
    assert [list(round_) for round_ in optuna.rounds(6)] == [[0, 1, 2, 3], [4], [5]]
    assert optuna.rounds(0) == [range(0)]
    assert optuna.rounds(3) == [range(3)]


def test_the_order_of_past_trials_has_no_effect_and_failures_are_reported(optuna):
    past = [make_line(trial, numbers, 0.1 * trial) for trial, numbers in enumerate(draw_points(SPACE, 8))]
    numbers = optuna.numbers(SPACE, 8, past)
    assert numbers == optuna.numbers(SPACE, 8, past[::-1])
    assert numbers == find_search("optuna").numbers(SPACE, 8, past), "nothing is remembered but the lines"
    best_failed = [{**past[0], "failure": "diverged"}, *past[1:]]
    assert optuna.numbers(SPACE, 8, best_failed) != numbers
    assert optuna.numbers(SPACE, 8, best_failed) == optuna.numbers(
        SPACE, 8, [{**past[0], "failure": "lost", "validation": []}, *past[1:]]
    ), "a failed trial's metric has no say"
    nothing = [{**one, "failure": "diverged", "validation": []} for one in past]
    assert set(optuna.numbers(SPACE, 8, nothing)) == set(SPACE), "all failed: somewhere else, at random"


class OneByOne(ProcessExecutor):
    """Workers that record which trials they got together."""

    def __init__(self):
        super().__init__(2)
        self.given = []

    def run(self, jobs):
        jobs = list(jobs)
        self.given.append([(job.key.purpose, job.key.trial) for job in jobs])
        return super().run(jobs)


def test_a_bench_by_optuna_in_rounds_with_and_without_an_interruption(tmp_path, resolved, optuna):
    executor = OneByOne()
    whole = open_bench(tmp_path / "whole", resolved)
    lines = [piece.line for piece in whole.run(executor)]
    assert whole.unfinished() == []
    assert len(lines) == whole.total
    rounds = [[trial for purpose, trial in given if purpose == TUNING] for given in executor.given]
    tuning = [set(trials) for trials in rounds if trials]
    assert tuning == [{0, 1, 2, 3}, {4}, {5}], "trial k of all methods before any trial k + 1"
    counts = {
        name: sum(one["method"] == name and one["purpose"] == TUNING for one in lines) for name in METHODS
    }
    assert counts == {"sgd": TRIALS, f"{HERE}:Adamlike": TRIALS, f"{HERE}:fixed": 0}
    assert [one["numbers"] for one in list_tuning_trials(whole, "sgd")] != draw_points(
        whole.resolved.methods["sgd"].space, TRIALS
    )

    for stop in (3, 9):  # in the design, and in the round of trial 4
        left = iter([True] * stop)
        broken = open_bench(tmp_path / f"broken {stop}", resolved)
        assert len(list(broken.run(ProcessExecutor(2), lambda left=left: next(left, False)))) == stop
        assert broken.unfinished() != []
        resumed = open_bench(tmp_path / f"broken {stop}", resolved)
        assert len(list(resumed.run(ProcessExecutor(1)))) == whole.total - stop
        for name in METHODS:
            assert drop_clocks(list_tuning_trials(resumed, name)) == drop_clocks(
                list_tuning_trials(whole, name)
            )


def list_tuning_trials(made, name):
    kept = made.ledger.lines.items()
    own = [one for key, one in kept if (key.method, key.purpose) == (name, TUNING)]
    return sorted(own, key=lambda one: one["trial"])


def drop_clocks(lines):
    return [{key: one[key] for key in ("trial", "numbers", "validation", "failure")} for one in lines]


def test_the_search_belongs_to_the_bench(tmp_path, resolved):
    open_bench(tmp_path, resolved, "sobol")
    pytest.importorskip("optuna", reason="optuna is not installed")
    with pytest.raises(StateError, match=r"search (is|are) sobol, not optuna"):
        open_bench(tmp_path, resolved, "optuna")


def test_an_old_description_without_a_search_means_sobol(tmp_path, resolved):
    open_bench(tmp_path, resolved, "sobol")
    path = tmp_path / "bench.json"
    about = json.loads(path.read_text())
    del about["plan"]["search"], about["check"]
    path.write_text(json.dumps(about))
    assert open_bench(tmp_path, resolved, "sobol").resolved.config.search == "sobol"


def test_unknown_and_uninstalled_searches_are_refused(monkeypatch):
    with pytest.raises(PlywiseError, match=r"No search is called 'grid'. There are: sobol, optuna"):
        find_search("grid")
    monkeypatch.setitem(sys.modules, "optuna", None)  # as where it is not installed
    with pytest.raises(PlywiseError, match=r"pip install 'plywise\[optuna\]'"):
        find_search("optuna")
