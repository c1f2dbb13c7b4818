"""Models, data and methods that the tests of the bench name by module:name, as a user would."""

import os
import signal
import time
from typing import ClassVar

import torch
from torch import nn

from plywise.arena.method import Method, end_to_end
from plywise.arena.space import Range


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    return x, x[:, :3].argmax(1)


def leaking_data():
    """The test part is the beginning of the training part."""
    x, y = data()
    return (x[:200], y[:200]), (x[200:], y[200:]), (x[:20], y[:20])


def broken_model():
    raise ValueError("no such layer")


class Adamlike(torch.optim.Adam):
    """Adam under another name."""

    search_space: ClassVar = {"lr": Range(1e-3, 1e-1, 1e-2)}


class Exploding(torch.optim.SGD):
    """SGD that diverges at once."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(1e30)


class Killed(torch.optim.SGD):
    """Its process is killed in the third step."""

    calls = 0

    def step(self, closure=None):
        Killed.calls += 1
        if Killed.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().step(closure)


class Leaving(torch.optim.SGD):
    """Its process ends itself."""

    def step(self, closure=None):
        os._exit(3)


class Hanging(torch.optim.SGD):
    """Never returns from a step."""

    def step(self, closure=None):
        time.sleep(600)


class Slow(torch.optim.SGD):
    """Takes long steps."""

    def step(self, closure=None):
        time.sleep(0.02)
        super().step(closure)


def _nothing_to_tune(setting):
    return end_to_end(setting, torch.optim.SGD(setting.model.parameters(), 0.1))


fixed = Method("fixed", "SGD at a rate of 0.1", {}, _nothing_to_tune)
