"""A small network and its setting, from which the tests of methods start."""

import torch
from torch import nn

from plywise.arena.method import TrialContext
from plywise.arena.space import get_defaults
from plywise.arena.task import CLASSIFICATION

STEPS = 80


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def setting(method, model=None, numbers=None, example=None, task=CLASSIFICATION, **more):
    numbers = get_defaults(method.space) if numbers is None else numbers
    example = torch.rand(8, 64) if example is None else example
    return TrialContext(
        model or network(), task, numbers, STEPS, example, **{"blocks": 2, "classes": 10, **more}
    )
