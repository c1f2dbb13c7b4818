"""A user's papers that run in seconds: one that works, the same with another width, and broken ones."""

import os
import signal

import torch
from torch import nn

from plywise.arena.method import EndToEnd
from plywise.arena.reproductions.experiment import (
    DIVERGED,
    FULL,
    SMALL,
    TRAINING_LOSS,
    Arm,
    Claim,
    Experiment,
    ExperimentSize,
    Paper,
)
from plywise.arena.task import CLASSIFICATION
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data


def digits(train, validation, test):
    parts = load_digits()
    counts = (train, validation, test)
    return Data(*(Split(p.x[:n], p.y[:n]) for p, n in zip(parts, counts, strict=True)))


def begin(start):
    model = nn.Sequential(nn.Linear(64, start.size.widths[0]), nn.ReLU(), nn.Linear(start.size.widths[0], 10))
    return EndToEnd(model, torch.optim.SGD(model.parameters(), lr=start.rate), CLASSIFICATION.loss)


def broken(start):
    raise ValueError("no such layer")


def killed(start):
    os.kill(os.getpid(), signal.SIGKILL)


def paper(make=begin, widths=(8,)):
    size = ExperimentSize("digits", digits, widths, 50, 2, 500, 100, 100)
    arms = (
        Arm("slow", make, (1e-3,), 2.2),
        Arm("tuned", make, (1e-3, 0.5), 0.3),
        Arm("wild", make, (1e9,), DIVERGED),
    )
    experiment = Experiment(
        name="digits",
        about="a test",
        where="Table 9",
        measure=TRAINING_LOSS,
        arms=arms,
        sizes={FULL: size, SMALL: size},
        claims=(Claim("tuned", "slow"), Claim("slow", "tuned")),
        differences=("we know why",),
    )
    return Paper("mine", "Me, Mine, 2026", (experiment,))


MINE = paper()
WIDER = paper(widths=(16,))
BROKEN = paper(broken)
KILLED = paper(killed)
