"""Losses of the related papers as methods: added to a task's loss, or in its place."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from plywise._util.adamw import make_adamw
from plywise.arena.method import EndToEnd, Method, Trainer, TrialContext, make_cosine
from plywise.arena.methods.peers import GRADIENT_SIZED, list_trained, nesterov, unit_sized
from plywise.arena.space import Range, get_defaults
from plywise.arena.task import Judge, predictor, wrong_order
from plywise.arena.workload import Workload
from plywise.losses import AUCMargin, CoDA, input_gradient_penalty, wasserstein_proximal

INNER = 3
"""Steps of the Wasserstein proximal on each batch."""


# ---- the area under the ROC curve ------------------------------------------------------------------


def unranked(workload: Workload) -> str:
    """Return why a loss for the AUC does not fit a workload; "" if it does."""
    return "" if workload.task.metric is wrong_order else "its metric is not the order of pairs (1 - AUC)"


@dataclass
class Ranked:
    """Training for the AUC: a batch may lack a class, so the loss gets the counts of the whole set.

    Attributes:
        model: gives a score a sample.
        loss: its ``positive_share`` follows the data.
        train: a step on a batch; its loss.
        plain: its loss is not the task's, but scores are scores.
    """

    model: nn.Module
    loss: AUCMargin
    train: Callable[[Tensor, Tensor], float]
    plain: bool = False

    def __post_init__(self) -> None:
        self._positives, self._labels = 1, 2  # each class begins with one, and no share is 0

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; the loss before the step."""
        self._positives += int((y == 1).sum())
        self._labels += y.numel()
        self.loss.positive_share = self._positives / self._labels
        return self.train(x, y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the network's scores in eval mode."""
        return predictor(self.model)(x)


def _train_for_auc(setting: TrialContext) -> Trainer:
    loss = AUCMargin().to(setting.example.device)
    groups: Any = [
        {"params": list_trained(setting.model)},
        {"params": list(loss.parameters()), "weight_decay": 0.0},
    ]
    optimizer = nesterov(groups, **setting.numbers)
    trainer = EndToEnd(setting.model, optimizer, loss, make_cosine(setting.steps)(optimizer))
    return Ranked(setting.model, loss, trainer.step)


def _train_coda(setting: TrialContext) -> Trainer:
    """One worker, two stages: the first settles α on 3 batches and the second, three times as long, on 9."""
    numbers, loss = setting.numbers, AUCMargin(floor=-math.inf).to(setting.example.device)
    stage = max(1, (setting.steps - 12) // 4)
    coda = CoDA(setting.model, loss, first_stage=stage, lr=numbers["lr"], gamma=numbers["gamma"])
    return Ranked(setting.model, loss, lambda x, y: coda.step(x, y).item())


# ---- terms added to the task's loss ----------------------------------------------------------------


@dataclass
class FlatInInputs(EndToEnd):
    """Training that also makes the loss flat around the data.

    Attributes:
        losses: the task's loss of each sample.
        strength: of the penalty.
    """

    losses: Judge = field(kw_only=True)
    strength: float = field(kw_only=True)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; loss and penalty before the step."""
        x = x.detach().clone().requires_grad_()
        losses = self.losses(self.model(x), y)
        return self.descend(losses.mean() + self.strength * input_gradient_penalty(losses, x))


def _train_flat(setting: TrialContext) -> Trainer:
    assert setting.task.losses is not None, "refused where the task has none"
    numbers = {**get_defaults(GRADIENT_SIZED), **setting.numbers}
    strength = numbers.pop("strength")
    optimizer = nesterov(list_trained(setting.model), **numbers)
    return FlatInInputs(
        setting.model,
        optimizer,
        setting.task.loss,
        make_cosine(setting.steps)(optimizer),
        losses=setting.task.losses,
        strength=strength,
    )


def not_by_sample(workload: Workload) -> str:
    """Return why a penalty on the input gradient is impossible; "" if it is possible."""
    return "" if workload.task.losses else "its loss is not one of each sample and its inputs"


@dataclass
class NearItself(EndToEnd):
    """Training that takes a few steps on each batch, while a proximal term keeps the outputs near.

    Attributes:
        reach: the proximal step h.
    """

    reach: float = field(kw_only=True)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; its loss before the first of the steps."""
        before = self.model(x)
        anchor = before.detach()
        first = self.descend(self.loss(before, y))
        for _ in range(INNER - 1):
            output = self.model(x)
            self.descend(self.loss(output, y) + wasserstein_proximal(output, anchor, self.reach))
        return first


def _train_proximal(setting: TrialContext) -> Trainer:
    numbers = {**get_defaults(unit_sized(1e-3)), **setting.numbers}
    reach = numbers.pop("reach")
    optimizer = make_adamw(list_trained(setting.model), **numbers)
    scheduler = make_cosine(INNER * setting.steps)(optimizer)
    return NearItself(setting.model, optimizer, setting.task.loss, scheduler, reach=reach)


METHODS = (
    Method(
        "auc-margin",
        "The AUC margin loss on SGD with Nesterov momentum, in place of the task's loss",
        {**GRADIENT_SIZED, "lr": Range(1e-4, 0.1, 0.01)},  # larger ones end with equal scores
        _train_for_auc,
        refuses=unranked,
    ),
    Method(
        "coda",
        "CoDA with one worker: the AUC's min-max loss in stages",
        {"lr": Range(1e-3, 1.0, 0.1), "gamma": Range(1.0, 1e4, 400.0)},
        _train_coda,
        refuses=unranked,
    ),
    Method(
        "input-gradient-penalty",
        "SGD with Nesterov momentum on the loss and the 1-norm of its gradient by the inputs",
        {"lr": GRADIENT_SIZED["lr"], "strength": Range(1e-4, 1.0, 0.01)},
        _train_flat,
        gradients=2.0,
        refuses=not_by_sample,
    ),
    Method(
        "wasserstein-proximal",
        "Three steps of AdamW on each batch, with a proximal term on the network's outputs",
        {"lr": unit_sized(1e-3)["lr"], "reach": Range(0.1, 1e3, 10.0)},
        _train_proximal,
        gradients=INNER,
    ),
)
