"""Layers, initialisations and decision stages of the related papers as methods, on SGD with momentum."""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise.arena.method import EndToEnd, Method, Trainer, TrialContext, make_cosine
from plywise.arena.methods.peers import GRADIENT_SIZED, list_trained, nesterov
from plywise.arena.space import Range, get_defaults
from plywise.arena.workload import Workload
from plywise.errors import BenchError, PlywiseError
from plywise.init import fuse_slice
from plywise.losses import slope_recovery
from plywise.nn import AdaptiveActivation, DecisionStage, Threshold, adapt_activations
from plywise.nn.adaptive_activation import ACTIVATIONS

SLOPE_FACTOR = 2.0
"""n of adaptive activations, as in the paper's benchmarks of classification."""
REMEMBERED = 1000
"""Samples of the last batches that layers are fused by, or a decision stage learns from."""


def unless(change: Callable[[nn.Module], Any]) -> Callable[[Workload], str]:
    """Refuses workloads whose model cannot be changed so, with the first sentence of its error."""

    def refuses(workload: Workload) -> str:
        with torch.random.fork_rng(devices=()):
            model = workload.make_model()
        try:
            change(model)
        except PlywiseError as error:
            return str(error).split(". ")[0].rstrip(".")
        return ""

    return refuses


# ---- activations -----------------------------------------------------------------------------------


def _add_slopes(model: nn.Module) -> list[AdaptiveActivation]:
    return adapt_activations(model, "layer", SLOPE_FACTOR)


def _train_adaptive(setting: TrialContext) -> EndToEnd:
    slopes = [module.slope for module in _add_slopes(setting.model)]
    known = {id(slope) for slope in slopes}
    weights = [parameter for parameter in list_trained(setting.model) if id(parameter) not in known]
    # decay would pull a slope to 0, where the layer hands nothing on
    groups: Any = [{"params": weights}, {"params": slopes, "weight_decay": 0.0}]
    numbers = {**get_defaults(GRADIENT_SIZED), **setting.numbers}
    optimizer = nesterov(groups, numbers["lr"], numbers["weight_decay"])
    return EndToEnd(setting.model, optimizer, setting.task.loss, make_cosine(setting.steps)(optimizer))


def _train_recovering(setting: TrialContext) -> Trainer:
    """Adaptive activations with slope recovery in the loss that is descended."""
    trainer, loss = _train_adaptive(setting), setting.task.loss
    weight = setting.numbers["recovery"]
    trainer.loss = lambda output, y: loss(output, y) + weight * slope_recovery(setting.model)
    return trainer


def _add_thresholds(model: nn.Module) -> None:
    places = [name for name, module in model.named_modules(remove_duplicate=False) if _is_activation(module)]
    if not places or "" in places:
        raise BenchError(f"the {type(model).__name__} has no activation module that a step could stand for")
    for name in places:
        model.set_submodule(name, Threshold(estimator="clipped_relu"))


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, ACTIVATIONS)


def _make_threshold(setting: TrialContext) -> Trainer:
    _add_thresholds(setting.model)
    return _train_end_to_end(setting, setting.model, setting.steps)


# ---- before and after training ---------------------------------------------------------------------


def _train_end_to_end(setting: TrialContext, model: nn.Module, steps: int) -> EndToEnd:
    optimizer = nesterov(list_trained(model), **setting.numbers)
    return EndToEnd(model, optimizer, setting.task.loss, make_cosine(steps)(optimizer))


@dataclass
class SampleMemory:
    """The last samples, at least `REMEMBERED` of them if there were as many."""

    batches: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Remember a batch, forget what is no longer needed."""
        self.batches.append((x, y))
        while sum(len(x) for x, _ in self.batches) - len(self.batches[0][0]) >= REMEMBERED:
            self.batches.popleft()


def deepen(model: nn.Module) -> tuple[nn.Sequential, int]:
    """Copy a network with its first hidden linear layer and its activation repeated.

    Returns:
        The deeper network, and the position of that layer.

    Raises:
        PlywiseError: it is not a chain with a hidden linear layer followed by an activation.
    """
    if isinstance(model, nn.Sequential):
        for at, (layer, activation) in enumerate(pairwise(model)):
            if isinstance(layer, nn.Linear) and _is_activation(activation):
                size = layer.out_features
                more = [copy.deepcopy(activation), nn.Linear(size, size).to(layer.weight)]
                parts = list(copy.deepcopy(model))
                return nn.Sequential(*parts[: at + 1], *more, *parts[at + 1 :]), at
    raise BenchError("only a chain with a hidden linear layer and its activation can be one layer deeper")


class FusedTraining:
    """Trains a network that is one layer deeper, fuses two layers half-way, and trains the smaller network.

    Attributes:
        plain: its outputs are the network's.
    """

    plain = True

    def __init__(self, setting: TrialContext) -> None:
        deep, self._at = deepen(setting.model)
        self._setting, self._half = setting, max(1, setting.steps // 2)
        self._trainer = _train_end_to_end(setting, deep, self._half)
        self._memory, self._taken = SampleMemory(), 0

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; its loss before the step."""
        if self._taken == self._half:
            self._fuse()
        if self._taken < self._half:
            self._memory.add(x, y)
        self._taken += 1
        return self._trainer.step(x, y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the network's outputs in eval mode."""
        return self._trainer.predict(x)

    def _fuse(self) -> None:
        deep = self._trainer.model
        assert isinstance(deep, nn.Sequential)
        fused = fuse_slice(deep, self._at, self._at + 3, [x for x, _ in self._memory.batches])
        self._trainer = _train_end_to_end(self._setting, fused, self._setting.steps - self._half)


class DecidedTraining:
    """Trains for half of the steps; then a support vector machine decides, and training ends.

    Attributes:
        plain: its outputs are decisions, 0 and 1, which the task's loss does not take.
    """

    plain = False

    def __init__(self, setting: TrialContext) -> None:
        from sklearn.svm import SVC

        self._classes, self._half = setting.classes, max(1, setting.steps // 2)
        self._trainer = _train_end_to_end(setting, setting.model, self._half)
        self._stage = DecisionStage(setting.model, SVC())
        self._memory, self._taken, self._loss = SampleMemory(), 0, 0.0

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; the loss before the last step that was one."""
        if self._taken < self._half:
            self._memory.add(x, y)
            self._loss = self._trainer.step(x, y)
        elif self._taken == self._half:
            self._stage.fit(self._memory.batches)
        self._taken += 1
        return self._loss

    def predict(self, x: Tensor) -> Tensor:
        """The network's scores; from the second half on 1 for the class that is decided for, 0 for others."""
        if self._taken <= self._half:
            return self._trainer.predict(x)
        return F.one_hot(self._stage.predict(x), self._classes).float()


def without_classes(workload: Workload) -> str:
    """Return why there is nothing to decide; "" if there is."""
    if not workload.classes:
        return "a decision stage needs classes, and the targets are none"
    return "a decision stage decides on samples, and here each token has a class" * workload.labels_tokens


METHODS = (
    Method(
        "adaptive-activations",
        "SGD with Nesterov momentum, a trainable slope for each activation module",
        {**GRADIENT_SIZED, "lr": Range(1e-3, 1.0, 0.03)},
        _train_adaptive,
        refuses=unless(_add_slopes),
    ),
    Method(
        "slope-recovery",
        "Adaptive activations, and a term in the loss that pushes slopes up",
        {"lr": Range(1e-3, 1.0, 0.01), "recovery": Range(1e-3, 10.0, 0.1)},
        _train_recovering,
        refuses=unless(_add_slopes),
    ),
    Method(
        "threshold",
        "SGD with Nesterov momentum, each activation 0 or 1, straight-through (clipped ReLU)",
        GRADIENT_SIZED,
        _make_threshold,
        refuses=unless(_add_thresholds),
    ),
    Method(
        "fuse-layers",
        "SGD with Nesterov momentum on a network one layer deeper, which is fused half-way",
        GRADIENT_SIZED,
        FusedTraining,
        refuses=unless(deepen),
    ),
    Method(
        "decision-stage",
        "SGD with Nesterov momentum for half of the steps; then a support vector machine decides",
        GRADIENT_SIZED,
        DecidedTraining,
        refuses=without_classes,
        needs="sklearn",
    ),
)
