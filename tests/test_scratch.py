"""Scratch folders: gone when they are closed, and when they were not, swept by the next one."""

import multiprocessing
import os
import signal

import pytest

from plywise._util.scratch import PREFIX, Scratch


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
