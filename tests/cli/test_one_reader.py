"""All commands accept the same data, models, rules and optimizers, with the same refusals."""

import numpy as np
import pytest
import torch

from plywise.training.session import load_trained

MODULE = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

import plywise as pw

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 3

def net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
def dataset(): return TensorDataset(x, y)
def three(): return (x[:40], y[:40]), (x[40:50], y[40:50]), TensorDataset(x[50:], y[50:])
def endless():
    while True:
        yield x[:5], y[:5]
def unlike(): return x[:40], y[:40], x[40:, :3], y[40:]
def nothing(): return 3
def ended(): return x / 0, y

class Half(torch.optim.SGD):
    '''SGD.'''

@dataclass(frozen=True, eq=False)
class Mine(pw.Backprop):
    '''A rule of a user.'''

module = net()
"""

GOOD = ["mine:dataset", "mine:three", "table.csv", "parts.npz", "digits-mlp", "digits"]
BAD = [
    "mine:unlike",
    "mine:nothing",
    "mine:ended",
    "mine:nowhere",
    "nowhere.npz",
    "nowhere.csv",
    "digit-mlp",
    "mnist",
]


@pytest.fixture(autouse=True)
def _project(user_module, tmp_path):
    user_module("mine", MODULE)
    rows = np.column_stack([np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3])
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",", header="a,b,c,d,class", comments="")
    x, y = rows[:, :4], rows[:, 4].astype(int)
    parts = {"x_train": x[:40], "y_train": y[:40], "x_validation": x[40:], "y_validation": y[40:]}
    np.savez(tmp_path / "parts.npz", **parts)


def words(command, data, methods="sgd"):
    if command == "train":
        return ["train", "--data", data, "--epochs", "1", "--out", "trained", "--batch-size", "30"]
    if command == "diagnose":
        return ["diagnose", "mine:net", "--data", data, "--batches", "1"]
    small = ["--methods", methods, "--trials", "0", "--seeds", "1", "--steps", "2", "--out", "bench"]
    return ["bench", "mine:net", "--data", data, *small]


@pytest.mark.parametrize("data", GOOD)
def test_train_reads_the_same_data_as_bench(plywise, data):
    code, out, err = plywise(*words("train", data))
    assert (code, err) == (0, "")
    assert f"{data}: " in out


def test_choices_about_parts_are_reported(plywise):
    assert "The validation part is not used" in plywise(*words("train", "mine:three"))[1]
    assert "judged on the validation part" in plywise(*words("train", "parts.npz"), "--fresh")[1]


def test_guesses_about_data_are_reported_with_the_flag_to_override_them(plywise, tmp_path):
    rows = "".join(f"{i / 7:.3f},{i / 3:.3f},{i % 5},{i % 2},{1 + i % 3}\n" for i in range(60))
    (tmp_path / "bare.csv").write_text(rows)
    for command in ("train", "diagnose", "bench"):
        code, out, err = plywise(*words(command, "bare.csv"))
        assert (code, err) == (0, "")
        assert "taken as a sample; --read header=yes" in out
        if command != "train":  # which takes classes alone
            assert "as 3 classes, numbered from 0; --read targets=numbers" in out
    output = plywise(*words("bench", "bare.csv"), "--read", "header=no,targets=classes", "--out", "other")[1]
    assert "--read" not in output
    code, _, err = plywise(*words("diagnose", "bare.csv"), "--read", "target=nothing")
    assert (code, "has no column 'nothing'" in err) == (1, True)


def test_an_error_of_a_model_comes_with_what_was_guessed_about_its_data(plywise, tmp_path):
    np.savez(tmp_path / "whole.npz", x_train=np.arange(240).reshape(60, 4), y_train=np.arange(60) % 3)
    for command in ("train", "diagnose", "bench"):
        more = ["--model", "mine:net", "--blocks", "2"] if command == "train" else []
        code, _, err = plywise(*words(command, "whole.npz"), *more)
        assert code == 1
        assert "The inputs are whole numbers and were left so" in err, err


def test_batches_that_are_left_out_of_a_stream_are_reported(plywise):
    kept = "mine:endless, train: the first 12 batches of a longer stream were kept; --keep-batches says"
    for command in ("train", "diagnose", "bench"):
        assert "must be" in plywise(*words(command, "mine:endless"), "--keep-batches", "-1").err
        code, out, err = plywise(*words(command, "mine:endless"), "--keep-batches", "12")
        assert (code, err) == (0, "")
        assert kept in out
    code, out, err = plywise("explain", "mine:net", "--data", "mine:endless")
    assert (code, err) == (0, "")
    assert "longer stream" not in out, "one batch is an example"


@pytest.mark.parametrize("data", BAD)
def test_all_commands_refuse_data_in_the_same_words(plywise, data):
    output = [plywise(*words(command, data)) for command in ("train", "diagnose", "bench")]
    assert [code for code, _, _ in output] == [1, 1, 1]
    assert len({err for _, _, err in output}) == 1, output


def test_all_commands_refuse_a_network_in_place_of_a_function(plywise):
    output = [
        plywise("train", "--model", "mine:module", "--data", "mine:dataset"),
        plywise("diagnose", "mine:module", "--data", "mine:dataset"),
        plywise("bench", "mine:module", "--data", "mine:dataset"),
    ]
    assert {code for code, _, _ in output} == {1}
    assert len({err for _, _, err in output}) == 1, output


def test_a_rule_and_an_optimizer_of_ones_own_go_everywhere(plywise):
    train = words("train", "mine:dataset")
    code, out, err = plywise(*train, "--rule", "mine:Mine", "--optimizer", "mine:Half", "--rate", "0.1")
    assert (code, err) == (0, "")
    assert "mine:Mine, mine:Half at rate 0.1" in out
    code, out, err = plywise("explain", "mine:net", "--rule", "mine:Mine")
    assert (code, err) == (0, "")
    methods = "mine:Mine,mine:Mine+mine:Half,foof+mine:Half,local-loss+mine:Mine"
    code, out, err = plywise(*words("bench", "mine:dataset", methods))
    assert (code, err) == (0, "")
    assert "fails" not in out


@pytest.mark.parametrize("given", [["mine:net"], ["--model", "mine:net"]])
def test_all_commands_take_the_model_as_their_first_word_or_by_its_flag(plywise, tmp_path, given):
    for command in ("train", "diagnose", "bench"):
        rest = [word for word in words(command, "mine:dataset")[1:] if word != "mine:net"]
        code, _, err = plywise(command, *given, *rest)
        assert (code, err) == (0, "")
    assert plywise("explain", *given).code == 0
    assert load_trained(tmp_path / "trained")(torch.zeros(2, 4)).shape == (2, 3)
    code, _, err = plywise("pipeline", *given, "--data", "mine:dataset")
    assert (code, "torchrun starts them" in err) == (1, True)


def test_a_model_that_is_given_twice_is_refused(plywise):
    code, _, err = plywise("train", "mine:net", "--model", "mine:other")
    assert code == 1
    assert "The model is given twice: as mine:net, and as --model mine:other." in err
