"""`plywise train` takes targets of every kind, streams of batches, and step functions."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from plywise.errors import PipelineError, PlywiseError
from plywise.training.config import TrainConfig
from plywise.training.open_pipeline import open_pipeline
from plywise.training.session import load_trained, open_session


@pytest.fixture(autouse=True)
def _user(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).with_name("own_training.py"), tmp_path / "own.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    yield
    sys.modules.pop("own", None)


def train(model, data, epochs=20, **more):
    """The session, and its lines after an epoch's last step."""
    names = {key: f"own:{value}" for key, value in more.items() if key in ("step", "metric")}
    rest = {key: value for key, value in more.items() if key not in names}
    plan = TrainConfig(
        model=f"own:{model}", data=f"own:{data}", epochs=epochs, batch_size=16, rate=0.02, **names, **rest
    )
    session = open_session(plan)
    lines = []
    session.run(lines.append)
    return session, [line for line in lines if line.accuracy is not None or line.error is not None]


@pytest.mark.parametrize("learner", ["LocalLoss", "Interlocking", "ActivationRelaxation"])
@pytest.mark.parametrize(
    ("model", "data", "kind", "outputs", "good"),
    [
        ("three", "classes", "classes", 3, 0.8),
        ("three", "labels", "labels", 3, 0.85),
        ("two", "numbers", "numbers", 2, 0.12),
        ("one", "number", "numbers", 1, 0.2),
        ("words", "tokens", "tokens", 9, 0.95),
    ],
)
def test_targets_of_every_kind(model, data, kind, outputs, good, learner):
    session, lines = train(model, data, learner=learner, blocks=2)
    assert (session.kind, session.outputs) == (kind, outputs)
    values = [line.error if kind == "numbers" else line.accuracy for line in lines]
    assert values[-1] < min(good, values[0]) if kind == "numbers" else values[-1] > max(good, values[0]), (
        values
    )


def test_what_is_guessed_of_the_targets_is_said():
    session, _ = train("three", "labels", epochs=1, blocks=2)
    assert session.note == "Targets of zeros and ones are labels, several of which a sample may have."
    assert not train("three", "classes", epochs=1, blocks=2, out=Path("other"))[0].note


@pytest.mark.parametrize("learner", ["AssociatedLearning", "CascadedForward", "LocalForwardGradient"])
def test_learners_of_classes_refuse_other_targets(learner):
    with pytest.raises(
        PlywiseError, match=f"{learner} learns classes, one a sample, and the targets are labels"
    ):
        train("three", "labels", learner=learner, blocks=2)


def test_a_stream_trains_as_batches_in_an_order_of_each_epoch():
    session, _ = train("three", "stream", epochs=3, blocks=2)
    assert (session.per_epoch, session.samples, session.step) == (12, 96, 36)


@pytest.mark.parametrize("rule", [None, "ProxProp", "Foof"])
def test_a_step_function_trains_the_model_as_a_whole(rule):
    session, lines = train("three", "judged_dicts", step="step", metric="metric", rule=rule)
    assert (len(session.engine.trainers), session.kind) == (1, "whole batches")
    assert lines[-1].error < min(0.3, lines[0].error)
    network = load_trained("runs/train")
    wanted = session.engine.learner.as_module().state_dict()
    assert list(network.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())


def test_an_interrupted_training_by_steps_goes_on_bit_for_bit():
    whole, _ = train("three", "dicts", epochs=4, step="step", rule="Foof", out=Path("whole"))
    train("three", "dicts", epochs=2, step="step", rule="Foof", out=Path("parts"))
    resumed, _ = train("three", "dicts", epochs=4, step="step", rule="Foof", out=Path("parts"))
    assert resumed.began == 24
    states = [session.engine.learner.as_module().state_dict() for session in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"metric": "metric"}, "metric belongs to step"),
        ({"step": "step", "blocks": 3}, "leave blocks, split and set out"),
        ({"step": "step", "set": {"a": 1}}, "leave blocks, split and set out"),
        ({"step": "absent"}, "has no 'absent'"),
    ],
)
def test_what_does_not_go_together_is_said(more, words):
    with pytest.raises(PlywiseError, match=words):
        train("three", "dicts", **more)


def test_a_step_function_is_for_one_process():
    plan = TrainConfig(model="own:three", data="own:dicts", step="own:step")
    with pytest.raises(PipelineError, match="in one process: `plywise train` takes it"), open_pipeline(plan):
        pass
