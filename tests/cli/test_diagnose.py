"""`plywise diagnose` with users' modules, files and mistakes."""

import json

import numpy as np
import pytest
from cyclopts import App

from plywise.cli.diagnose import diagnose
from plywise.errors import PlywiseError
from processes import ForkedCommand

MINE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def scaled():
    made = model()
    with torch.no_grad():
        made[0].weight.mul_(100)
        made[2].weight.mul_(0.01)
    return made

def frozen():
    made = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.LayerNorm(4), nn.Linear(4, 3))
    made.spare = None
    return made

class Broken(nn.Linear):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError("broken when it trains")
        return super().forward(x)

def broken():
    return nn.Sequential(nn.Linear(4, 4), Broken(4, 3))

class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return x @ self.weight

def foreign():
    return Foreign()

def data():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)

def loss(output, y):
    return nn.functional.cross_entropy(output, y, label_smoothing=0.1)

def nan(output, y):
    return output.sum() * float("inf") if output.requires_grad else output.mean()
"""


@pytest.fixture(autouse=True)
def _user(user_module):
    user_module("mine", MINE)


def run(*words):
    app = App(name="plywise")
    app.command(diagnose)
    return app(["diagnose", *words], exit_on_error=False, result_action="return_value")


def run_json(capsys, *words):
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_ones_own_model_as_a_table_and_advice(capsys):
    run("mine:model", "--data", "mine:data")
    output = capsys.readouterr().out
    assert "Sequential: 67 parameters, 8 batches of up to 128" in output
    assert "4→8" in output
    assert "1. Plain AdamW is fine" in output
    assert "How sure:" in output
    assert "plywise bench mine:model --data mine:data --methods sgd,adamw\n" in output


def test_outlying_layers_are_marked_and_come_first_in_the_advice(capsys):
    run("mine:scaled", "--data", "mine:data")
    output = capsys.readouterr().out
    assert "1. Consequentialism" in output
    assert "\nBackward values, last layer over first: " in output
    rows = [line for line in output.splitlines() if "Linear" in line and "→" in line]
    assert len(rows) == 2
    assert all("*" in row for row in rows)


def test_json_is_reproducible_and_follows_its_flags(capsys):
    words = ("mine:model", "--data", "mine:data", "--batches", "3", "--batch-size", "50")
    one = run_json(capsys, *words)
    assert one == run_json(capsys, *words)
    assert (one["diagnosis"]["batches"], one["diagnosis"]["batch_size"]) == (3, 50)
    assert [layer["name"] for layer in one["diagnosis"]["layers"]] == ["0", "2"]
    assert one["advice"][0]["method"] == "adamw"
    assert run_json(capsys, *words, "--seed", "1")["diagnosis"] != one["diagnosis"]
    smoothed = run_json(capsys, *words, "--loss", "mine:loss")
    assert smoothed["diagnosis"]["loss"] != one["diagnosis"]["loss"]
    assert "--loss mine:loss" in smoothed["advice"][0]["check"]


def test_frozen_layers_are_shown_with_the_reason(capsys):
    run("mine:frozen", "--data", "mine:data")
    output = capsys.readouterr().out
    assert "frozen" in next(line for line in output.splitlines() if line.lstrip().startswith("0 "))


def test_without_a_visible_layer_no_method_is_advised(capsys):
    run("mine:foreign", "--data", "mine:data")
    output = capsys.readouterr().out
    assert "1. Nothing can be said: no layer could be looked at" in output
    assert "AdamW" not in output


def test_data_from_files(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=np.arange(60) % 3)
    assert run_json(capsys, "mine:model", "--data", "mine.npz")["diagnosis"]["layers"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "Say what to look at"),
        (["mine:model", "--workload", "digits-mlp"], "Say what to look at"),
        (["mine:model"], "Say with --data"),
        (["--workload", "digits-mpl"], "digits-mlp"),
        (["--workload", "digits-mlp", "--loss", "mine:loss"], "belong to a model of your own"),
        (["mine:model", "--data", "mine:data", "--batches", "0"], "1 at least"),
        (["mine:modle", "--data", "mine:data"], "modle"),
        (["mine:model", "--data", "nowhere.npz"], "nowhere.npz"),
        (["mine:model", "--data", "mine:data", "--loss", "mine:nan"], "loss of batch 1"),
        (["mine:broken", "--data", "mine:data"], "RuntimeError: broken when it trains"),
    ],
)
def test_mistakes_are_named(words, what):
    with pytest.raises((PlywiseError, OSError), match=what):
        run(*words)


def test_a_process_of_its_own_looks_at_a_shipped_workload(tmp_path):
    words = ["plywise", "diagnose", "--workload", "digits-conv", "--batches", "2"]
    done = ForkedCommand(words, {}, tmp_path / "out", tmp_path / "err")
    out, err = done.communicate()
    assert (done.returncode, err) == (0, "")
    assert "Conv2d" in out
    assert "plywise bench --workloads digits-conv --methods" in out
