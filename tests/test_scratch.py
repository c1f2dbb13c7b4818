"""Scratch folders and files in the making: gone at the end, and what a killed process leaves is swept."""

import multiprocessing
import os
import signal

import pytest

from plywise._util.files import written_whole
from plywise._util.scratch import PREFIX, Scratch
from plywise.arena.run.ledger import Ledger


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


def test_folders_in_use_are_not_swept(tmp_path):
    with Scratch(tmp_path) as first, Scratch(tmp_path) as second:
        assert first.path.is_dir()
        assert first.path != second.path


def make_and_die(folder):
    Scratch(folder)
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
