"""Models and batches of every kind train alike, however they are called."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from plywise.arena.diagnostics.diagnosis import diagnose_workload
from plywise.arena.methods import find_method
from plywise.arena.run.config import ResolvedWorkload, WorkloadSpec
from plywise.arena.run.job import TrialJob
from plywise.arena.scoring.records import Key
from plywise.arena.space import get_defaults
from plywise.arena.workloads.own import own_workload
from plywise.errors import PlywiseError


@pytest.fixture(autouse=True)
def _user(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).with_name("own_calls.py"), tmp_path / "calls.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "calls", raising=False)
    yield
    sys.modules.pop("calls", None)


def train(model, data, method="proxprop", steps=20, **more):
    """Run one trial in its own process like a bench, and return its line of the ledger."""
    functions = {name: f"calls:{value}" for name, value in more.items() if isinstance(value, str)}
    numbers = {name: value for name, value in more.items() if not isinstance(value, str)}
    spec = WorkloadSpec(
        "mine", f"calls:{model}", f"calls:{data}", **functions, **numbers, steps=steps, batch_size=32
    )
    workload = spec.make()
    with tempfile.TemporaryDirectory() as folder:
        settled = spec.settle(workload)
        file = ResolvedWorkload.write(settled, workload, Path(folder) / "data.pt").file
        key = Key("mine", method, "final", "defaults", 0, 0)
        line = TrialJob(key, settled, get_defaults(find_method(method).space), str(file)).run()
    assert line["failure"] is None, line["failure"]
    return line


def make_workload(model, data, **more):
    functions = {name: f"calls:{value}" for name, value in more.items()}
    return own_workload("mine", f"calls:{model}", f"calls:{data}", **functions)


@pytest.mark.parametrize("method", ["adamw", "proxprop", "foof+adamw", "recommended", "schedule-free"])
def test_a_model_trains_alike_however_it_is_called(method):
    """Scores, the model's own loss, and a step function give the same numbers for the same samples."""
    if method == "schedule-free":
        pytest.importorskip("schedulefree", reason="it comes with the extra for benches")
    line = train("tensor", "dicts", method)
    assert line["loss"][-1] < line["loss"][0]
    for model, data, how in (
        ("mapping", "dicts", {}),
        ("pair", "dicts", {}),
        ("named", "dicts", {}),
        ("own", "dicts", {}),
        ("loss_first", "dicts", {}),
    ):
        other = train(model, data, method, **how)
        for part in ("loss", "validation", "test"):
            assert other[part] == line[part], (model, part)
    # without the mask's name nothing is left out of the rule's statistics
    by_place = train("tensor", "pairs", method)
    by_step = train("tensor", "pairs", method, step="step_of_pairs", metric="metric_of_pairs")
    assert by_step["loss"] == by_place["loss"]
    assert by_step["validation"] == by_place["validation"]
    # AdamW has no statistics, and `recommend` turns no layer of so small a network
    assert (by_place["loss"] == line["loss"]) == (method in ("adamw", "schedule-free", "recommended"))


def test_padding_does_not_change_training_by_a_rule():
    plain, padded = (train("own", data)["loss"] for data in ("dicts", "padded"))
    assert padded == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "data", "more", "says"),
    [
        ("tensor", "single", {}, ""),
        ("mapping", "single", {}, "the loss is made of the scores in the model's output"),
        ("own", "dicts", {}, "the loss is the one that the model returns (--loss names another)"),
        ("own", "dicts", {"loss": "squares"}, "the loss is made of the scores"),
        ("tensor", "loader", {"step": "step"}, "the loss is what the step function returns"),
    ],
)
def test_guesses_are_reported(model, data, more, says):
    workload = make_workload(model, data, **more)
    assert says in workload.about
    assert bool(workload.calls) == bool(says)
    assert workload.about.endswith(f"{says}." if not more.get("loss") else "output.")


def test_the_metric_follows_from_the_arguments():
    assert make_workload("own", "dicts").task.metric_name == "error rate"
    assert make_workload("bare", "dicts").task.metric_name == "loss"
    assert make_workload("tensor", "loader", step="step").task.metric_name == "loss"
    assert make_workload("tensor", "loader", step="step", metric="metric").task.metric_name == "calls:metric"
    line = train("own", "dicts", metric="squares")
    assert line["validation"][0] == pytest.approx(
        train("own", "dicts", metric="squares", steps=1)["validation"][0]
    )


def test_a_stream_of_batches_trains():
    line = train("tensor", "named_batches", step="named_step", steps=40)
    assert line["loss"][-1] < 0.8 * line["loss"][0]
    line = train("tensor", "loader", steps=40)
    assert line["loss"][-1] < 0.8 * line["loss"][0]


@pytest.mark.parametrize(
    ("data", "more"),
    [("dicts", {}), ("loader", {}), ("loader", {"step": "step"}), ("named_batches", {"step": "named_step"})],
)
def test_a_diagnosis_names_the_users_layers(data, more):
    workload = make_workload("tensor", data, **more)
    found = diagnose_workload(workload, workload.make_data(), batches=3)
    assert [layer.name for layer in found.layers] == ["first", "last"]
    assert found.model == "Pooled"
    assert all(layer.rate > 0 for layer in found.layers)
    assert found.loss == pytest.approx(0.7, abs=0.1)


def test_rules_do_not_count_padding_in_a_diagnosis():
    plain, padded = (make_workload("own", data) for data in ("dicts", "padded"))
    first, second = (diagnose_workload(one, one.make_data(), batches=2) for one in (plain, padded))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.read.condition == pytest.approx(other.read.condition, rel=1e-3)
        assert one.rate == pytest.approx(other.rate, rel=1e-3)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("no_number", r"no_number returned a [tT]ensor of shape \(2,\); it must return one number"),
        ("no_graph", "depends on no parameter that trains"),
        ("no_end", "loss and metric of a batch are .* before any training"),
        ("broken", r"calls:broken fails on a batch of float32 \(2, 5, 4\), .* TypeError"),
        ("absent", "has no 'absent'"),
    ],
)
def test_step_functions_that_do_not_fit(step, words):
    with pytest.raises(PlywiseError, match=words):
        make_workload("tensor", "triples", step=step)


def test_a_step_function_and_a_loss_together_are_refused():
    with pytest.raises(PlywiseError, match="leave --loss out"):
        make_workload("tensor", "loader", step="step", loss="squares")


def test_a_model_without_a_matching_argument_is_refused():
    with pytest.raises(PlywiseError, match="Pooled takes none of the entries ids, words, labels by name"):
        make_workload("tensor", "other_names")


def test_local_learners_refuse_models_with_several_inputs():
    workload = make_workload("tensor", "dicts")
    assert (workload.blocks, workload.calls) == (0, "scores")
    assert "can be cut into blocks" in find_method("local-loss").refuses(workload)
    assert torch.is_tensor(workload.make_data().train.y)
