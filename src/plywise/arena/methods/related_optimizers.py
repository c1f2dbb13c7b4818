"""Optimizers of the related papers as methods, trained as their peers are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from plywise.arena.method import EndToEnd, Method, Trainer, TrialContext, end_to_end, make_cosine
from plywise.arena.methods.peers import GRADIENT_SIZED, hidden_weights, list_trained
from plywise.arena.space import Range, get_defaults
from plywise.optim import LRSGDC, LRSGDR, ASkewSGD, SalpSGD, YamAdam

SALPS = 4
"""Number of points in the chain of SalpSGD; each costs a forward and a backward pass."""
STAGES = 100
"""Number of stages in place of ASkewSGD's epochs: the constraint tightens in the second half of them."""
TIGHTENING = 0.9
"""Factor of ASkewSGD's intervals from stage to stage; after 50 they are half a per cent of the first."""


@dataclass
class WithClosure(EndToEnd):
    """Training by an optimizer that evaluates the loss several times a step."""

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch; its loss before the step."""

        def closure() -> float:
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            loss.backward()
            return loss.item()

        loss: float = self.optimizer.step(closure)
        if self.scheduler is not None:
            self.scheduler.step()
        return loss


@dataclass
class Quantized(EndToEnd):
    """Training that predicts with the quantized network."""

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the quantized network's outputs in eval mode; the weights in training stay as they are."""
        assert isinstance(self.optimizer, ASkewSGD)
        params = list_trained(self.model)
        kept = [param.clone() for param in params]
        self.optimizer.quantize()
        try:
            return super().predict(x)
        finally:
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)


def _train_with_regularizer(optimizer: Callable[..., Optimizer], setting: TrialContext) -> Trainer:
    numbers = {**get_defaults(GRADIENT_SIZED), **setting.numbers}
    return end_to_end(setting, optimizer(list_trained(setting.model), **numbers))


def _make_untuned(setting: TrialContext) -> Trainer:
    """Without the cosine: there is no rate."""
    return EndToEnd(setting.model, YamAdam(list_trained(setting.model)), setting.task.loss)


def _train_swarm(setting: TrialContext) -> Trainer:
    lr, radius = setting.numbers["lr"], setting.numbers["radius"]
    chain = SalpSGD(list_trained(setting.model), lr, total_steps=setting.steps, salps=SALPS, radius=radius)
    return WithClosure(setting.model, chain, setting.task.loss, make_cosine(setting.steps)(chain))


def _make_binary(setting: TrialContext) -> Trainer:
    """Hidden weights become ± the deviation of He's start, times a number that is tuned."""
    hidden = hidden_weights(setting)
    scale = setting.numbers["scale"]
    sizes = [scale * (2 / weight[0].numel()) ** 0.5 for weight in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [weight], "levels": (-size, size)} for weight, size in zip(hidden, sizes, strict=True)
    ]
    bound = {id(weight) for weight in hidden}
    free = [param for param in list_trained(setting.model) if id(param) not in bound]
    optimizer = ASkewSGD(
        [*groups, {"params": free, "levels": None}],
        setting.numbers["lr"],
        steps_per_epoch=max(1, setting.steps // STAGES),
        hold=STAGES // 2,
        decay=TIGHTENING,
    )
    return Quantized(setting.model, optimizer, setting.task.loss, make_cosine(setting.steps)(optimizer))


_LRSGD = {"lr": GRADIENT_SIZED["lr"], "strength": Range(1e-3, 0.1, 0.01)}
METHODS = (
    Method(
        "lrsgd-r",
        "SGD with a local regularizer, in inner loops of random length",
        _LRSGD,
        partial(_train_with_regularizer, LRSGDR),
    ),
    Method(
        "lrsgd-c",
        "SGD with a local regularizer, in inner loops of ten steps with falling rates",
        _LRSGD,
        partial(_train_with_regularizer, LRSGDC),
    ),
    Method("yam-adam", "YamAdam: nothing to tune", {}, _make_untuned),
    Method(
        "salp-sgd",
        "SGD with a chain of four salps that looks around each step",
        {"lr": Range(1e-3, 1.0, 0.5), "radius": Range(1e-4, 0.1, 0.01)},
        _train_swarm,
        gradients=SALPS + 1,
    ),
    Method(
        "askew-sgd",
        "ASkewSGD: hidden weights of two levels; it is judged by the quantized network",
        {"lr": Range(1e-2, 3.0, 0.3), "scale": Range(0.3, 3.0, 1.0)},
        _make_binary,
    ),
)
