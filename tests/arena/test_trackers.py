"""A bench in TensorBoard and Trackio, read back like their viewers do."""

import json
import os
import subprocess
import sys

import pytest
from fake_bench import line

from plywise.arena.reports.trackers import list_runs, to_tensorboard, to_trackio
from plywise.errors import PlywiseError

FINISHED = "2026-01-02T03:04:05+00:00"
TUNING = line(method="mine:Own", trial=3, numbers={"lr": 0.03}, finished=FINISHED)
LAST = line(purpose="final", track="defaults", trial=-1, seed=2, test=0.125, finished=FINISHED)
FAILED = line(
    trial=1, steps=[0, 20], loss=[2.0, None], validation=[0.9], cpu=[0.0, 1.0], wall=[0.0, 1.0],
    failure="diverged at step 20", finished=FINISHED,
)  # fmt: skip
LOST = line(
    trial=2, steps=[], loss=[], validation=[], cpu=[], wall=[], failure="its process was lost",
    finished=FINISHED,
)  # fmt: skip
NAMES = ["digits/mine.Own/tuning/trial 3", "digits/sgd/final/defaults/seed 2"]
NAMES += ["digits/sgd/tuning/trial 1", "digits/sgd/tuning/trial 2"]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "bench"
    made.mkdir()
    about = {"workloads": {"digits": {"metric": "error rate"}}, "methods": {}, "tracks": [], "trials": 1}
    (made / "bench.json").write_text(json.dumps({**about, "seeds": [0]}))
    _write(made, TUNING, LAST, FAILED, LOST)
    return made


def _write(folder, *lines, end="\n"):
    (folder / "trials.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)


def test_every_trial_is_a_run_with_what_was_measured(folder):
    runs = {run.name: run for run in list_runs(folder)}
    assert sorted(runs) == NAMES
    tuned = runs[NAMES[0]]
    assert tuned.settings["lr"] == 0.03
    assert tuned.settings["method"] == "mine:Own"
    assert [point.step for point in tuned.points] == [0, 20, 40]
    assert tuned.points[1].values == {
        "training loss": 1.0,
        "validation error rate": 0.4,
        "cpu seconds": 1.0,
    }
    assert tuned.points[2].when - tuned.points[0].when == pytest.approx(2.2)
    assert tuned.results == {"best validation error rate": 0.1}
    assert runs[NAMES[1]].results == {"best validation error rate": 0.1, "test error rate": 0.125}
    assert runs[NAMES[2]].settings["failure"] == "diverged at step 20"
    assert runs[NAMES[2]].points[1].values == {"cpu seconds": 1.0}, "what was not measured is not there"
    assert runs[NAMES[3]].points == []
    assert runs[NAMES[3]].results == {}


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags}, events


def test_tensorboard_reads_curves_settings_and_results(folder, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.plugins.hparams import metadata

    assert to_tensorboard(folder, tmp_path / "boards") == (4, 0)
    found, events = read_scalars(tmp_path / "boards" / NAMES[1])
    expected = list(zip([0, 20, 40], [0.9, 0.4, 0.1], strict=True))
    assert [(step, pytest.approx(value)) for step, value in expected] == found["validation error rate"]
    assert found["test error rate"] == [(0, 0.125)]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(content).hparams
    assert settings["lr"].number_value == 0.1
    assert settings["method"].string_value == "sgd"
    assert read_scalars(tmp_path / "boards" / NAMES[3])[0] == {}
    assert not (tmp_path / "boards" / ".partial").exists()


def test_a_bench_with_new_trials_is_exported_again_without_duplicates(folder, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    _write(folder, TUNING, LAST, end='\n{"workload": "digi')  # a line that is just being written
    assert to_tensorboard(folder, tmp_path / "boards") == (2, 0)
    (tmp_path / "boards" / ".partial").mkdir()  # of an export that was killed
    (tmp_path / "boards" / ".partial" / "events.out.tfevents.0").write_text("half")
    _write(folder, TUNING, LAST, FAILED, LOST)
    assert to_tensorboard(folder, tmp_path / "boards") == (2, 2)
    for name in NAMES[:3]:
        steps = [step for step, _ in read_scalars(tmp_path / "boards" / name)[0]["cpu seconds"]]
        assert steps == sorted(set(steps))


TRACKIO = """
import json, sys
from pathlib import Path
import trackio
from trackio.sqlite_storage import SQLiteStorage
from plywise.arena.reports.trackers import to_trackio

said = [list(to_trackio(Path(sys.argv[1]), "a bench")) for _ in range(2)]
runs = {run.name: run.config for run in trackio.Api().runs("a bench")}
logs = {name: SQLiteStorage.get_logs("a bench", name) for name in runs}
print(json.dumps({"said": said, "configs": runs, "logs": logs}, default=str))
"""


def test_trackio_reads_curves_settings_and_results(folder, tmp_path):
    pytest.importorskip("trackio", reason="Trackio is not installed")
    # a process of its own: Trackio keeps the folder that it found when it was imported
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["said"] == [[4, 0], [0, 4]], "and nothing twice"
    assert sorted(found["configs"]) == NAMES
    assert found["configs"][NAMES[0]]["lr"] == 0.03
    assert found["configs"][NAMES[2]]["failure"] == "diverged at step 20"
    measured = [(one["step"], one["validation error rate"]) for one in found["logs"][NAMES[1]]]
    assert measured == [(0, 0.9), (20, 0.4), (40, 0.1)]
    assert found["logs"][NAMES[1]][-1]["test error rate"] == 0.125


@pytest.mark.parametrize(
    ("absent", "export", "why"),
    [
        ("tensorboard", to_tensorboard, r"needs TensorBoard: pip install 'plywise\[tensorboard\]'"),
        ("trackio", to_trackio, r"needs Trackio: pip install 'plywise\[tracking\]'"),
    ],
)
def test_trackers_are_an_extra(folder, tmp_path, monkeypatch, absent, export, why):
    monkeypatch.setitem(sys.modules, absent, None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(PlywiseError, match=why):
        export(folder, tmp_path / "boards")
    assert not (tmp_path / "boards").exists()


def test_no_bench(tmp_path):
    with pytest.raises(PlywiseError, match=r"is not a bench: .*bench\.json"):
        list_runs(tmp_path)
