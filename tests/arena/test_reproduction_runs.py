"""Runs of a reproduction: resuming, refusals, and the table of results."""

import json
import math
import os
from dataclasses import replace

import own_papers
import pytest

from plywise.arena.reproductions import tables
from plywise.arena.reproductions.experiment import FULL, SMALL, Claim
from plywise.arena.reproductions.runner import Reproduction
from plywise.arena.reproductions.summary import REPRODUCED, REVERSED
from plywise.arena.run.executor import ProcessExecutor
from plywise.arena.run.ledger import read
from plywise.arena.scoring.records import FINAL, TUNING
from plywise.errors import PlywiseError, StateError

MINE = "own_papers:MINE"
MINE_ARMS = own_papers.MINE.experiments[0].arms


@pytest.fixture(autouse=True)
def _findable(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def run(paper, seeds, folder, executor=None):
    made = Reproduction(paper, SMALL, seeds, folder)
    return made, list(made.run(executor or ProcessExecutor(2)))


def read_final_runs(folder):
    """Read the results of final runs, without clocks and dates."""
    clocks = ("cpu", "wall", "measuring", "peak_mib", "finished")
    return [{k: v for k, v in one.items() if k not in clocks} for one in read(folder / "runs.jsonl")]


def index_by_run(lines):
    return sorted(lines, key=lambda line: json.dumps(line, sort_keys=True))


def test_a_reproduction_from_beginning_to_table(tmp_path):
    made, executor = Reproduction(MINE, FULL, 3, tmp_path), ProcessExecutor(2)
    assert made.total == 11
    assert made.measure(executor) > 0
    pieces = list(made.run(executor))
    assert [piece.done for piece in pieces] == list(range(1, 12))
    assert pieces[-1].seconds_left == 0
    lines = list(read(tmp_path / "runs.jsonl"))
    assert [one["seed"] for one in lines if one["purpose"] == TUNING] == [1000, 1000]
    assert {one["rate"] for one in lines if (one["method"], one["purpose"]) == ("tuned", FINAL)} == {0.5}

    assert not (tmp_path / "reproduce.json").exists()
    made.write(made.summarize())
    about = json.loads((tmp_path / "reproduce.json").read_text())
    assert about["unfinished"] == 0
    (experiment,) = about["experiments"]
    slow, tuned, wild = experiment["arms"]
    values = [one["loss"][-1] for one in lines if one["method"] == "slow"]
    assert slow["mean"] == pytest.approx(math.prod(values) ** (1 / 3), rel=1e-5)
    assert 0 < slow["low"] < slow["mean"] < slow["high"]
    assert wild["verdict"] == "diverged, as in the paper"
    assert wild["paper"] == "diverged"
    assert set(tuned["tuning"]) == {"0.001", "0.5"}
    assert [claim["outcome"] for claim in experiment["claims"]] == [REPRODUCED, REVERSED]

    page = (tmp_path / "reproduce.md").read_text()
    assert "| wild | diverged | diverged (3 of 3) | diverged, as in the paper |" in page
    assert "tuned (rate 0.5 of 0.001, 0.5) | 0.3 |" in page
    assert "1 of 2 as in the paper: tuned beats slow." in page
    assert "1 of 2 not as in the paper: slow beats tuned." in page
    assert "- we know why" in page
    assert "Table 9" in page


def test_one_worker_or_two_give_the_same_numbers(tmp_path):
    run(MINE, 2, tmp_path / "one", ProcessExecutor(1))
    run(MINE, 2, tmp_path / "two", ProcessExecutor(2))
    assert index_by_run(read_final_runs(tmp_path / "one")) == index_by_run(read_final_runs(tmp_path / "two"))


def test_a_resumed_run_continues_with_the_same_bits(tmp_path):
    run(MINE, 2, tmp_path / "whole")
    cut = Reproduction(MINE, SMALL, 2, tmp_path / "cut")
    pieces = cut.run(ProcessExecutor(1))
    for _ in range(3):
        next(pieces)
    pieces.close()
    assert cut.done == 3
    assert cut.summarize()["unfinished"] == cut.total - 3
    kept = read_final_runs(tmp_path / "cut")
    run(MINE, 2, tmp_path / "cut")
    assert read_final_runs(tmp_path / "cut")[:3] == kept
    assert index_by_run(read_final_runs(tmp_path / "cut")) == index_by_run(
        read_final_runs(tmp_path / "whole")
    )
    assert run(MINE, 2, tmp_path / "cut")[1] == []


def test_a_stopped_executor_starts_no_more_trials(tmp_path):
    made, executor = Reproduction(MINE, SMALL, 2, tmp_path), ProcessExecutor(1)
    pieces = made.run(executor)
    next(pieces)
    executor.stop()
    assert len(list(pieces)) <= 1
    assert made.done == len(read_final_runs(tmp_path)) < made.total


def test_more_seeds_add_runs_and_fewer_leave_them_out(tmp_path):
    run(MINE, 1, tmp_path)
    more = Reproduction(MINE, SMALL, 2, tmp_path)
    assert more.total - more.done == 3
    list(more.run(ProcessExecutor(2)))
    fewer = Reproduction(MINE, SMALL, 1, tmp_path)
    assert fewer.done == fewer.total
    (experiment,) = fewer.summarize()["experiments"]
    assert [len(arm["values"]) for arm in experiment["arms"]] == [1, 1, 0]
    assert experiment["arms"][0]["low"] is None


def test_some_arms_are_run_first_and_the_rest_later(tmp_path):
    some = Reproduction(MINE, SMALL, 2, tmp_path, arms=("slow", "w?ld"))
    list(some.run(ProcessExecutor(1)))
    assert some.done == some.total == 4
    assert {one["method"] for one in read_final_runs(tmp_path)} == {"slow", "wild"}
    about = some.summarize()
    assert about["unfinished"] == Reproduction(MINE, SMALL, 2, tmp_path).total - 4 > 0
    other = Reproduction(MINE, SMALL, 2, tmp_path, arms=("tuned",))
    assert other.done == 0
    list(other.run(ProcessExecutor(1)))
    (experiment,) = other.summarize()["experiments"]
    assert {arm["arm"] for arm in experiment["arms"]} == {"slow", "tuned", "wild"}
    with pytest.raises(
        PlywiseError, match=r"No arm is called .fast.\. .* There are: .slow., .tuned., .wild."
    ):
        Reproduction(MINE, SMALL, 2, tmp_path, arms=("fast",))


def test_other_settings_are_refused(tmp_path):
    run(MINE, 1, tmp_path)
    with pytest.raises(StateError, match=r"slow, with other settings: .*'widths': \[8\].* not .*\[16\]"):
        Reproduction("own_papers:WIDER", SMALL, 1, tmp_path)
    with pytest.raises(PlywiseError, match="Sizes are full, middle, small, digits and seeds are at least 1"):
        Reproduction(MINE, "tiny", 1, tmp_path)
    with pytest.raises(PlywiseError, match=r"own_papers:begin is a function, not a plywise\..*\.Paper"):
        Reproduction("own_papers:begin", SMALL, 1, tmp_path)


@pytest.mark.parametrize(
    ("paper", "why"),
    [("BROKEN", r"ValueError .*no such layer"), ("KILLED", r"its process was lost \(killed by SIGKILL\)")],
)
def test_a_programming_error_is_not_an_outcome(tmp_path, paper, why):
    made = Reproduction(f"own_papers:{paper}", SMALL, 1, tmp_path)
    with pytest.raises(PlywiseError, match=f"tuned failed: {why}"):
        list(made.run(ProcessExecutor(1)))
    assert list(read(tmp_path / "runs.jsonl")) == []
    with pytest.raises(PlywiseError, match=r"failed: .*(no such layer|SIGKILL)"):
        made.measure(ProcessExecutor(1))


def test_numbers_in_tables():
    assert tables.write_number(float("nan")) == "diverged"
    arm = {"mean": 0.5, "low": None, "high": None, "values": {0: 0.5}, "failures": {1: "diverged"}}
    assert tables.write_ours(arm) == "0.5; 1 of 2 diverged"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "a/../b"}, "experiment has letters"),
        ({"claims": (Claim("tuned", "slwo"),)}, r"about 'slwo', which is not an arm\. Did you mean slow"),
        ({"arms": MINE_ARMS + MINE_ARMS[:1]}, "two arms are called 'slow'"),
        ({"arms": (replace(MINE_ARMS[0], rates=()), *MINE_ARMS[1:])}, "slow has no rate"),
    ],
)
def test_an_impossible_experiment_is_refused(change, why):
    with pytest.raises(PlywiseError, match=why):
        replace(own_papers.MINE.experiments[0], **change)


def test_an_invalid_paper_is_refused(tmp_path, monkeypatch):
    with pytest.raises(PlywiseError, match="has no experiment"):
        replace(own_papers.MINE, experiments=())
    with pytest.raises(PlywiseError, match="name of a paper has letters"):
        replace(own_papers.MINE, name="../mine")
    (experiment,) = own_papers.MINE.experiments
    full = replace(experiment, sizes={FULL: experiment.sizes[FULL]})
    monkeypatch.setattr(own_papers, "MINE", replace(own_papers.MINE, experiments=(full,)))
    with pytest.raises(PlywiseError, match=r"digits has no small size; it has: full\."):
        Reproduction(MINE, SMALL, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
