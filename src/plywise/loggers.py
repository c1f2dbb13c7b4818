"""Callbacks that send the measurements of `plywise.Rule.record` to loggers.

    rule.record(every=50, callbacks=[pw.loggers.to_tensorboard("runs/mine")])

Names are ``plywise/LAYER/NUMBER``; steps are those of the optimizer. Packages are imported when a function is
called.
"""

import os
from collections.abc import Callable
from typing import Any

from plywise._util.extras import TENSORBOARD, import_extra
from plywise.engine.reports.history import StepTelemetry
from plywise.errors import PlywiseError

Callback = Callable[[StepTelemetry], None]


def to_tensorboard(writer: Any) -> Callback:
    """Write to TensorBoard.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or the folder of one to be made.

    Raises:
        PlywiseError: a folder is given, and TensorBoard is not installed.
    """
    if isinstance(writer, str | os.PathLike):
        writer = import_extra("torch.utils.tensorboard", TENSORBOARD).SummaryWriter(os.fspath(writer))

    def write(telemetry: StepTelemetry) -> None:
        for name, value in telemetry.scalars().items():
            writer.add_scalar(name, value, telemetry.step)
        writer.flush()

    return write


def to_wandb(run: Any = None) -> Callback:
    """Log to Weights & Biases.

    Args:
        run: what ``wandb.init()`` returned. Default: the run that is active.

    Raises:
        PlywiseError: wandb is not installed, or no run is active.
    """
    if run is None:
        run = _require("wandb").run
    if run is None:
        raise PlywiseError("No Weights & Biases run is active: call wandb.init() first.")
    # without a step of ours: wandb wants one that never falls, and the training's own log counts it
    return lambda telemetry: run.log({**telemetry.scalars(), "plywise/step": telemetry.step})


def to_mlflow() -> Callback:
    """Log to the active MLflow run.

    Raises:
        PlywiseError: mlflow is not installed.
    """
    mlflow = _require("mlflow")
    return lambda telemetry: mlflow.log_metrics(telemetry.scalars(), step=telemetry.step)


def to_trackio() -> Callback:
    """Log to the active Trackio run.

    Raises:
        PlywiseError: trackio is not installed.
    """
    trackio = _require("trackio")
    return lambda telemetry: trackio.log(telemetry.scalars(), step=telemetry.step)


def to_lightning(logger: Any) -> Callback:
    """Log to a logger of Lightning or Fabric.

    Args:
        logger: anything with ``log_metrics(metrics, step)``, such as ``trainer.logger`` of a
            `lightning.Trainer`, or a `lightning.fabric.Fabric`'s.
    """
    return lambda telemetry: logger.log_metrics(telemetry.scalars(), telemetry.step)


def to_hugging_face(trainer: Any) -> Callback:
    """Log to wherever a Hugging Face Trainer reports to, and to its ``state.log_history``.

    Args:
        trainer: the `transformers.Trainer`. It adds its own step and epoch.
    """
    return lambda telemetry: trainer.log(telemetry.scalars())


def _require(package: str) -> Any:
    return import_extra(package, f"plywise.loggers.to_{package} needs {package}: pip install {package}.")
