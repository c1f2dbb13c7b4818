"""`plywise reproduce` in real processes on shortened experiments of a paper."""

import json
import os
import signal
import sys
import time

import pytest
from cyclopts import App

from plywise.arena.run.ledger import read
from plywise.cli.reproduce import reproduce
from plywise.data.store import find_file
from plywise.errors import PlywiseError
from processes import ForkedCommand

SHORT = """
from dataclasses import replace
from plywise.arena.reproductions.consequentialism import PAPER

SHORT = replace(
    PAPER,
    experiments=tuple(
        replace(
            e,
            sizes={n: replace(s, images=128, epochs=EPOCHS) for n, s in e.sizes.items()},
            arms=e.arms[:2],
            claims=(),
        )
        for e in PAPER.experiments
    ),
)
"""


@pytest.fixture
def mnist():
    if find_file("mnist.npz", "mnist/train-images-idx3-ubyte.gz") is None:
        pytest.skip("no mnist.npz; PLYWISE_DATA can name its folder")


def command(*words):
    app = App()
    app.default(reproduce)
    return app(list(words), exit_on_error=False, result_action="return_value")


def test_from_estimate_to_table(mnist, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.py").write_text(SHORT.replace("EPOCHS", "1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    words = ("short:SHORT", "--only", "mnist-mlp", "--seeds", "2", "--out", "runs")
    command(*words, "--dry-run")
    output = capsys.readouterr().out
    assert "12 of 12 runs are left: about " in output
    assert "SGD" not in output
    assert not list(tmp_path.rglob("reproduce.*"))

    command(*words)
    output = capsys.readouterr().out
    del sys.modules["short"]
    assert "[12/12] mnist-mlp: " in output
    assert "] mnist-mlp: CWU on SGD, seed 1: " in output  # on a busy machine not the last one to end
    assert "left" in output
    assert "training loss at the end, nats (small size)" in output
    assert "no number of the paper's is known" in output
    folder = tmp_path / "runs" / "consequentialism"
    about = json.loads((folder / "reproduce.json").read_text())
    assert [experiment["name"] for experiment in about["experiments"]] == ["mnist-mlp"]
    assert (folder / "reproduce.md").read_text().startswith("## Paeedeh, Ghiasi-Shirazi")

    (folder / "reproduce.json").unlink()
    (folder / "reproduce.json").mkdir()  # it cannot be written: the table is there all the same
    with pytest.raises(OSError, match=r"reproduce\.json"):
        command(*words)
    assert "training loss at the end, nats (small size)" in capsys.readouterr().out


@pytest.mark.timeout(600)  # two runs of an experiment, on a machine that may be busy
def test_an_interrupted_run_says_what_is_kept_and_resumes(mnist, tmp_path, user_module):
    user_module("short", SHORT.replace("EPOCHS", "12"))
    words = ("short:SHORT", "--out", "runs", "--only", "mnist-mlp", "--seeds", "1")
    process = ForkedCommand(["plywise", "reproduce", *words], session=True)
    runs = tmp_path / "runs" / "consequentialism" / "runs.jsonl"
    end = time.monotonic() + 300
    while not (runs.exists() and len(runs.read_text().splitlines()) >= 2):
        assert time.monotonic() < end, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    _, output = process.communicate(timeout=60)
    kept = list(read(runs))
    assert process.returncode == 130
    assert output.index("Stopping: ") < output.index("Interrupted.")
    assert "Traceback" not in output
    assert f"Interrupted. {len(kept)} of 10 runs are kept in" in output
    assert "the same command goes on" in output
    assert json.loads((runs.parent / "reproduce.json").read_text())["unfinished"] == 10 - len(kept)
    command(*words)
    assert len(list(read(runs))) == 10
    assert list(read(runs))[: len(kept)] == kept


def test_without_a_paper_it_lists_all(capsys):
    command()
    output = capsys.readouterr().out
    for words in ("proxprop: Frerix", "associated-learning: Kao", "table-1", "cg3, τ = 1", "0.002 nats"):
        assert words in output
    assert "diverged nats" not in output
    assert "86.3 %" in output


def test_wrong_words_are_named(tmp_path):
    with pytest.raises(PlywiseError, match="Did you mean back-matching"):
        command("back-maching")
    with pytest.raises(PlywiseError, match="say which paper"):
        command("--only", "table-1")
    with pytest.raises(PlywiseError, match="a size of its own: leave out --size"):
        command("proxprop", "--data", "digits", "--size", "full")
    with pytest.raises(PlywiseError, match="back-matching has the size of the bundled digits; proxprop"):
        command("back-matching", "--data", "digits", "--out", str(tmp_path))
    with pytest.raises(PlywiseError, match="no experiment called 'table-2'"):
        command("proxprop", "--only", "table-2", "--out", str(tmp_path))


def test_missing_data_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWISE_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PlywiseError, match=r"'mnist' is missing: mnist\.npz"):
        command("consequentialism", "--out", str(tmp_path), "--dry-run")
    with pytest.raises(PlywiseError, match=r"'cifar10' is missing: cifar-10-binary\.tar\.gz"):
        command("back-matching", "--out", str(tmp_path))
