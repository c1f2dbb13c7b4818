"""Scratch folders and files in the making: gone at the end, and what a killed process leaves is swept."""

import gc
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

import plywise as pw
from plywise._util.files import written_whole
from plywise._util.import_path import load
from plywise._util.scratch import PREFIX, Scratch
from plywise.arena.run.ledger import Ledger
from plywise.data.own_data import read_parts
from plywise.data.sources import Reading
from plywise.training.config import TrainConfig
from plywise.training.session import open_session


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_scratch_folder_and_what_was_made_for_it_go(tmp_path):
    with Scratch(tmp_path / "a" / "b") as scratch:
        assert scratch.path.parent == tmp_path / "a" / "b"
        (scratch.path / "data").write_bytes(b"x")
    assert left(tmp_path) == []
    (tmp_path / "c").mkdir()
    Scratch(tmp_path / "c").close()
    assert left(tmp_path) == ["c"], "that one was there before"


def test_a_folder_that_holds_something_else_stays(tmp_path):
    with Scratch(tmp_path / "a"):
        (tmp_path / "a" / "results").write_bytes(b"x")
    assert left(tmp_path / "a") == ["results"]


def test_a_scratch_folder_goes_with_its_object_in_its_own_process(tmp_path):
    scratch = Scratch(tmp_path)
    if (child := os.fork()) == 0:
        scratch.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert scratch.path.is_dir(), "a fork has a copy of the object"
    del scratch
    gc.collect()
    assert left(tmp_path) == []


def test_folders_in_use_are_not_swept(tmp_path):
    with Scratch(tmp_path) as first, Scratch(tmp_path) as second:
        assert first.path.is_dir()
        assert first.path != second.path


def make_and_die(folder):
    scratch = Scratch(folder)
    assert scratch.path.is_dir()
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(path):
    with written_whole(path) as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_files_that_killed_processes_were_writing_are_swept(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl")
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(ledger.path,))
    process.start()
    process.join(60)
    assert len(left(tmp_path)) == 2
    with ledger.writing():
        assert left(tmp_path) == ["trials.jsonl", "trials.lock"]
        assert ledger.path.read_bytes() == b""


@pytest.mark.parametrize("count", [1, 3])
def test_what_killed_processes_left_is_swept(tmp_path, count):
    context = multiprocessing.get_context("fork")
    for _ in range(count):
        process = context.Process(target=make_and_die, args=(tmp_path,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(left(tmp_path)) == 1, "each sweeps what the one before left"
    (tmp_path / f"{PREFIX}of somebody").write_bytes(b"no folder")
    with Scratch(tmp_path) as scratch:
        assert left(tmp_path) == sorted([scratch.path.name, f"{PREFIX}of somebody"])


STREAMS = """
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

seen = []

def model():
    return nn.Linear(3, 2)

def data():
    return DataLoader(TensorDataset(torch.randn(60, 3), torch.arange(60) % 2), 5)

def step(model, batch):
    temporary = list(Path(tempfile.gettempdir()).iterdir())
    files = [file for scratch in Path("run").glob(".plywise-scratch-*") for file in scratch.rglob("*.pt")]
    seen.append((len(files), temporary))
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)
"""


def compare():
    streams = {name: load(f"streams:{name}", name) for name in ("model", "data", "step")}
    how = {"methods": "sgd", "trials": 0, "seeds": 1, "steps": 3, "out": "run", "progress": False}
    return pw.arena.bench(streams["model"], streams["data"](), step=streams["step"], **how)


def train():
    given = {name: f"streams:{name}" for name in ("model", "data", "step")}
    open_session(TrainConfig(**given, epochs=1, out=Path("run"))).run()


@pytest.mark.parametrize("command", [compare, train])
def test_batches_of_a_stream_are_in_the_folder_of_the_results(user_module, tmp_path, monkeypatch, command):
    user_module("streams", STREAMS)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    command()
    seen = load("streams:seen", "what was seen")
    assert seen
    assert all(files >= 12 and temporary == [] for files, temporary in seen)
    gc.collect()
    assert not [name for name in left(tmp_path / "run") if name.startswith(PREFIX)]


def read_and_die(folder):
    parts = read_parts("streams:data", Reading(folder=folder))
    assert parts
    os.kill(os.getpid(), signal.SIGKILL)


def test_batches_that_a_killed_process_left_are_swept_by_the_next_that_reads(user_module, tmp_path):
    user_module("streams", STREAMS)
    process = multiprocessing.get_context("fork").Process(target=read_and_die, args=(tmp_path / "run",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (before,) = left(tmp_path / "run")
    parts = read_parts("streams:data", Reading(folder=tmp_path / "run"))
    (after,) = left(tmp_path / "run")
    assert before != after == Path(parts["train"].files[0]).parent.name
