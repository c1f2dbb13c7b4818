"""`plywise bench` and `plywise report` in real processes with a user's module."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from plywise.arena.run.ledger import read
from plywise.arena.workloads import HIDDEN
from processes import ForkedCommand

COMPETITORS = (Path(__file__).parent.parent / "arena" / "competitors.py").read_text()
OWN = ["bench", "mine:model", "--data", "mine:data", "--steps", "12", "--batch-size", "32"]
SMALL = ["--trials", "1", "--seeds", "1", "--workers", "2"]


@pytest.fixture(autouse=True)
def _user(user_module):
    user_module("mine", COMPETITORS)


def start(*words):
    folder = Path.cwd()
    return ForkedCommand(["plywise", *words], {}, Path(f"{folder}.out"), Path(f"{folder}.err"))


def test_ones_own_model_from_beginning_to_report(tmp_path, plywise):
    done = plywise(*OWN, *SMALL, "--methods", "sgd,sgd-again,adamw,mine:Exploding,local-loss")
    assert done.code == 0
    output = done.out
    assert "Methods: 5; workloads: 1; tuning trials of each: 1; seeds: 1; trials in all: 15" in output
    assert "[15/15]" in output
    assert "diverged" in output
    folder = tmp_path / "runs" / "bench"
    about = json.loads((folder / "bench.json").read_text())
    assert about["unfinished"] == []
    assert about["workloads"]["mine:model"]["steps"] == 12
    assert len(list(read(folder / "trials.jsonl"))) == 15
    assert about["workloads"]["mine:model"]["layers"]["names"] == ["0", "2"], "looked at before training"
    assert "failures are counted, not dropped" in output
    page = (folder / "report.html").read_text()
    assert "mine:Exploding" in page
    assert len(page) < 2_000_000
    (folder / "report.html").unlink()
    done = plywise("report", "runs/bench")
    assert done.code == 0
    assert (folder / "report.html").read_text() == page
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()  # a page that cannot be written, for administrators, too
    without = plywise("report", "runs/bench")
    assert without.code == 1
    assert without.out.strip() in done.out, "the ranking, and all that follows"
    assert "plywise: The page could not be written: runs/bench/report.html is a folder" in without.err
    assert json.loads(plywise("report", "runs/bench", "--json").out)["report"] is None


def test_an_interrupted_bench_keeps_its_results_and_resumes(tmp_path, plywise):
    methods = ("--methods", "sgd,mine:Slow", "--trials", "2", "--seeds", "2", "--workers", "1")
    process = start(*OWN, *methods)
    ledger = tmp_path / "runs" / "bench" / "trials.jsonl"
    wait_until(lambda: ledger.exists() and len(ledger.read_text().splitlines()) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = list(read(ledger))
    assert f"{len(kept)} of 12 trials are kept" in output
    assert "plywise bench --resume --out runs/bench" in output
    assert (ledger.parent / "report.html").exists(), "what there is can be looked at"
    printed = plywise("bench", "--resume", "--dry-run")
    assert printed.code == 0
    assert f"for what is left; {len(kept)} trials are done" in printed.out
    assert list(read(ledger)) == kept, "a dry run leaves all as it is"
    assert plywise("bench", "--resume", "--workers", "2").code == 0
    assert len(list(read(ledger))) == 12
    assert list(read(ledger))[: len(kept)] == kept


def test_a_budget_sets_trials_and_steps(tmp_path, plywise):
    own = ["bench", "mine:model", "--data", "mine:data", "--methods", "sgd,fixed", "--seeds", "1"]
    own[own.index("sgd,fixed")] = "sgd,mine:fixed"
    done = plywise(*own, "--budget", "10m", "--dry-run")
    assert done.code == 0
    trials, steps = re.search(r"With (\d+) tuning trials .* mine:model (\d+)", done.out).groups()
    assert 4 <= int(trials) <= 16
    assert 200 <= int(steps) <= 20_000
    assert not (tmp_path / "runs").exists(), "a dry run leaves nothing"


def test_hidden_workloads_say_their_seed(plywise, tmp_path):
    words = ["--methods", "sgd", "--trials", "0", "--seeds", "1", "--steps", "3", "--workers", "1"]
    drawn = plywise("bench", "--workloads", "hidden", *words, "--out", str(tmp_path / "drawn"))
    seed = re.search(r"Hidden workloads of seed (\d+): --hidden-seed", drawn.out)[1]
    again = ["--hidden-seed", seed, "--out", str(tmp_path / "again")]
    assert plywise("bench", "--workloads", "hidden", *words, *again).code == 0
    found = [json.loads((tmp_path / folder / "bench.json").read_text()) for folder in ("drawn", "again")]
    names = [f"hidden-{kind}-{seed}" for kind in HIDDEN]
    assert [list(one["workloads"]) for one in found] == [names, names]
    assert found[0]["workloads"] == found[1]["workloads"], "the digests of the data are in it"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench"], "Say what to train"),
        (["bench", "mine:model"], "Say with --data where"),
        (["bench", "mine:model", "--data", "mine:data", "--workloads", "quick"], "Say what to train"),
        (["bench", "--workloads", "digits-mpl"], "Did you mean digits-mlp"),
        (["bench", "--workloads", "hiden"], "Did you mean hidden"),
        (
            [*OWN, "--hidden-seed", "3"],
            "belongs to --workloads hidden",
        ),
        (["bench", "--workloads", "quick", "--hidden-seed", "3"], "belongs to the workloads called hidden"),
        (["bench", "--workloads", "quick", "--data", "mine:data"], "belong to a model of your own"),
        ([*OWN, "--methods", "sgd,adamm"], "No method is called 'adamm'. Did you mean adamw"),
        ([*OWN, "--methods", "sgd,SGD"], "'sgd' is given twice"),
        ([*OWN, "--budget", "soon"], "A budget is a duration"),
        ([*OWN, "--budget", "1s", "--methods", "sgd"], "are not enough"),
        ([*OWN, "--workers", "-1"], "at least 1"),
        ([*OWN[:-1], "900"], "mine:model has 240 training samples, less than a batch of 900"),
        ([*OWN, "--out", "mine.py"], "mine.py is a file; --out names a folder"),
        ([*OWN, "--methods", "local-loss", "--blocks", "0"], "a network that can be cut into blocks"),
        ([*OWN, "--device", "cuda:99"], "Nothing can run on device 'cuda:99' here"),
        (["bench", "mine:broken_model", "--data", "mine:data"], "ValueError: no such layer"),
        (["bench", "mine:model", "--data", "mine:nothing"], "has no 'nothing'"),
        (["bench", "mine:model", "--data", "mine:model"], "must return"),
        (["bench", "--resume"], "holds no bench to resume"),
        (["bench", "--resume", "--trials", "3", "--batch-size", "9"], "leave out --trials, --batch-size"),
        (["bench", "--resume", "--patience", "9"], "leave out --timeout-s"),  # its name in 0.1
        ([*OWN, "--resume"], "leave out the model, --data, --steps, --batch-size"),
        (["report", "nowhere"], "it has no bench.json"),
    ],
)
def test_impossible_requests_give_a_one_sentence_error(words, message, plywise):
    done = plywise(*words)
    assert done.code == 1
    assert message in done.err


def test_a_method_without_its_package_is_no_miss(tmp_path, plywise, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    done = plywise(*OWN, *SMALL, "--methods", "sgd,shampoo")
    assert done.code == 1
    assert "Method shampoo needs the package pytorch_optimizer" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_a_bench_is_not_written_over(plywise):
    assert plywise(*OWN, *SMALL, "--methods", "mine:fixed").code == 0
    again = plywise(*OWN, *SMALL, "--methods", "sgd")
    assert again.code == 1
    assert "Add --resume to go on with it, or name another folder" in again.err


def test_a_bench_that_is_killed_leaves_no_process_behind(tmp_path, plywise):
    process = start(*OWN, "--methods", "mine:Slow,sgd", "--trials", "4", "--workers", "2")
    ledger = tmp_path / "runs" / "bench" / "trials.jsonl"
    wait_until(lambda: ledger.exists() and ledger.read_text(), process)
    process.kill()
    process.communicate(timeout=30)
    end = time.monotonic() + 60
    while left := processes_in(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    assert plywise("bench", "--resume").code == 0


def processes_in(folder):
    """Find the other processes whose working directory is this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.readlink() == folder and int(link.parent.name) != os.getpid():
                found.append(link.parent.name)
    return found


def wait_until(happened, process):
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
