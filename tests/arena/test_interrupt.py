"""Ctrl-C during `plywise bench`, sent like a terminal does to every process of the command at once."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from odd_jobs import Starts

from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import ProcessExecutor, hold_interrupts
from plywise.arena.run.job import TrialJob
from plywise.arena.run.ledger import read
from plywise.arena.scoring.records import FINAL, TUNED, Key
from plywise.cli.interrupt import STOPPING
from processes import ForkedCommand

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a busy machine

PATH = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
HERE, STARTS = "competitors", "odd_jobs"
OWN = WorkloadSpec("own", f"{HERE}:model", f"{HERE}:data", steps=12, batch_size=32)
BENCH = ("bench", f"{HERE}:model", "--data", f"{HERE}:data", "--steps", "12", "--batch-size", "32")


@pytest.fixture(autouse=True)
def _findable(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    monkeypatch.chdir(tmp_path)


class Command:
    """A bench in its own session, with its own folder for temporary files."""

    def __init__(self, folder, scratch, methods, *words):
        self.scratch, self.out = scratch, folder / "out"
        self.ledger = self.out / "trials.jsonl"
        self.process = ForkedCommand(
            ["plywise", *BENCH, "--methods", methods, "--out", str(self.out), *words],
            {"TMPDIR": str(self.scratch), "PYTHONPATH": PATH},
            folder / "stdout",
            folder / "stderr",
            session=True,
        )

    def wait_until(self, happened):
        end = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < end, self.process.communicate()
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def lines(self):
        return list(read(self.ledger))

    def interrupt(self):
        """Send Ctrl-C to all processes of the command."""
        os.killpg(self.process.pid, signal.SIGINT)

    def find_processes(self):
        """Find the living processes of the session, as folders of /proc."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) == self.process.pid:
                    found.append(entry)
        return found

    def imports_torch(self):
        """Say whether the process that trials are forked from has imported torch."""
        with contextlib.suppress(OSError):
            for entry in self.find_processes():
                of_the_command = int(entry.name) == self.process.pid  # it is such a fork itself
                if not of_the_command and "forkserver" in (entry / "cmdline").read_text():
                    return "libtorch_cpu" in (entry / "maps").read_text()
        return False

    def finish(self):
        """Return standard output and error, after checking that no file or process is left."""
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == 130, err
        assert "Traceback" not in out + err
        assert list(self.out.glob(".plywise*")) == []
        end = time.monotonic() + 300
        while left := self.find_processes():
            assert time.monotonic() < end, left
            time.sleep(0.05)
        return out, err


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a bench; after a failed test, end its remaining processes."""
    begun = []
    with tempfile.TemporaryDirectory() as scratch:  # a short path: a socket's name holds 107 bytes

        def _start(*words):
            begun.append(Command(tmp_path, Path(scratch), *words))
            return begun[-1]

        yield _start
        for command in begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.process.pid, signal.SIGKILL)
            command.process.communicate()


def test_an_interrupt_is_handled_and_loses_no_finished_trial(start):
    command = start(f"sgd,{HERE}:Hanging", "--trials", "4", "--seeds", "1", "--workers", "2")
    # the methods' trials take turns, and those of the second never end: two of the first one's do
    command.wait_until(lambda: command.ledger.exists() and len(command.lines()) == 2)
    assert len(list(command.out.glob(".plywise-scratch-*"))) == 1
    before = command.lines()
    command.interrupt()
    _, output = command.finish()
    assert output.index(STOPPING) < output.index("Interrupted."), "first of all"
    kept = command.lines()
    assert kept[: len(before)] == before
    assert {line["method"] for line in kept} == {"sgd"}, "what was running is no outcome"
    assert f"Interrupted. {len(kept)} of 12 trials are kept; {command.out / 'report.html'} shows" in output
    assert f"`plywise bench --resume --out {command.out}` goes on." in output
    assert "Not finished." in (command.out / "report.html").read_text()
    assert json.loads((command.out / "bench.json").read_text())["unfinished"] != []


def test_the_next_bench_removes_the_leftovers_of_a_killed_one(start):
    """The trials of the killed bench end too, since no process waits for their lines."""
    command = start(f"sgd,{HERE}:Hanging", "--trials", "1", "--seeds", "1", "--workers", "2")
    command.wait_until(lambda: command.ledger.exists() and command.lines())
    scratch = list(command.out.glob(".plywise-scratch-*"))
    command.process.kill()
    command.process.wait()
    end = time.monotonic() + 300
    while left := command.find_processes():
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert scratch
    assert scratch == list(command.out.glob(".plywise-scratch-*"))
    config = BenchConfig((OWN,), ("sgd",))
    with resolve_bench(config, command.out) as resolved:
        assert len(list(command.out.glob(".plywise-scratch-*"))) == 1
        with resolve_bench(config, command.out):
            assert resolved.workloads["own"].file.exists(), "of one that lives nothing is swept"
    assert list(command.out.glob(".plywise*")) == []


def test_a_second_ctrl_c_skips_the_report(start, tmp_path):
    command = start(f"sgd,{HERE}:Hanging", "--trials", "1", "--seeds", "1", "--workers", "2")
    command.wait_until(lambda: command.ledger.exists() and command.lines())
    command.interrupt()
    command.wait_until(lambda: STOPPING in (tmp_path / "stderr").read_text())
    command.interrupt()
    _, output = command.finish()
    assert "are kept. `plywise bench --resume" in output
    assert not (command.out / "report.html").exists()


def test_sigterm_reports_the_kept_trials(start):
    command = start(f"sgd,{HERE}:Hanging", "--trials", "1", "--seeds", "1", "--workers", "2")
    command.wait_until(lambda: command.ledger.exists() and command.lines())
    os.kill(command.process.pid, signal.SIGTERM)
    _, output = command.finish()
    assert f"Interrupted. {len(command.lines())} of 6 trials are kept. `plywise bench --resume" in output
    assert not (command.out / "report.html").exists()


def test_an_interrupt_before_the_first_trial(start):
    command = start("sgd", "--workers", "2")
    command.wait_until(command.imports_torch)
    command.interrupt()
    _, output = command.finish()
    assert STOPPING in output
    assert f"Interrupted. {len(command.lines())} of 14 trials are kept" in output


def test_an_interrupt_waits_until_a_trial_has_started():
    """Otherwise the process that is being started prints that its pipe has ended."""
    started = []

    @hold_interrupts()
    def press_and_start():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        started.append(True)

    with pytest.raises(KeyboardInterrupt):
        press_and_start()
    assert started


def make_jobs(*methods):
    resolved = resolve_bench(BenchConfig((OWN,), ("sgd",)))
    own = resolved.workloads["own"]
    keys = [Key("own", name, FINAL, TUNED, 0, 0) for name in methods]
    return resolved, [TrialJob(key, own.source, {}, str(own.file)) for key in keys]


def wait_for_children(count):
    """Wait until at most ``count`` child processes live."""
    end = time.monotonic() + 300
    while len(multiprocessing.active_children()) > count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stopped_executor_returns_finished_trials_and_ends_the_others():
    resolved, (sgd, adamw, hanging) = make_jobs("sgd", "adamw", f"{HERE}:Hanging")

    def start_late():
        yield hanging
        yield sgd
        wait_for_children(1)  # so that nobody has looked at the next one when this one's line comes
        yield adamw

    executor = ProcessExecutor(3)
    try:
        pieces = executor.run(start_late())
        ended = [next(pieces)[1]["method"]]
        wait_for_children(1)
        executor.stop()
        ended += [line["method"] for _, line in pieces]
        assert sorted(ended) == ["adamw", "sgd"]
        assert multiprocessing.active_children() == []
        assert list(executor.run([sgd])) == [], "for good"
    finally:
        resolved.close()


def is_alive(pid):
    """Say whether a process lives; a zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("ends", ["itself", "killed", "late"])
def test_processes_that_a_trial_started_end_with_it(ends, tmp_path):
    note = tmp_path / "pid"
    ((_, line),) = ProcessExecutor(1, timeout_s=5.0 if ends == "late" else 600.0).run(
        [Starts(str(note), ends)]
    )
    assert (line["failure"] is None) == (ends == "itself")
    end = time.monotonic() + 30
    while is_alive(note.read_text()):
        assert time.monotonic() < end, "what it started lives on"
        time.sleep(0.05)


def test_the_time_of_a_trial_counts_from_where_it_begins_and_a_lost_socket_is_named():
    """In a fresh process the imports of torch alone take longer than this trial may."""
    code = f"""
import multiprocessing.util, shutil
from {STARTS} import Sleeps
from plywise.arena.run.executor import ProcessExecutor, hold_interrupts
if __name__ == "__main__":
    ((_, line),) = ProcessExecutor(1, timeout_s=0.5).run([Sleeps(0.0)])
    print(line["failure"])
    ((_, line),) = ProcessExecutor(1, timeout_s=0.5).run([Sleeps(60.0)])
    print(line["failure"])
    shutil.rmtree(multiprocessing.util.get_temp_dir())
    list(ProcessExecutor(1).run([Sleeps(0.0)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.stdout.splitlines() == ["None", "took longer than 0.5 s"], done.stderr
    *_, error = done.stderr.partition("BenchError: ")
    assert "its socket in" in error, done.stderr
    assert "resume the bench with --resume" in error


def test_a_folder_for_temporary_files_with_a_long_path_is_named(tmp_path):
    far = tmp_path / ("long-" * 20)
    far.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "plywise", *BENCH, "--methods", "sgd", "--out", str(tmp_path / "out")],
        env={**os.environ, "TMPDIR": str(far), "PYTHONPATH": PATH},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "set TMPDIR to one with a short path" in done.stderr
    assert str(far) in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
