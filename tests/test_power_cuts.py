"""Power cuts: whatever they damage, `train`, `pipeline` and `bench` go on to the same result, or say so.

Each damage is drawn from its number: one or two files of a command's folder get a hole of zeros, lose their
end, have bits flipped, are gone, or hold everything twice. ``pytest tests/test_power_cuts.py --power-cuts
100`` tries the whole list.
"""

import json
import random
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, ResolvedBench, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import InlineExecutor
from plywise.arena.run.ledger import read
from plywise.errors import PlywiseError
from plywise.training.config import TrainConfig
from plywise.training.open_pipeline import open_pipeline
from plywise.training.session import load_trained, open_session
from sameness import same

MODULE = "test_power_cuts"
STOPPED, EPOCHS = 8, 3
CLOCKS = ("cpu", "wall", "measuring", "peak_mib", "finished", "seconds", "check")


def net():
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))


def data():
    x = torch.randn(23, 6)
    y = torch.arange(23) % 3
    return x, y, x[:9] + 0.1, y[:9]


def pytest_generate_tests(metafunc):
    if "cut" in metafunc.fixturenames:
        metafunc.parametrize("cut", range(metafunc.config.getoption("--power-cuts")))


def damage(folder: Path, cut: int) -> str:
    """Damage one or two files; what was done, for the message of a test that fails."""
    chance = random.Random(cut)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    done = []
    for path in chance.sample(files, chance.choice([1, 1, 1, 2])):
        content = bytearray(path.read_bytes())
        start, size = chance.randrange(len(content)), chance.choice([1, 8, 64, 512, 4096])
        kind = chance.choice(["hole", "end", "bits", "hole", "end", "bits", "gone", "twice"])
        if kind == "hole":
            content[start : start + size] = bytes(len(content[start : start + size]))
        elif kind == "end":
            del content[start:]
        elif kind == "twice":
            content *= 2
        else:
            for _ in range(chance.choice([1, 1, 3])):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.unlink() if kind == "gone" else path.write_bytes(content)
        done.append(f"{kind} at {start} of {path.relative_to(folder)}")
    return "; ".join(done)


def config(out: Path) -> TrainConfig:
    given = {"model": f"{MODULE}:net", "data": f"{MODULE}:data", "split": (0, 2), "batch_size": 5}
    return TrainConfig(**given, rule="KFAC", optimizer="SGD", rate=0.05, epochs=EPOCHS, every=3, out=out)


def run(out: Path, command: str, stop: int | None = None):
    """Train, to the end or until a step; the state of the learner, and what was said."""

    def train(session):
        session.run(lambda line: session.engine.ask_to_stop() if line.step == stop else None)
        return session.engine.learner.state_dict(), session.note

    if command == "train":
        return train(open_session(config(out)))
    with open_pipeline(config(out)) as session:
        return train(session)


def attempt(work):
    """What some work gave, or the words in which it was refused."""
    try:
        return work(), ""
    except PlywiseError as error:
        return None, str(error)


def log(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for path in out.glob("log*.jsonl") for line in path.read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]
    return sorted(kept, key=lambda line: line["step"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By command: the folder of a run that was stopped, one of a whole run, and that one's learner."""
    made = {}

    def of(command):
        if command not in made:
            folder = tmp_path_factory.mktemp(command)
            run(folder / "stopped", command, STOPPED)
            state, _ = run(folder / "whole", command)
            made[command] = folder / "stopped", folder / "whole", state
        return made[command]

    return of


@pytest.fixture(autouse=True)
def _findable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))


@pytest.mark.parametrize("command", ["train", "pipeline"])
def test_a_training_goes_on_to_the_same_weights_or_says_why_not(undisturbed, tmp_path, command, cut):
    stopped, whole, state = undisturbed(command)
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    done = damage(out, cut)
    outcome, refused = attempt(lambda: run(out, command))
    if refused:
        assert str(out) in refused, f"{done}: {refused}"
        return
    found, note = outcome
    assert same(found, state), done
    assert log(out) == log(whole) or "damaged" in note or "lacks" in note, f"{done}: {note}"


def test_a_network_is_that_of_a_whole_checkpoint_or_refused(undisturbed, tmp_path, cut):
    stopped, *_ = undisturbed("train")
    x = torch.randn(4, 6)
    expected = load_trained(stopped)(x)
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    done = damage(out / "checkpoints", cut)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, refused = attempt(lambda: load_trained(out)(x))
    if refused:
        assert "damaged" in refused, f"{done}: {refused}"
        return
    assert torch.equal(found, expected) != any("is damaged" in str(one.message) for one in said), done


def test_a_training_sweeps_what_a_killed_one_was_writing(undisturbed, tmp_path):
    stopped, _, _ = undisturbed("train")
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    (out / ".plan.json.abcd1234.tmp").write_text("{")
    (out / ".log.jsonl.abcd1234.tmp").write_text("{")
    run(out, "train")
    assert not list(out.glob("*.tmp"))


def test_a_plan_that_cannot_be_read_is_named(undisturbed, tmp_path):
    stopped, _, _ = undisturbed("train")
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    (out / "plan.json").unlink()
    (out / "plan.json").mkdir()
    for work in (lambda: run(out, "train"), lambda: load_trained(out)):
        assert f"{out / 'plan.json'} is not a plan of plywise" in attempt(work)[1]


def test_a_network_that_is_looked_for_in_vain_leaves_no_folder(tmp_path):
    assert "holds no run" in attempt(lambda: load_trained(tmp_path / "misspelt"))[1]
    assert not (tmp_path / "misspelt").exists()


def compare(folder: Path, resolved: ResolvedBench, limit: int | None = None) -> list[dict[str, object]]:
    """Run a bench; its trials, without the clocks."""
    made = Bench(resolved, folder)
    for number, _ in enumerate(made.run(InlineExecutor(1)), 1):
        if number == limit:
            break
    kept = [{n: v for n, v in line.items() if n not in CLOCKS} for line in read(folder / "trials.jsonl")]
    return sorted(kept, key=lambda line: json.dumps(line, sort_keys=True))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What is compared, the folder of a bench that was stopped, and the trials of a whole one."""
    folder = tmp_path_factory.mktemp("bench")
    spec = WorkloadSpec("own", f"{MODULE}:net", f"{MODULE}:data", steps=6, batch_size=5)
    with resolve_bench(BenchConfig((spec,), ("sgd", "adamw"), trials=3, seeds=2)) as resolved:
        compare(folder / "stopped", resolved, 9)
        yield resolved, folder / "stopped", compare(folder / "whole", resolved)


def test_a_bench_goes_on_to_the_same_trials_or_says_why_not(bench, tmp_path, cut):
    resolved, stopped, whole = bench
    out = Path(shutil.copytree(stopped, tmp_path / "bench"))
    done = damage(out, cut)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is damaged in line", RuntimeWarning)
        found, refused = attempt(lambda: compare(out, resolved))
    if refused:
        assert str(out) in refused, f"{done}: {refused}"
        return
    assert found == whole, done
