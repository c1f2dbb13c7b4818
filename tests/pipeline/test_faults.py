"""Processes killed, stopped, cut off, slow or failing: all others say in time who it was, and end cleanly."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from plywise.local import checkpoint
from processes import ForkedCommand

from . import jobs
from .crew import Crew
from .fleet import PROMISE, Fleet, free_port
from .learners import alone, batches, difference, states

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals, no gloo"),
]

PATIENCE = 4.0


def assert_all_name(
    fleet: Fleet, lost: list[int], since: float, names: list[str], caught: str = "PipelineError"
) -> None:
    """Everybody else raises in time, says who is lost, and ends with a traceback, not a crash."""
    others = [rank for rank in range(len(names)) if rank not in lost]
    for rank in others:
        report = fleet.report(rank, since + PROMISE)
        assert report["type"] == caught, fleet.logs()
        assert report["message"].startswith(f"{names[rank]} stops: "), report["message"]
        cause = report["message"].removeprefix(f"{names[rank]} stops: ")
        assert any(f"{names[who]} (rank {who})" in cause for who in lost), cause
        assert not any(f"(rank {other})" in cause for other in others), cause
        seconds = report["when"] - since
        print(f"rank {rank}: {seconds:.1f} s: {cause}")
        assert seconds < PROMISE
    for rank in others:
        assert fleet.exit_code(rank, since + 2 * PROMISE) == 1, fleet.logs()
        assert "plywise.errors.PipelineError: " in fleet.log(rank)


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_stage_is_named_by_all_others(tmp_path: Path, how: signal.Signals, lost: int) -> None:
    chance = random.Random(f"{how} {lost}")
    fresh = {2} if (how, lost) == (signal.SIGSTOP, 0) else set()  # this one has to end as a script does
    with Fleet(tmp_path, 3, {"kind": "local", "timeout_s": PATIENCE}, fresh=fresh) as fleet:
        fleet.wait_for_step(2, chance.randrange(1, 30))
        time.sleep(chance.random() * 0.03)
        since = fleet.hit(lost, how)
        assert_all_name(fleet, [lost], since, ["stage 0", "stage 1", "stage 2"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_replica_is_named_by_all_others(tmp_path: Path, how: signal.Signals) -> None:
    """Its twin waits for it in DistributedDataParallel, where nobody looks at a watch."""
    names = [f"stage {stage}, replica {replica}" for stage in (0, 1) for replica in (0, 1)]
    settings = {"kind": "local, plain", "replicas": 2, "timeout_s": PATIENCE}
    with Fleet(tmp_path, 4, settings) as fleet:
        fleet.wait_for_step(3, 7)
        assert_all_name(fleet, [3], fleet.hit(3, how), names)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_reaches_all_others_with_its_name(crew: Crew, failing: int) -> None:
    outcomes = crew.outcomes(3, jobs.fail, failing, "ValueError")
    for rank, outcome in enumerate(outcomes):
        if rank == failing:
            assert (outcome.raised, outcome.value) == ("ValueError", "no good")
        else:
            assert outcome.raised == "PipelineError"
            expected = f"stage {rank} stops: stage {failing} (rank {failing}) failed: ValueError: no good."
            assert outcome.value.startswith(expected)


def test_an_interrupt_in_one_process_reaches_all_others(crew: Crew) -> None:
    outcomes = crew.outcomes(3, jobs.fail, 1, "KeyboardInterrupt")
    assert all("stage 1 (rank 1) failed: KeyboardInterrupt" in outcomes[rank].value for rank in (0, 2))


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_stage_is_not_lost(crew: Crew, slow: int) -> None:
    """Its step takes longer than anybody's patience."""
    parts = crew.run(3, jobs.dawdle, slow, 2.8)
    merged = {name: state for part in parts for name, state in part.items()}
    assert difference(merged, states(alone("local", batches("local", 12)).trainers)) == ""


def test_a_slow_replica_is_not_lost(crew: Crew) -> None:
    """It takes longer than the time that torch itself would wait for."""
    first, second = crew.run(2, jobs.dawdle_as_replica)
    assert difference(first, second) == ""


def test_who_is_done_may_leave(tmp_path: Path) -> None:
    """Signals on the way arrive, and the first process keeps the store, however long the last one takes."""
    settings = {"kind": "local", "count": 5, "timeout_s": 2.0, "rest": [2, 1]}
    with Fleet(tmp_path, 3, settings) as fleet:
        end = time.monotonic() + 90
        assert [fleet.exit_code(rank, end) for rank in range(3)] == [0, 0, 0], fleet.logs()
    assert difference(left_in(tmp_path, 3), unbroken("local", 5)) == ""


def test_a_pause_of_all_is_no_loss(tmp_path: Path) -> None:
    """A suspended machine: everybody has stood still for longer than anybody's patience."""
    with Fleet(tmp_path, 3, {"kind": "local", "timeout_s": 2.0}) as fleet:
        fleet.wait_for_step(2, 5)
        for rank in range(3):
            fleet.hit(rank, signal.SIGSTOP)
        time.sleep(3.0)
        before = fleet.step(0)
        for rank in range(3):
            fleet.hit(rank, signal.SIGCONT)
        fleet.wait_for_step(2, before + 100)


# ---- going on ------------------------------------------------------------------------------------


def unbroken(kind: str, count: int) -> dict[str, Any]:
    return states(alone(kind, batches(kind, count)).trainers)


def left_in(folder: Path, world: int) -> dict[str, Any]:
    """The states that processes have left at their end."""
    parts = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return {name: state for part in parts for name, state in part.items()}


def test_a_restart_from_the_last_checkpoint_ends_in_the_same_weights(crew: Crew, tmp_path: Path) -> None:
    kind, count, chance = "associated, Foof", 30, random.Random(0)
    settings = {"kind": kind, "count": count, "save": 4, "timeout_s": PATIENCE}
    settings["kill"] = {"0": [1, chance.randrange(9, 25)]}
    with Fleet(tmp_path, 3, settings) as fleet:
        assert fleet.exit_code(1, time.monotonic() + 90) == -signal.SIGKILL
        since = time.monotonic()
        for rank in (0, 2):
            assert "stage 1 (rank 1)" in fleet.report(rank, since + PROMISE)["message"]
            assert fleet.exit_code(rank, since + 2 * PROMISE) == 1
    done = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert 8 <= done < count
    crew.run(2, jobs.save, kind, [0, 3], str(tmp_path / "checkpoints"), done, count, count)
    names = [f"component {index}" for index in range(5)]
    found = checkpoint.load(tmp_path / "checkpoints", count, names, [*names, "learner"])
    assert difference(found, unbroken(kind, count)) == ""


def test_torchs_agent_restarts_them(tmp_path: Path) -> None:
    """Twice: first the last stage kills itself, then the one that has the store."""
    kind, count = "associated", 20
    settings = {"kind": kind, "count": count, "save": 3, "kill": {"0": [1, 7], "1": [0, 14]}}
    words = ["python", str(Path(__file__).with_name("elastic.py")), str(tmp_path), json.dumps(settings)]
    agent = ForkedCommand(words, {"OMP_NUM_THREADS": "1"}, tmp_path / "out", tmp_path / "log")
    try:
        code = agent.wait(150)
    finally:
        if agent.poll() is None:
            agent.send_signal(signal.SIGTERM)  # it ends its workers
            agent.wait(40)
    text = (tmp_path / "log").read_text(errors="replace")
    assert code == 0, text
    assert text.count("Signal 9") >= 2 or text.count("exitcode: -9") >= 2, text
    found = {
        k: v for rank in (0, 1) for k, v in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items()
    }
    assert difference(found, unbroken(kind, count)) == ""


def test_one_pipeline_after_another(tmp_path: Path) -> None:
    """In the same processes, at the same meeting place."""
    with Fleet(tmp_path, 2, {"kind": "local", "count": 7, "stops": [2, 4, 7]}) as fleet:
        end = time.monotonic() + 90
        assert [fleet.exit_code(rank, end) for rank in (0, 1)] == [0, 0], fleet.logs()
    assert difference(left_in(tmp_path, 2), unbroken("local", 7)) == ""


# ---- places --------------------------------------------------------------------------------------


def test_a_port_in_use(tmp_path: Path) -> None:
    port = free_port()
    with (
        jobs.listening(port),
        Fleet(tmp_path, 1, {"kind": "local"}, MASTER_PORT=port, WORLD_SIZE=2) as fleet,
    ):
        assert fleet.exit_code(0, time.monotonic() + 90) == 1
        message = f"PipelineError: Process 0 of 2 cannot meet the others at 127.0.0.1:{port}: "
        assert message in fleet.log(0)
        assert "Is the port in use" in fleet.log(0)


def test_nothing_listens_to_the_outside(tmp_path: Path) -> None:
    """All that a pipeline on one host opens is on the loopback device."""
    if not Path("/proc/net/tcp").exists():
        pytest.skip("there is no /proc/net/tcp to look into")
    with Fleet(tmp_path, 2, {"kind": "local"}) as fleet:
        fleet.wait_for_step(1, 3)
        places = fleet.listening()
        assert len(places) >= 3
        assert [place for place in places if not place[0].startswith("127.")] == []


def test_two_hosts_and_a_cable_that_is_cut(tmp_path: Path, two_hosts: tuple[str, str]) -> None:
    """The first stage on one host, two on the other: each side names the other."""
    first, second = two_hosts
    places = {"MASTER_ADDR": "10.97.0.1", "GLOO_SOCKET_IFNAME": "cable"}
    settings, hosts = {"kind": "local", "timeout_s": PATIENCE}, [first, second, second]
    with Fleet(tmp_path, 3, settings, hosts=hosts, **places) as fleet:
        fleet.wait_for_step(2, 10)
        since = time.monotonic()
        subprocess.run(["ip", "-n", first, "link", "set", "cable", "down"], check=True, timeout=30)
        names = ["stage 0", "stage 1", "stage 2"]
        here, there = fleet.report(0, since + PROMISE), fleet.report(1, since + PROMISE)
        # both stages beyond the cable fall silent at once: the one whose last sign came earlier is named
        assert re.search(r"no sign of life from stage ([12]) \(rank \1\)", here["message"])
        assert "stage 0 (rank 0) has not answered" in there["message"]
        assert "stage 0 (rank 0)" in fleet.report(2, since + PROMISE)["message"]
        for rank in range(len(names)):
            assert fleet.report(rank, since + PROMISE)["when"] - since < PROMISE
            assert fleet.exit_code(rank, since + 2 * PROMISE) == 1, fleet.logs()
