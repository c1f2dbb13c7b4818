"""Checkpoints: whole or not at all, whatever is killed when; read without running what is in them."""

import hashlib
import os
import pickle
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plywise.errors import StateError
from plywise.local import checkpoint
from processes import CONTEXT

from .learners import batches, difference, make, states

NAMES = ["a", "b", "learner"]


def some(step: int) -> dict[str, Any]:
    """States of a step, each with what states have in them."""
    value = torch.full((3, 4), float(step))
    return {
        "a": {
            "weights": value.to(torch.bfloat16),
            "view": value.t(),
            "empty": torch.zeros(0, 2),
            "none": None,
        },
        "b": {
            "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "rates": [0.1, (1, 2.5)], "on": True}
        },
        "learner": {"steps": step},
    }


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what goes in comes out ----------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new", 7, some(7))
    assert path == tmp_path / "new" / "step_000000007"
    found = checkpoint.load(tmp_path / "new", None, NAMES)
    assert difference(found, some(7)) == ""
    assert found["a"]["view"].stride() == (1, 4)


@pytest.mark.parametrize("kind", ["associated, Foof", "local", "local, images", "cascaded"])
def test_a_learner_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    data = batches(kind, 6)
    one, other = make(kind), make(kind)
    for x, y in data[:3]:
        one.step(x, y)
    checkpoint.save(tmp_path, 3, states(one.trainers))
    found = checkpoint.load(tmp_path, 3, [f"component {index}" for index in range(5)])
    for trainer in other.trainers:
        trainer.load_state_dict(found[f"component {trainer.index}"])
    other.steps = 3
    for x, y in data[3:]:
        one.step(x, y)
        other.step(x, y)
    assert difference(states(other.trainers), states(one.trainers)) == ""


def test_some_names_of_all(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, some(1))
    found = checkpoint.load(tmp_path, 1, ["b"], NAMES)
    assert difference(found, {"b": some(1)["b"]}) == ""


# ---- which ---------------------------------------------------------------------------------------


def test_the_last_k_stay(tmp_path: Path) -> None:
    for step in (1, 2, 5, 10, 11):
        checkpoint.save(tmp_path, step, some(step), keep=3)
    assert checkpoint.steps(tmp_path) == [5, 10, 11]
    assert len(written(tmp_path)) == 3
    assert checkpoint.load(tmp_path, None, NAMES)["learner"]["steps"] == 11
    assert checkpoint.load(tmp_path, 5, NAMES)["learner"]["steps"] == 5
    checkpoint.save(tmp_path, 12, some(12), keep=1)
    assert checkpoint.steps(tmp_path) == [12]


def test_order_is_that_of_numbers(tmp_path: Path) -> None:
    for step in (999_999_999, 1_000_000_000):
        checkpoint.save(tmp_path, step, some(step))
    assert checkpoint.load(tmp_path, None, NAMES)["learner"]["steps"] == 1_000_000_000


def test_a_step_written_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, some(1))
    checkpoint.save(tmp_path, 1, {**some(1), "learner": {"steps": 1, "again": True}}, keep=1)
    assert checkpoint.load(tmp_path, 1, NAMES)["learner"] == {"steps": 1, "again": True}
    assert written(tmp_path) == ["step_000000001"]


def test_a_step_before_others_is_written_and_said_to_be_hidden(tmp_path: Path) -> None:
    """Who goes back to an earlier checkpoint loses nothing, and is shown what restore would take."""
    checkpoint.save(tmp_path, 8, some(8))
    with pytest.warns(UserWarning, match=r"later steps \(8\)"):
        checkpoint.save(tmp_path, 6, some(6), keep=1)
    assert checkpoint.steps(tmp_path) == [6, 8]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(StateError, match="1 or more"):
        checkpoint.save(tmp_path, 1, some(1), keep=keep)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    """And does not count as a checkpoint before."""
    checkpoint.save(tmp_path, 1, some(1))
    for left in ("step_000000002.partial", "step_000000001.old.partial"):
        shutil.copytree(tmp_path / "step_000000001", tmp_path / left)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load(tmp_path, None, NAMES)["learner"]["steps"] == 1
    checkpoint.save(tmp_path, 3, some(3))
    assert written(tmp_path) == ["step_000000001", "step_000000003"]


def test_missing_folders_steps_and_names(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not hold a checkpoint: it has none"):
        checkpoint.load(tmp_path / "nowhere", None, NAMES)
    assert checkpoint.steps(tmp_path / "nowhere") == []
    checkpoint.save(tmp_path, 2, some(2))
    checkpoint.save(tmp_path, 4, some(4))
    with pytest.raises(StateError, match=r"the checkpoint of step 3: it has those of steps 2, 4"):
        checkpoint.load(tmp_path, 3, NAMES)
    with pytest.raises(StateError, match=r"another learner's: it holds a, b, learner, not a, b, c, learner"):
        checkpoint.load(tmp_path, 4, [*NAMES, "c"])
    with pytest.raises(StateError, match="another learner's"):
        checkpoint.load(tmp_path, 4, ["a", "b"])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: (path / "b.pt").write_bytes((path / "b.pt").read_bytes()[:-500]),
    "empty": lambda path: (path / "b.pt").write_bytes(b""),
    "zeros": lambda path: zero(path / "b.pt", 64),
    "bit": lambda path: flip(path / "b.pt", 300),
    "lost": lambda path: (path / "b.pt").unlink(),
    "digest": lambda path: flip(path / "SHA256SUMS", 5),
    "name": lambda path: flip(path / "SHA256SUMS", 66),
    "digests": lambda path: (path / "SHA256SUMS").unlink(),
    "no digests": lambda path: (path / "SHA256SUMS").write_bytes(b""),
    "both": lambda path: [file.unlink() for file in (path / "b.pt", path / "SHA256SUMS")],
    "another file": lambda path: (path / "c.pt").write_bytes(b"x"),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def zero(path: Path, count: int) -> None:
    """A hole in the numbers, as a power cut leaves it."""
    content = path.read_bytes()
    start = content.index(b"/data/0") + 8
    assert any(content[start : start + count])
    path.write_bytes(content[:start] + bytes(count) + content[start + count :])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 1, some(1))
    DAMAGES[damage](checkpoint.save(tmp_path, 2, some(2)))
    with pytest.raises(StateError, match=r"step_000000002 cannot be read: it is damaged: "):
        checkpoint.load(tmp_path, 2, NAMES)
    with pytest.warns(RuntimeWarning, match=r"that of step 2 is damaged \(.*\)\. That of step 1 is taken"):
        found = checkpoint.load(tmp_path, None, ["a"], NAMES)
    assert difference(found, {"a": some(1)["a"]}) == ""
    DAMAGES[damage](tmp_path / "step_000000001")
    with pytest.raises(StateError, match=r"that of step 1 is damaged .* There is no other"):
        checkpoint.load(tmp_path, None, NAMES)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, some(1)).rename(tmp_path / "step_000000005")
    with pytest.raises(StateError, match=r"step_000000005 .* holds the state after 1 steps"):
        checkpoint.load(tmp_path, 5, NAMES)


def test_digests_are_those_of_the_tool_that_everybody_has(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, some(1))
    for line in (path / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    assert written(path) == ["SHA256SUMS", "a.pt", "b.pt", "learner.pt"]


def test_files_and_folders_are_on_the_disk_before_they_count(tmp_path: Path, monkeypatch: Any) -> None:
    """Of every file its bytes and its name are synced before the rename that makes it a checkpoint."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def note_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    checkpoint.save(tmp_path, 1, some(1))
    place = events.index("rename step_000000001.partial")
    for name in ("a.pt", "b.pt", "learner.pt", "SHA256SUMS"):
        files = [event for event in events[:place] if event.startswith(f"sync .{name}.")]
        assert len(files) == 1, events
    assert events[place - 1] == "sync step_000000001.partial"
    assert f"sync {tmp_path.name}" in events[place + 1 :]


# ---- checkpoints of plywise 0.1 ------------------------------------------------------------------------

OLD = Path(__file__).with_name("saved_by_0_1_0")


def test_checkpoints_of_the_first_version_are_read_but_not_their_pickles(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD, tmp_path / "old")
    trap = tmp_path / "trap"
    for index in folder.rglob(".metadata"):
        index.write_bytes(pickle.dumps(Trap(trap)))
    found = checkpoint.load(folder, None, NAMES)
    assert difference(found, some(7)) == ""
    assert not trap.exists()
    data = folder / "step_000000007" / "b" / "__0_0.distcp"
    flip(data, len(data.read_bytes()) // 2)
    with pytest.raises(StateError, match=r"step 7 is damaged \(b/__0_0.distcp"):
        checkpoint.load(folder, None, NAMES)


def test_states_are_read_without_running_what_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "trap"
    checkpoint.save(tmp_path, 1, {**some(1), "a": Trap(path)})
    with pytest.raises(StateError, match=r"[Ww]eights.only"):
        checkpoint.load(tmp_path, 1, NAMES)
    assert not path.exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "unpickled")


# ---- together ------------------------------------------------------------------------------------


def together(count: int, folder: Path, states_of: list[dict[str, Any]], step: int) -> list[Any]:
    """Save from several threads that agree like processes do; what each returned or raised."""
    barrier, votes = threading.Barrier(count, timeout=30), [True] * count
    outcomes: list[Any] = [None] * count

    def one(rank: int) -> None:
        def agree(ok: bool) -> bool:
            votes[rank] = ok
            barrier.wait()
            answer = all(votes)
            barrier.wait()
            return answer

        try:
            own = states_of[rank]
            outcomes[rank] = checkpoint.save(folder, step, own, 2, first=rank == 0, agree=agree)
        except StateError as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def test_several_write_one_checkpoint(tmp_path: Path) -> None:
    whole = some(3)
    paths = together(3, tmp_path, [{name: whole[name]} for name in NAMES], 3)
    assert set(paths) == {tmp_path / "step_000000003"}
    assert difference(checkpoint.load(tmp_path, None, NAMES), whole) == ""


def test_if_one_cannot_write_there_is_no_checkpoint(tmp_path: Path) -> None:
    """And the former one stays; all learn of it, the one that failed knows why."""
    checkpoint.save(tmp_path, 2, some(2))
    whole = some(3)
    bad = {"b": {"cannot be pickled": threading.Lock()}}
    outcomes = together(3, tmp_path, [{"a": whole["a"]}, bad, {"learner": whole["learner"]}], 3)
    assert all(isinstance(outcome, StateError) for outcome in outcomes)
    assert "pickle" in str(outcomes[1])
    assert "another process says why" in str(outcomes[0])
    assert checkpoint.steps(tmp_path) == [2]
    assert difference(checkpoint.load(tmp_path, None, NAMES), some(2)) == ""
    together(3, tmp_path, [{name: whole[name]} for name in NAMES], 3)
    assert written(tmp_path) == ["step_000000002", "step_000000003"]


# ---- atomicity -----------------------------------------------------------------------------------


def save_on_and_on(folder: str) -> None:
    """Save step after step, until killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step = 1
    while True:
        checkpoint.save(Path(folder), step, {**some(step), "a": torch.full((300, 1000), float(step))}, keep=2)
        step += 1


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    """Killed at many moments; whatever counts as a checkpoint then is whole."""
    generator = torch.Generator().manual_seed(0)
    partials = 0
    process = CONTEXT.Process(target=save_on_and_on, args=(str(tmp_path),))
    process.start()
    try:
        wait_for(lambda: len(checkpoint.steps(tmp_path)) == 2, process)
        for _ in range(30):  # stopped, all is as after a kill: look, and let it go on
            time.sleep(float(torch.rand((), generator=generator)) * 0.02)
            os.kill(process.pid, signal.SIGSTOP)
            copy = tmp_path.with_name("copy")
            shutil.copytree(tmp_path, copy)
            os.kill(process.pid, signal.SIGCONT)
            partials += len(list(copy.glob("*.partial")))
            assert_whole(copy)
            shutil.rmtree(copy)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        last = assert_whole(tmp_path)
        checkpoint.save(tmp_path, last + 9, some(last + 9), keep=1)
        assert written(tmp_path) == [f"step_{last + 9:09d}"]  # what the killed one left is gone
    finally:
        process.kill()
        process.join(10)
    assert partials > 4, "hardly ever stopped while it wrote: this shows nothing"


def wait_for(ready: Any, process: Any) -> None:
    end = time.monotonic() + 90
    while not ready():
        assert time.monotonic() < end, "nothing happened before the deadline"
        assert process.is_alive()
        time.sleep(0.01)


def assert_whole(folder: Path) -> int:
    """Every checkpoint that is there can be read, and is what was written; the last one's step."""
    known = checkpoint.steps(folder)
    assert known
    for step in known:
        found = checkpoint.load(folder, step, NAMES)
        assert found["learner"]["steps"] == step
        assert torch.equal(found["a"], torch.full((300, 1000), float(step)))
        assert difference(found["b"], some(step)["b"]) == ""
    return known[-1]
