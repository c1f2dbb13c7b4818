"""Runs of a reproduction: they resume, they refuse, and their table says what was found."""

import json
import math

import pytest
import torch
from torch import nn

from plywise.arena.ledger import FINAL, TUNING, read
from plywise.arena.method import EndToEnd
from plywise.arena.reproductions import tables
from plywise.arena.reproductions.experiment import (
    DIVERGED,
    FULL,
    SMALL,
    TRAINING_LOSS,
    Arm,
    Claim,
    Experiment,
    Paper,
    Size,
)
from plywise.arena.reproductions.runner import Reproduction
from plywise.arena.reproductions.summary import REPRODUCED, REVERSED
from plywise.arena.task import CLASSIFICATION
from plywise.arena.workload import Data
from plywise.data.digits import Split, load_digits
from plywise.errors import PlywiseError, StateError


def digits(train, validation, test):
    parts = load_digits()
    counts = (train, validation, test)
    return Data(*(Split(p.x[:n], p.y[:n]) for p, n in zip(parts, counts, strict=True)))


def begin(start):
    model = nn.Sequential(nn.Linear(64, start.size.widths[0]), nn.ReLU(), nn.Linear(start.size.widths[0], 10))
    return EndToEnd(model, torch.optim.SGD(model.parameters(), lr=start.rate), CLASSIFICATION.loss)


class Interrupting:
    """A trainer that is interrupted, as by Ctrl-C."""

    left = 10**9

    def __call__(self, start):
        trainer = begin(start)
        step = trainer.step

        def interrupted(x, y):
            type(self).left -= 1
            if type(self).left < 0:
                raise KeyboardInterrupt
            return step(x, y)

        trainer.step = interrupted
        return trainer


def paper(make=begin, widths=(8,)):
    size = Size("digits", digits, widths, 50, 2, 500, 100, 100)
    arms = (
        Arm("slow", make, (1e-3,), 2.2),
        Arm("tuned", make, (1e-3, 0.5), 0.3),
        Arm("wild", make, (1e9,), DIVERGED),
    )
    experiment = Experiment(
        *("digits", "a test", "Table 9", TRAINING_LOSS, arms, {FULL: size, SMALL: size}),
        *((Claim("tuned", "slow"), Claim("slow", "tuned")), ("we know why",)),
    )
    return Paper("mine", "Me, Mine, 2026", (experiment,))


def finals(folder):
    """What was measured, without clocks and dates."""
    clocks = ("cpu", "wall", "measuring", "finished")
    return [{k: v for k, v in one.items() if k not in clocks} for one in read(folder / "runs.jsonl")]


def test_a_reproduction_from_beginning_to_table(tmp_path):
    made = Reproduction(paper(), FULL, 3, tmp_path)
    assert made.total == 11
    assert made.measure() > 0
    pieces = list(made.perform())
    assert [piece.done for piece in pieces] == list(range(1, 12))
    assert pieces[-1].left == 0
    lines = list(read(tmp_path / "runs.jsonl"))
    assert [one["seed"] for one in lines if one["purpose"] == TUNING] == [1000, 1000]
    assert {one["rate"] for one in lines if (one["method"], one["purpose"]) == ("tuned", FINAL)} == {0.5}

    assert not (tmp_path / "reproduce.json").exists()
    made.finish()
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


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    whole = Reproduction(paper(), SMALL, 2, tmp_path / "whole")
    list(whole.perform())
    Interrupting.left = 45  # in the third run
    cut = Reproduction(paper(Interrupting()), SMALL, 2, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        list(cut.perform())
    assert 0 < cut.done < cut.total
    assert cut.finish()["unfinished"] == cut.total - cut.done
    kept = finals(tmp_path / "cut")
    again = Reproduction(paper(), SMALL, 2, tmp_path / "cut")
    list(again.perform())
    assert finals(tmp_path / "cut")[: len(kept)] == kept
    assert finals(tmp_path / "cut") == finals(tmp_path / "whole")
    assert list(Reproduction(paper(), SMALL, 2, tmp_path / "cut").perform()) == []


def test_more_seeds_add_runs_and_fewer_leave_them_out(tmp_path):
    list(Reproduction(paper(), SMALL, 1, tmp_path).perform())
    more = Reproduction(paper(), SMALL, 2, tmp_path)
    assert more.total - more.done == 3
    list(more.perform())
    fewer = Reproduction(paper(), SMALL, 1, tmp_path)
    assert fewer.done == fewer.total
    (experiment,) = fewer.finish()["experiments"]
    assert [len(arm["values"]) for arm in experiment["arms"]] == [1, 1, 0]
    assert experiment["arms"][0]["low"] is None


def test_other_settings_are_refused(tmp_path):
    list(Reproduction(paper(), SMALL, 1, tmp_path).perform())
    with pytest.raises(StateError, match=r"slow, with other settings: .*'widths': \[8\].* not .*\[16\]"):
        Reproduction(paper(widths=(16,)), SMALL, 1, tmp_path)
    with pytest.raises(PlywiseError, match="A size is full or small and seeds are at least 1"):
        Reproduction(paper(), "tiny", 1, tmp_path)


def test_a_mistake_is_no_outcome(tmp_path):
    def broken(start):
        raise ValueError("no such layer")

    made = Reproduction(paper(broken), SMALL, 1, tmp_path)
    with pytest.raises(PlywiseError, match=r"tuned failed: ValueError .*no such layer"):
        list(made.perform())
    assert list(read(tmp_path / "runs.jsonl")) == []


def test_numbers_in_tables():
    assert tables.number(float("nan")) == "diverged"
    arm = {"mean": 0.5, "low": None, "high": None, "values": {0: 0.5}, "failures": {1: "diverged"}}
    assert tables.ours(arm) == "0.5; 1 of 2 diverged"
