"""`plywise train` at Ctrl-C: what it keeps, and when it ends."""

import json
import signal
import subprocess
import time

import pytest
import torch

from plywise.local import checkpoint
from plywise.training.config import TrainConfig
from plywise.training.session import load_trained, open_session
from processes import ForkedCommand

MODULE = """
import time
import torch
from torch import nn

class Sleepy(nn.Linear):
    def forward(self, x):
        if self.training:
            print("asleep", flush=True)
            time.sleep(60)
        return super().forward(x)

def sleepy():
    return [Sleepy(4, 3)]

def data():
    return torch.randn(30, 4), torch.arange(30) % 3
"""
DEADLINE = 60.0


def wait_for(path, text):
    """Wait until a file contains some text."""
    end = time.monotonic() + DEADLINE
    while text not in path.read_text():
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint(tmp_path, monkeypatch):
    """The weights at the interruption are those of a run with this number of steps."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "--epochs", "100000", "--every", "100000", "--out", "here"]
    out = tmp_path / "out"
    process = ForkedCommand(["plywise", *words, "--fresh"], out=out)
    try:
        wait_for(out, "\nepoch      3/")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 130
    step = checkpoint.steps(tmp_path / "here" / "checkpoints")[-1]
    assert err == (
        f"\nInterrupted. The checkpoint of step {step} is in here: `plywise {' '.join(words)}` goes on from "
        "there.\n"
    )
    lines = (tmp_path / "here" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    session = open_session(TrainConfig(epochs=100000, every=100000, out=tmp_path / "whole"))
    session.run(lambda line: session.engine.ask_to_stop() if line.step == step else None)
    x = torch.rand(5, 64)
    assert torch.equal(load_trained(tmp_path / "here")(x), session.engine.learner.predict(x))


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(tmp_path, user_module):
    user_module("mine", MODULE)
    out = tmp_path / "out"
    process = ForkedCommand(["plywise", "train", "--model", "mine:sleepy", "--data", "mine:data"], out=out)
    try:
        wait_for(out, "asleep")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)  # the step goes on
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE / 2)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "goes on from the last checkpoint in runs/train." in err
    assert "Traceback" not in err
    assert checkpoint.steps(tmp_path / "runs" / "train" / "checkpoints") == [0]
