"""A component's gradients: as a learner makes them, and as autograd does."""

import torch
import torch.nn.functional as F
from torch import Tensor

import plywise as pw
from plywise.local.component import Component, Signal

CLASSES = 3


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def components(modules, x: Tensor, **options) -> list[Component]:
    learner = pw.LocalForwardGradient(pw.Blocks(modules, x), CLASSES, optimizer=sgd, **options)
    return [trainer.component for trainer in learner.trainers]


def gradients(component: Component, signal: Signal) -> list[Tensor]:
    """Of the component's own loss, as a learner makes them."""
    component.zero_grad()
    component(signal)[1].backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in component.parameters()]


def scores(component: Component, s: Tensor) -> Tensor:
    """What the component's loss judges."""
    output = component.block(s)
    return output if component.head is None else component.head(output)


def exact(component: Component, signal: Signal) -> list[Tensor]:
    loss = F.cross_entropy(scores(component, signal.s), signal.y)
    return list(torch.autograd.grad(loss, list(component.parameters())))
