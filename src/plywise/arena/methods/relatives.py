"""Optimizers and modules of the related papers as methods, trained as their peers are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from plywise.arena.method import EndToEnd, Method, Setting, Trainer, cosine, end_to_end
from plywise.arena.methods.peers import GRADIENT_SIZED, learning, nesterov
from plywise.arena.space import Range
from plywise.nn import adapt_activations
from plywise.optim import LRSGDC, LRSGDR, SalpSGD, YamAdam

SALPS = 4
"""Points in the chain of SalpSGD; each costs a forward and a backward pass."""
SLOPE_FACTOR = 2.0
"""n of adaptive activations, as in the paper's benchmarks of classification."""


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


def of_relative(name: str) -> Method:
    """A relative as a method.

    Args:
        name: one of ``RELATIVES``.

    Example:
        >>> list(of_relative("lrsgd-r").space)
        ['lr', 'weight_decay', 'strength']
    """
    return _RELATIVES[name]


def _local_regularizer(optimizer: Callable[..., Optimizer], setting: Setting) -> Trainer:
    return end_to_end(setting, optimizer(learning(setting.model), **setting.numbers))


def _untuned(setting: Setting) -> Trainer:
    """Without the cosine: there is no rate."""
    return EndToEnd(setting.model, YamAdam(learning(setting.model)), setting.task.loss)


def _swarm(setting: Setting) -> Trainer:
    lr, radius = setting.numbers["lr"], setting.numbers["radius"]
    chain = SalpSGD(learning(setting.model), lr, total_steps=setting.steps, salps=SALPS, radius=radius)
    return WithClosure(setting.model, chain, setting.task.loss, cosine(setting.steps)(chain))


def _adaptive(setting: Setting) -> Trainer:
    slopes = [module.slope for module in adapt_activations(setting.model, "layer", SLOPE_FACTOR)]
    known = {id(slope) for slope in slopes}
    weights = [parameter for parameter in learning(setting.model) if id(parameter) not in known]
    # decay would pull a slope to 0, where the layer hands nothing on
    groups: Any = [{"params": weights}, {"params": slopes, "weight_decay": 0.0}]
    return end_to_end(setting, nesterov(groups, **setting.numbers))


_LRSGD = {**GRADIENT_SIZED, "strength": Range(1e-3, 0.1, 0.01)}
_RELATIVES = {
    method.name: method
    for method in (
        Method(
            "lrsgd-r",
            "SGD with a local regularizer, in inner loops of random length",
            _LRSGD,
            partial(_local_regularizer, LRSGDR),
        ),
        Method(
            "lrsgd-c",
            "SGD with a local regularizer, in inner loops of ten steps with falling rates",
            _LRSGD,
            partial(_local_regularizer, LRSGDC),
        ),
        Method("yam-adam", "YamAdam: nothing to tune", {}, _untuned),
        Method(
            "salp-sgd",
            "SGD with a chain of four salps that looks around each step",
            {"lr": Range(1e-3, 1.0, 0.5), "radius": Range(1e-4, 0.1, 0.01)},
            _swarm,
            gradients=SALPS + 1,
        ),
        Method(
            "adaptive-activations",
            "SGD with Nesterov momentum, a trainable slope for each activation module",
            GRADIENT_SIZED,
            _adaptive,
        ),
    )
}
