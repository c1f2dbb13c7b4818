"""`plywise bench --search`, `--ray` and `plywise report --tensorboard` as commands."""

import json
from pathlib import Path

import pytest

from plywise.arena.run.ledger import read

COMPETITORS = (Path(__file__).parent.parent / "arena" / "competitors.py").read_text()
OWN = ["bench", "mine:model", "--data", "mine:data", "--steps", "12", "--batch-size", "32"]
SMALL = ["--methods", "sgd", "--trials", "5", "--seeds", "1", "--workers", "2"]


@pytest.fixture(autouse=True)
def _user(user_module):
    user_module("mine", COMPETITORS)


def test_a_bench_by_optuna_in_tensorboard(plywise):
    pytest.importorskip("optuna", reason="optuna is not installed")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    assert plywise(*OWN, *SMALL, "--search", "optuna").code == 0
    folder = Path("runs/bench")
    assert json.loads((folder / "bench.json").read_text())["plan"]["search"] == "optuna"
    assert len(list(read(folder / "trials.jsonl"))) == 7
    for output in ("7 trials are new in boards for TensorBoard, 0 were there", "0 trials are new"):
        done = plywise("report", "runs/bench", "--tensorboard", "boards")
        assert done.code == 0
        assert output in done.out
    assert len(list(Path("boards").glob("mine.model/sgd/**/events.out.*"))) >= 7
    assert plywise("bench", "--resume").code == 0, "the search is the folder's"
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    without = plywise("report", "runs/bench", "--tensorboard", "other")
    assert without.code == 1
    assert "The page could not be written" in without.err
    assert len(list(Path("other").glob("mine.model/sgd/**/events.out.*"))) >= 7, "exports need no page"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*OWN, "--search", "grid"], "No search is called 'grid'. There are: sobol, optuna"),
        ([*OWN, "--ray", "auto", "--workers", "2"], "--workers belongs to this machine"),
        ([*OWN, "--ray", "auto", "--threads", "0"], "Threads are at least 1"),
        ([*OWN, "--threads", "0"], "at least 1"),
    ],
)
def test_impossible_requests_give_a_one_sentence_error(words, message, plywise):
    done = plywise(*words)
    assert done.code == 1
    assert message in done.err
    assert not Path("runs").exists()
