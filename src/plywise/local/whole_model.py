"""Trains a model as a whole with a step function, as `plywise train --step` does."""

from typing import Any

import torch
from torch import Tensor, nn

from plywise._util.modes import evaluating
from plywise.data.models import StepModel, unwrap_model
from plywise.local.component import Component, Signal
from plywise.local.learner import OneWayLearner


class WholeComponent(Component):
    """The whole model, with the loss of the step function."""

    def __init__(self, model: StepModel) -> None:
        super().__init__()
        self.model = model.model
        self._call = [model]  # no part of the state: its parameters are the model's

    def forward(self, signal: Signal) -> tuple[Signal, Tensor]:
        """Return the batch as it is, and the loss of it."""
        return signal, self._call[0](signal.s).reshape(-1)[0]


class WholeModel(OneWayLearner):
    """Backpropagation through a whole model, as a learner of one component.

    Args:
        model: the model and its step function.
        **training: what every `Learner` takes, by name.
    """

    def __init__(self, model: StepModel, **training: Any) -> None:
        self._model = model
        super().__init__([WholeComponent(model)], **training)

    def as_module(self) -> nn.Module:
        """Return the user's own model."""
        return unwrap_model(self._model)

    def measure(self, batch: Any) -> float:
        """Return the metric of a batch in eval mode; the loss where there is no metric."""
        with torch.no_grad(), evaluating(self._model):
            return float(self._model(batch)[-1])
