"""Files, folders and links in each other's place: a command goes on, or names the path and what to do."""

import errno
import os
import shutil
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from plywise._util.file_errors import describe_failure
from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.executor import InlineExecutor
from plywise.cli import main
from plywise.errors import FileError
from plywise.training.metrics_log import MetricsLog, StepMetrics

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

def data():
    x = torch.randn(23, 6)
    y = torch.arange(23) % 3
    return x, y, x[:9] + 0.1, y[:9]
"""
PLAN = ["train", "--model", "mine:net", "--data", "mine:data", "--batch-size", "5", "--every=2", "--epochs"]
SPEC = WorkloadSpec("mine:net", "mine:net", "mine:data", steps=2, batch_size=5)
LONG = "n" * 300
OUTS = ("file", "file/below", "loop", "loop/below", "nothing/below", LONG)


def put_folder(path):
    path.mkdir()


def put_file(path):
    path.write_text("mine")


def put_link_to_nothing(path):
    path.symlink_to("no/such")


def put_loop(path):
    path.symlink_to(path.name)


def put_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def put_device(path):
    path.symlink_to("/dev/zero")


@contextmanager
def ending_soon(path):
    """Raise an error if the block does not end: it waits for somebody to write into a pipe."""

    def fail(*_):
        raise AssertionError(f"waits at {path}")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a training, a bench and its report, and the words that go on with each."""
    project = tmp_path_factory.mktemp("project")
    (project / "mine.py").write_text(MODULE)
    before = Path.cwd()
    sys.path.insert(0, str(project))
    os.chdir(project)
    with suppress(SystemExit):
        main([*PLAN, "1", "--out", "train"])
    with resolve_bench(BenchConfig((SPEC,), ("sgd",), trials=1, seeds=1)) as resolved:
        for _ in Bench(resolved, Path("bench")).run(InlineExecutor(1)):
            pass
    with suppress(SystemExit):
        main(["report", "bench"])
    yield (
        project,
        {
            "train": [*PLAN, "2", "--out"],
            "fresh": [*PLAN, "1", "--fresh", "--out"],
            "bench": ["bench", "--resume", "--workers", "1", "--out"],
            "report": ["report"],
        },
    )
    os.chdir(before)
    sys.path.remove(str(project))
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("put", [put_folder, put_file, put_link_to_nothing, put_loop, put_pipe])
@pytest.mark.parametrize("command", ["train", "fresh", "bench", "report"])
def test_a_command_goes_on_or_names_what_is_in_place_of_its_file(plywise, runs, tmp_path, command, put):
    project, words = runs
    base = project / ("train" if command == "fresh" else command.replace("report", "bench"))
    entries = [path.relative_to(base) for path in base.rglob("*") if path.is_file() == (put is not put_file)]
    oldest = min((name for name in entries if "step" in str(name)), default="")
    of_later_steps = [name for name in entries if "step" in str(name) and name != oldest]
    assert len(entries) > 1 or put is put_file
    for number, name in enumerate(name for name in entries if name not in of_later_steps):
        out = Path(shutil.copytree(base, tmp_path / str(number), symlinks=True))
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        put(out / name)
        with ending_soon(name):
            code, _, err = plywise(*words[command], str(out))
        assert code in (0, 1), name
        assert "Errno" not in err, name
        if code:
            last = name.parts[-1] if "bench.json" not in name.parts else "bench"
            assert f"{last}" in err, f"{name}: {err}"
        if command == "fresh":
            assert code == 0 or name == Path(".lock"), f"{name}: {err}"


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "npz", "parquet", "toml"])
def test_a_path_of_data_or_of_a_plan_says_what_is_wrong_with_it(plywise, tmp_path, monkeypatch, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow reads Parquet files")
    monkeypatch.chdir(tmp_path)
    put_file(Path("file"))
    put_folder(Path(f"folder.{ending}"))
    put_loop(Path(f"loop.{ending}"))
    put_link_to_nothing(Path(f"link.{ending}"))
    words = ["train"] if ending == "toml" else ["train", "--data"]
    expected = {
        f"folder.{ending}": f"folder.{ending} is a folder, and plywise needs a file there",
        f"loop.{ending}": f"loop.{ending} is a link that cannot be followed",
        f"link.{ending}": f"link.{ending} is a link to no/such, which does not exist",
        f"file/x.{ending}": "file is a file, and plywise needs a folder there",
        f"none.{ending}": f"There is no file none.{ending}",
        f"{LONG}.{ending}": "has a name that is too long for its disk",
    }
    for path, output in expected.items():
        code, _, err = plywise(*words, path)
        assert (code, output in err, "Errno" in err) == (1, True, False), err


@pytest.mark.parametrize("put", [put_pipe, put_socket, put_device])
@pytest.mark.parametrize("ending", ["csv", "npz", "parquet", "toml"])
def test_a_pipe_a_socket_or_a_device_is_refused_as_data_or_plan(plywise, tmp_path, monkeypatch, ending, put):
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow reads Parquet files")
    monkeypatch.chdir(tmp_path)
    put(Path(f"it.{ending}"))
    with ending_soon(ending):
        code, _, err = plywise(*(["train"] if ending == "toml" else ["train", "--data"]), f"it.{ending}")
    assert code == 1
    assert f"it.{ending} is a pipe, a socket or a device, and plywise needs a file there" in err


def test_a_pipe_among_images_is_refused(tmp_path):
    pytest.importorskip("PIL.Image", reason="Pillow reads images")
    from plywise.data.own_data import read_parts
    from plywise.errors import DataError

    (tmp_path / "cat").mkdir()
    put_pipe(tmp_path / "cat" / "a.png")
    with ending_soon("a.png"), pytest.raises(DataError, match=r"a\.png is a pipe, a socket or a device"):
        read_parts(str(tmp_path))


@pytest.mark.parametrize("out", OUTS, ids=lambda out: out[:12])
def test_a_folder_for_results_says_what_is_wrong_with_it(plywise, runs, tmp_path, monkeypatch, out):
    project, _ = runs
    monkeypatch.chdir(tmp_path)
    put_file(Path("file"))
    put_loop(Path("loop"))
    put_link_to_nothing(Path("nothing"))
    board = ["report", str(project / "bench"), "--tensorboard", out]
    for words in (["demo", "--out", out], [*PLAN, "1", "--out", out], ["report", out], board):
        code, _, err = plywise(*words)
        assert code == 1, words
        assert out.partition("/")[0] in err
        assert "Errno" not in err, words


def test_a_step_that_cannot_be_logged_names_the_log():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no disk that is always full")
    log = MetricsLog(Path("/dev/full"), 0)
    with pytest.raises(FileError, match="/dev/full does not fit on its disk, which is full: make room"):
        log.write(StepMetrics(1, 1, {0: 1.0}, 0.1))
    with suppress(OSError):
        log.close()


def test_a_folder_among_images_is_looked_into(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads images")
    from plywise.data.own_data import read_parts

    for name in ("cat", "dog"):
        (tmp_path / name / "small.png").mkdir(parents=True)
        image.new("L", (2, 3)).save(tmp_path / name / "small.png" / "a.png")
    assert len(read_parts(str(tmp_path))["train"]) == 2


def test_what_a_closed_folder_keeps_from_being_made_names_the_folder(tmp_path):
    (tmp_path / "closed").mkdir()
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "closed" / "a" / "b"))
    assert f"since {tmp_path / 'closed'} is closed to you" in describe_failure(error)
    error.filename = str(tmp_path / "closed")
    assert describe_failure(error).startswith(f"{tmp_path / 'closed'} may not be read or written by you")
