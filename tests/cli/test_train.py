"""`plywise train`: its output and its refusals."""

import json
import os
import re
import shutil
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

from plywise.cli.training import Flags
from plywise.local import checkpoint
from plywise.training.config import TrainConfig, read_config
from plywise.training.session import load_trained, open_session

MODULE = """
import time
import numpy as np
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

def blocks():
    return [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3)]

def data():
    return np.random.randn(30, 4), np.arange(30) % 3, np.ones((3, 4)), [0, 1, 2]

def bare():
    return torch.randn(30, 4), torch.arange(30) % 3

def holes():
    x, y = bare()
    x[3, 2] = float("nan")
    return x, y

def real():
    return torch.randn(30, 4), torch.randn(30)

def three():
    return 1, 2, 3

def boom():
    raise ValueError("not today")

def mixed():
    return [nn.Linear(4, 3), 3]

def pooled():
    return [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)]

def normed():
    return [nn.BatchNorm1d(4), nn.LayerNorm(4)]

def four():
    return torch.randn(30, 4), torch.arange(30) % 4

ready = net()
number = 3
"""


@pytest.fixture(autouse=True)
def _project(user_module):
    user_module("mine", MODULE)


def test_flags_are_the_plan():
    plan = {entry.name: entry.default for entry in fields(TrainConfig)}
    assert {entry.name for entry in fields(Flags)} | {"replicas", "cuts"} == plan.keys()
    for name in ("learner", "rate", "epochs", "batch_size", "seed", "threads", "out", "every", "keep"):
        help_text = re.split(rf"\n +{name}: ", Flags.__doc__)[1]
        help_text = re.split(r"\n +\w+: ", help_text)[0]
        assert f"Default {plan[name]}." in help_text, name


def test_train_without_options_trains_and_reports_it(plywise, tmp_path):
    code, out, err = plywise("train")
    assert (code, err) == (0, "")
    assert out.startswith("LocalLoss of 4 components")
    assert "digits: 1,100 samples of 10 classes, 400 to test on; 18 steps of 64 an epoch." in out
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 10
    final = float(epochs[-1].split("accuracy")[1].split("%")[0])
    assert final > 90
    assert "Trained 180 steps" in out
    assert f"test accuracy {final}%" in out
    assert load_trained(tmp_path / "runs" / "train")(torch.rand(2, 64)).shape == (2, 10)
    code, out, _ = plywise("train")
    assert code == 0
    assert out.startswith(f"The run in runs/train is finished: 180 steps, test accuracy {final}%.")


def test_a_file_and_flags(plywise, tmp_path):
    (tmp_path / "plan.toml").write_text(
        'model = "mine:blocks"\ndata = "mine:data"\nbatch-size = 7\nlearner = "AssociatedLearning"\n'
        'set = {code = 5}\nepochs = 2\nout = "there"\n'
    )
    code, out, _ = plywise(
        "train", "plan.toml", "--epochs", "1", "--set", "bridge=plywise.local.associated_learning:wide_bridge"
    )
    assert code == 0
    assert "AssociatedLearning(code=5, bridge=" in out
    assert "mine:data: 30 samples of 3 classes, 3 to test on; 5 steps of 7 an epoch." in out
    assert out.count("\nepoch") == 1
    saved = json.loads((tmp_path / "there" / "plan.json").read_text())["plan"]
    again = read_config(tmp_path / "plan.toml", {"epochs": 1, "set": (f"bridge={saved['set']['bridge']}",)})
    assert saved == again.as_json()


def test_a_data_file_and_a_model_to_cut(plywise, tmp_path):
    rows = np.arange(24) % 3
    images = np.random.default_rng(0).integers(0, 255, (24, 4), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=rows)
    code, out, _ = plywise("train", "--data", "d.npz", "--model", "mine:net", "--out", "a")
    assert code == 0
    assert "none to test on" in out
    assert "accuracy" not in out
    assert "mine:net can be cut into 3 blocks, fewer than the default of 4." in out
    assert "mine:net is cut at units 0,1,2; --split 0,1,2 cuts it there again." in out
    session = open_session(TrainConfig(data="d.npz", model="mine:net", out=tmp_path / "a"))
    assert session._data.train.x.max() <= 1


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["nowhere.toml"], "There is no file nowhere.toml."),
        (["bad.toml"], "Texts need quotation marks."),
        (["key.toml"], "key.toml has a key 'epoch', which is unknown. Did you mean epochs?"),
        (["set.toml"], "set must be a table, or a list of name=value, not 3."),
        (["kind.toml"], "epochs must be a whole number of at least 1, not '3'."),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, not 0."),
        (["--rate", "-1"], "rate must be a number above 0, not -1.0."),
        (["--set", "code"], "set needs name=value"),
        (["--set", "code=3"], "LocalLoss has no hyper-parameter 'code'. It has: head, loss."),
        (["--set", "head=mine:heads"], "Module 'mine' has no 'heads'."),
        (["--learner", "interloking"], "Did you mean Interlocking?"),
        (["--learner", "Interlocking", "--set", "horizon=0"], "horizon"),
        (["--optimizer", "adam"], "Did you mean Adam"),
        (["--optimizer-set", "beta=1"], "Adam has no hyper-parameter 'beta'. Did you mean betas?"),
        (["--optimizer-set", "weight_decay=-1"], "Invalid weight_decay value"),
        (["--rule", "Prox"], "Did you mean ProxProp"),
        (["--rule", "mine:net"], "mine:net is not a subclass of plywise.Rule."),
        (["--learner", "mine:net"], "mine:net is not a subclass of plywise.Learner."),
        (["--optimizer", "mine:net"], "mine:net is not a subclass of torch.optim.Optimizer."),
        (["--rule", "ProxProp", "--rule-set", "ta=1"], "ProxProp has no hyper-parameter 'ta'"),
        (["--rule", "ProxProp", "--rule-set", "tau=-1"], "above 0, not -1"),
        (["--rule-set", "tau=1"], "rule-set is given (tau=1), and no rule."),
        (["--model", "mine:boom"], "mine:boom raised ValueError: not today (line 31 of mine.py)."),
        (["--model", "mine:ready"], "mine:ready is a network. Training needs a function"),
        (["--model", "mine:number"], "mine:number is of type int, not a function that makes one."),
        (["--model", "mine:three"], "it made a tuple with a int in it"),
        (["--model", "mine:mixed"], "it made a list with a int in it"),
        (["--model", "mine:nett"], "has no 'nett'. Did you mean net?"),
        (["--model", "mine:net", "--blocks", "7"], "can be cut into 3 at most"),
        (["--model", "mine:net", "--data", "digits"], "The data are the digits of plywise; --data names"),
        (
            ["--model", "torch.nn:Flatten"],
            "4 blocks are the default; --blocks 1 trains the model as a whole.",
        ),
        (["--model", "mine:blocks", "--blocks", "3"], "mine:blocks makes 2 blocks, and blocks is 3."),
        (["--model", "mine:blocks", "--split", "0,1"], "split says where a model is cut"),
        (["--model", "mine:net", "--split", "0,5"], "has 3 units, numbered from 0"),
        (["--split", "0,x"], "split must be whole numbers, as in 0,2, not '0,x'."),
        (["--data", "nowhere.npz"], "There is no file nowhere.npz."),
        (["--data", "empty.npz"], "empty.npz cannot be read"),
        (["--data", "half.npz"], "half.npz has no y_train; it has: x_train."),
        (
            ["--data", "mnist"],
            "Data are module:name of a function that makes them, a .npz, .csv or .parquet file, a folder of "
            "images, digits",
        ),
        (["--data", "mine:holes"], "mine:holes, train: the inputs hold NaN or infinity in 1 of 30"),
        (
            ["--data", "mine:real", "--learner", "AssociatedLearning"],
            "AssociatedLearning learns classes, one a sample, and the targets are numbers",
        ),
        (
            ["--data", "mine:three"],
            "mine:three returned 3 things; it must return (x, y), (x, y, x_test, y_test) or three",
        ),
        (["--data", "mine:boom"], "mine:boom raised ValueError"),
        (["--data", "nowhere:data"], "There is no module 'nowhere'"),
    ],
)
def test_errors_are_reported_before_the_work_starts(plywise, tmp_path, words, output):
    (tmp_path / "bad.toml").write_text("x =")
    (tmp_path / "key.toml").write_text("epoch = 3")
    (tmp_path / "set.toml").write_text("set = 3")
    (tmp_path / "kind.toml").write_text("epochs = '3'")
    (tmp_path / "empty.npz").write_text("")
    np.savez(tmp_path / "half.npz", x_train=np.ones((3, 4)))
    # data that fit the models, unless it is the data that are wrong
    extra = [] if "--data" in words or "--model" not in words else ["--data", "mine:data"]
    code, out, err = plywise("train", *words, *extra, "--out", "here")
    assert (code, out) == (1, "")
    assert err.startswith("plywise: ")
    assert output in err
    assert not list((tmp_path / "here").glob("*.json"))


NO_ADMINISTRATOR = pytest.mark.skipif(os.geteuid() == 0, reason="administrators may write everywhere")


@pytest.mark.parametrize(
    "words", [["train"], ["demo"], ["reproduce", "proxprop"], ["bench", "--workloads", "quadratic"]]
)
@pytest.mark.parametrize(
    ("out", "output"),
    [
        ("file", "file is a file; --out names a folder."),
        ("file/below", "file is a file, and plywise needs a folder there: move it away"),
        ("link", "link is a link to nowhere, which does not exist"),
        pytest.param("locked", "Nothing can be written to the folder locked", marks=NO_ADMINISTRATOR),
    ],
)
def test_a_folder_that_cannot_be_made_is_reported_before_the_work(plywise, tmp_path, words, out, output):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "locked").mkdir(0o500)
    if words[0] == "reproduce":
        paths = {
            "file": "file is a file, and plywise needs a folder there",
            "link": "link is a link to nowhere, which does not exist",
            "locked": "locked/proxprop cannot be made or read, since locked is closed to you",
        }
        output = paths.get(out, output)
    code, _, err = plywise(*words, "--out", out)
    assert code == 1
    assert output in err
    assert (tmp_path / "file").read_text() == "mine"


def test_another_plan_is_named(plywise):
    words = ["train", "--data", "mine:data", "--epochs", "1"]
    assert plywise(*words)[0] == 0
    code, _, err = plywise(*words, "--rate", "0.5", "--batch-size", "3")
    assert code == 1
    assert "rate is 0.003 there and 0.5 here; batch-size is 64 there and 3 here" in err
    assert "--fresh starts again" in err
    code, out, _ = plywise(*words, "--rate", "0.5", "--fresh")
    assert code == 0
    assert "Trained 1 steps" in out


def test_diverging_says_so(plywise):
    code, _, err = plywise("train", "--optimizer", "SGD", "--rate", "1e20", "--out", "a")
    assert code == 1
    assert err.startswith("plywise: The loss of component ")
    assert "The checkpoint of step 0 in a/checkpoints stays. Try a lower rate" in err
    assert err.count("\n") == 2, "the message and where there is more"


def test_nan_before_training_is_not_blamed_on_the_rate(plywise, user_module):
    code = """
import torch
from torch import nn

class Root(nn.Linear):
    def forward(self, x):
        return (super().forward(x) - 1e6).sqrt()

def make():
    return Root(64, 10)

def step(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
    user_module("has_a_root", code)
    code, _, err = plywise("train", "--model", "has_a_root:make", "--step", "has_a_root:step", "--out", "a")
    assert code == 1
    assert "is nan at step 1" in err
    assert "No weight has changed yet. Look for a logarithm, a root or a division in the model" in err
    assert "rate" not in err


def test_associated_learning_trains_by_default(plywise, tmp_path):
    """The first command that a user tries: four blocks and ten epochs on the digits."""
    code, out, _ = plywise("train", "--learner", "AssociatedLearning")
    assert code == 0
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert float(epochs[-1].split("accuracy")[1].split("%")[0]) > 90


def test_a_component_without_the_rule_is_named(plywise):
    training = ["train", "--learner", "ActivationRelaxation", "--model", "mine:pooled", "--data", "mine:data"]
    code, out, _ = plywise(*training, "--set", "iterations=2", "--rule", "ProxProp", "--epochs", "1")
    assert code == 0
    assert "Without ProxProp, which finds nothing to do there: component 1.\n" in out


def test_a_rule_without_any_layer_is_refused(plywise):
    training = ["train", "--learner", "ActivationRelaxation", "--model", "mine:normed", "--data", "mine:four"]
    code, _, err = plywise(*training, "--rule", "ProxProp", "--epochs", "1")
    assert code == 1
    assert "The rule finds no layer to handle in any component ('block' of component 0: " in err


def test_tensorboard_is_an_extra(plywise, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    code, _, err = plywise("train", "--tensorboard", "--out", "a")
    assert code == 1
    assert err.startswith("plywise: --tensorboard needs TensorBoard: pip install 'plywise[tensorboard]'.\n")
    assert not (tmp_path / "a").exists()


def events(folder):
    """Read a run like TensorBoard does: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(one.step, one.value) for one in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


@pytest.mark.parametrize("asked", ["flag", "file"])
def test_tensorboard_shows_what_the_log_says(plywise, tmp_path, asked):
    """This holds after a resume too: values logged after the checkpoint are not shown twice."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    (tmp_path / "plan.toml").write_text("tensorboard = true\n")
    words = ["--tensorboard"] if asked == "flag" else ["plan.toml"]
    words = ["train", *words, "--data", "mine:data", "--batch-size", "10", "--out", "a"]
    assert plywise(*words, "--epochs", "2")[0] == 0
    path = tmp_path / "a" / "log.jsonl"
    cut = path.read_text().splitlines(keepends=True)
    last = checkpoint.steps(tmp_path / "a" / "checkpoints")[-1]
    shutil.rmtree(next((tmp_path / "a" / "checkpoints").glob(f"*{last}")))  # as if killed before it
    assert plywise(*words, "--epochs", "3")[0] == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 9 > len(cut) == 6
    wanted = {
        f"loss/component {index}": [(line["step"], line["losses"][str(index)]) for line in lines]
        for index in range(4)
    }
    wanted["accuracy/test"] = [(line["step"], line["accuracy"]) for line in lines if "accuracy" in line]
    found = events(tmp_path / "a" / "tensorboard" / "log")
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in values], rel=1e-6)
