"""Trials on a real Ray cluster on this machine give the same lines as trials in processes."""

import functools
import os
import sys
import time
from pathlib import Path

import pytest

from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import ProcessExecutor
from plywise.arena.run.job import TrialJob
from plywise.arena.run.ledger import read
from plywise.arena.run.ray_executor import RayExecutor
from plywise.arena.scoring.records import FINAL, TUNED, Key
from plywise.cli import main
from plywise.errors import PlywiseError

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a busy machine

HERE = "competitors"
OWN = WorkloadSpec("own", f"{HERE}:model", f"{HERE}:data", steps=12, batch_size=32)
CLOCKS = ("cpu", "wall", "measuring", "peak_mib", "finished")


@pytest.fixture(scope="module")
def executor():
    """Start a cluster with two CPUs once, since this takes seconds."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", functools.partial(ray.init, num_cpus=2))
        started = RayExecutor("local", timeout_s=60.0)
    yield started
    ray.shutdown()


@pytest.fixture(autouse=True)
def _findable(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


@pytest.fixture(scope="module")
def own():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.path.dirname(__file__))
        made = resolve_bench(BenchConfig((OWN,), ("sgd",)))
    with made:
        yield made.workloads["own"]


def make_job(own, method, seed=0):
    key = Key("own", method, FINAL, TUNED, 0, seed)
    return TrialJob(key, own.source, {"lr": 0.1}, str(own.file))


def drop_clocks(lines):
    return {
        (line["method"], line["seed"], line["track"]): {
            name: line[name] for name in line if name not in CLOCKS
        }
        for line in lines
    }


def test_an_address_without_a_cluster_is_refused():
    pytest.importorskip("ray", reason="ray is not installed")  # and not yet connected
    with pytest.raises(PlywiseError, match=r"no Ray cluster at '127.0.0.1:1' \(.*refused.*`ray start"):
        RayExecutor("127.0.0.1:1")


def test_the_same_lines_as_in_processes_and_a_killed_trial_harms_no_other(executor, own):
    jobs = [make_job(own, method) for method in ("sgd", f"{HERE}:Killed", "local-loss", f"{HERE}:Exploding")]
    jobs.append(make_job(own, "sgd", seed=7))
    given = {one.key: one for one in jobs}
    ended = list(executor.run(iter(jobs)))
    assert executor.count == 2
    assert all(given.pop(one.key) is one for one, _ in ended)
    assert not given, "each job once, with its own line"
    on_ray = drop_clocks(line for _, line in ended)
    here = drop_clocks(line for _, line in ProcessExecutor(2).run(jobs))
    assert on_ray == here
    assert on_ray[f"{HERE}:Killed", 0, TUNED]["failure"] == "its process was lost (killed by SIGKILL)"
    assert "diverged" in on_ray[f"{HERE}:Exploding", 0, TUNED]["failure"]


def test_a_hanging_trial_is_ended_and_jobs_start_when_a_worker_is_free(executor, own, monkeypatch):
    monkeypatch.setattr(executor, "timeout_s", 3.0)
    taken = []

    def jobs():
        for seed, method in enumerate((f"{HERE}:Hanging", "sgd", "sgd", "sgd")):
            taken.append(seed)
            yield make_job(own, method, seed)

    ended = []
    for _, line in executor.run(jobs()):
        ended.append(line)
        assert len(taken) <= len(ended) + executor.count, "a budget that is spent stops the next trial"
    failures = {line["seed"]: line["failure"] for line in ended}
    assert failures == {0: "took longer than 3 s", 1: None, 2: None, 3: None}


OWN_METHODS = """
import multiprocessing, os, pathlib, signal, time, torch

class Noted(torch.optim.SGD):
    def step(self, closure=None):
        pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
        time.sleep(600)

class Regicide(torch.optim.SGD):
    def step(self, closure=None):
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        os._exit(1)
"""


@pytest.fixture
def own_methods(tmp_path, monkeypatch):
    (tmp_path / "methods_here.py").write_text(OWN_METHODS)
    monkeypatch.syspath_prepend(tmp_path)


def wait_for_process(folder):
    """Wait for a trial that never ends, and return the folder of its process in /proc."""
    end = time.monotonic() + 60
    noted = folder / "pid"
    while not noted.exists() or not noted.read_text():
        assert time.monotonic() < end, "it never began"
        time.sleep(0.05)
    process = Path("/proc", noted.read_text())
    assert process.exists()
    return process


def test_stopping_early_ends_what_runs(executor, own, tmp_path, own_methods):
    running = executor.run(make_job(own, method) for method in ("methods_here:Noted", "sgd"))
    done, _ = next(running)
    assert done.key.method == "sgd"
    process = wait_for_process(tmp_path)
    niceness = os.getpriority(os.PRIO_PROCESS, int(process.name))
    assert niceness == os.getpriority(os.PRIO_PROCESS, 0), "other work would leave it no time"
    running.close()
    assert not process.exists(), "the trial that hangs is not left behind"


def test_a_stopped_executor_returns_finished_trials_and_starts_no_more(executor, own):
    import ray

    stopped = RayExecutor(timeout_s=60.0)
    three = [make_job(own, "sgd", seed) for seed in range(3)]
    running = stopped.run(three)
    seeds = [next(running)[1]["seed"]]
    end = time.monotonic() + 60
    while (
        ray.available_resources().get("CPU") != executor.count
    ):  # the second has ended, and nobody has looked
        assert time.monotonic() < end
        time.sleep(0.05)
    stopped.stop()
    seeds += [line["seed"] for _, line in running]
    assert sorted(seeds) == [0, 1]
    assert list(stopped.run(three)) == [], "for good"


def test_a_stopped_executor_ends_running_trials(executor, own, tmp_path, own_methods):
    stopped = RayExecutor(timeout_s=60.0)
    running = stopped.run(make_job(own, method) for method in ("methods_here:Noted", "sgd"))
    assert next(running)[0].key.method == "sgd"
    process = wait_for_process(tmp_path)
    stopped.stop()
    assert list(running) == []
    assert not process.exists()


def test_a_bench_on_ray_from_the_command_line(executor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["bench", f"{HERE}:model", "--data", f"{HERE}:data", "--steps", "12", "--batch-size", "32"]
    words += ["--methods", f"sgd,{HERE}:Leaving", "--trials", "1", "--seeds", "1"]
    ledgers = []
    for own in (["--out", "ray", "--ray", "auto"], ["--out", "here", "--workers", "2"]):
        with pytest.raises(SystemExit) as left:
            main([*words, *own])
        assert left.value.code == 0, capsys.readouterr()
        ledgers.append(sorted(map(repr, drop_clocks(read(Path(own[1], "trials.jsonl"))).values())))
    assert len(ledgers[0]) == 6
    assert ledgers[0] == ledgers[1]


def test_a_module_that_the_machines_do_not_have_is_not_a_lost_trial(executor, own, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "only_here.py").write_text("from torch.optim import SGD as Mine\n")
    one = make_job(own, "only_here:Mine")
    with pytest.raises(PlywiseError, match=r"cannot run only_here:Mine: .*no module 'only_here'.*installed"):
        list(executor.run([one]))


def test_more_threads_than_any_machine_has(executor):
    with pytest.raises(PlywiseError, match=r"has 3 CPUs: they have 2\. Take fewer --threads"):
        RayExecutor(threads=3)


def test_a_killed_ray_worker_is_an_outcome(executor, own, own_methods):
    jobs = [make_job(own, method) for method in ("methods_here:Regicide", "sgd")]
    ended = {one.key.method: line for one, line in executor.run(jobs)}
    why = "its process was lost (WorkerCrashedError on Ray)"
    assert ended["methods_here:Regicide"]["failure"] == why
    assert ended["sgd"]["failure"] is None


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(PlywiseError, match=r"pip install 'plywise\[ray\]'"):
        RayExecutor()
