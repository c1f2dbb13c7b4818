"""Telemetry arrives in each logger, under its names and steps."""

import csv
from types import SimpleNamespace

import pytest
import torch

import plywise as pw
from plywise import loggers
from plywise.testing.contract.models import make_batch, make_mlp, train


def record(callback, steps=3, every=1):
    """A short training; the history that the callback was told of."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    history = rule.record(every=every, callbacks=[callback])
    train(model, optimizer, make_batch(), steps)
    return history


@pytest.mark.parametrize("by", ["folder", "writer"])
def test_tensorboard(tmp_path, by):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    history = record(loggers.to_tensorboard(tmp_path if by == "folder" else SummaryWriter(tmp_path)))
    events = EventAccumulator(str(tmp_path)).Reload()
    for step in history:
        for name, value in step.scalars().items():
            found = {event.step: event.value for event in events.Scalars(name)}
            assert found[step.step] == pytest.approx(value, rel=1e-6)


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    from lightning.fabric.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    history = record(loggers.to_lightning(logger), every=2)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3]
    for row, step in zip(rows, history, strict=True):
        assert {name: float(row[name]) for name in step.scalars()} == pytest.approx(step.scalars())


def test_hugging_face(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_mlp()

        def forward(self, x, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.net(x), labels)}

    x, y = make_batch()
    rows = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]
    model = Labelled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    rule = pw.ProxProp().attach(model, optimizer)
    rule.record(every=2, callbacks=[loggers.to_hugging_face(trainer)])
    trainer.train()
    logged = [line for line in trainer.state.log_history if "plywise/net.0/angle" in line]
    assert [line["plywise/net.0/angle"] for line in logged] == [
        step.layers["net.0"].angle for step in rule.history
    ]
    assert len(logged) == 2


def test_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(dir=tmp_path, project="plywise") as run:
        history = record(loggers.to_wandb())
        assert run.summary["plywise/step"] == history[-1].step
        assert run.summary["plywise/0/angle"] == pytest.approx(history[-1].layers["0"].angle)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it makes a database in seconds, files at once
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())  # it must not exist yet
    with mlflow.start_run() as run:
        history = record(loggers.to_mlflow())
    found = mlflow.tracking.MlflowClient().get_metric_history(run.info.run_id, "plywise/0/angle")
    assert {one.step: one.value for one in found} == {
        step.step: pytest.approx(step.layers["0"].angle) for step in history
    }


def test_trackio(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio.init(project="plywise-telemetry")
    history = record(loggers.to_trackio())
    trackio.finish()
    assert len(history) == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_named(monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(pw.PlywiseError, match=f"pip install {name}"):
        getattr(loggers, f"to_{name}")()


def test_wandb_without_a_run(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", SimpleNamespace(run=None))
    with pytest.raises(pw.PlywiseError, match=r"call wandb\.init\(\) first"):
        loggers.to_wandb()
