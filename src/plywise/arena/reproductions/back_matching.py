"""Back-matching propagation: VGG13 with batch norm on CIFAR-10 and CIFAR-100."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from plywise.arena.method import Trainer, with_rule
from plywise.arena.reproductions.experiment import (
    FULL,
    SMALL,
    TRAINING_LOSS,
    Arm,
    Claim,
    Experiment,
    ExperimentSize,
    Paper,
    Start,
)
from plywise.arena.reproductions.sources import cifar100_channels, cifar_channels
from plywise.arena.task import CLASSIFICATION
from plywise.data.parts import Data
from plywise.rules.back_matching import BackMatching


def vgg13(channels: int, classes: int) -> nn.Sequential:
    """VGG13 with batch norm for images of 32×32: five pairs of convolutions, pooling, one linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for times in (1, 2, 4, 8, 8):
        after = times * channels
        for inputs in (before, after):
            layers += [nn.Conv2d(inputs, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, classes))


def momentum(classes: int, rule: BackMatching | None, start: Start) -> Trainer:
    """VGG13 by SGD with momentum 0.9."""
    model = vgg13(start.size.widths[0], classes).to(start.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=start.rate, momentum=0.9)
    return with_rule(model, optimizer, rule, CLASSIFICATION.loss)


SGD, MATCHED, UNCAPPED = "SGD", "BackMatching", "BackMatching, no cap"
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)

DIFFERENCES = (
    "The rule is a reconstruction: the scalars that replace the Gram matrices, and the treatment of batch "
    "norm, are derived here.",
    "Rates, batch, epochs, momentum and schedule of the paper are not known; ours are constant rates, of "
    "five a method the one with the lowest training loss for a seed of its own.",
    "The cap is ours; 'no cap' is the nearer to the paper.",
)


def experiment(classes: int, source: Callable[[int, int, int], Data], *more: str) -> Experiment:
    """VGG13 on CIFAR with so many classes; and what more may make our numbers differ."""
    return Experiment(
        name=f"vgg13-cifar{classes}",
        about=f"VGG13 with batch norm on CIFAR-{classes}: better learning curves than SGD",
        where="the follow-up's reviews; neither paper's body could be read, so that no number is known",
        measure=TRAINING_LOSS,
        arms=(
            Arm(SGD, partial(momentum, classes, None), RATES),
            Arm(MATCHED, partial(momentum, classes, BackMatching()), RATES),
            Arm(UNCAPPED, partial(momentum, classes, BackMatching(cap=None)), RATES),
        ),
        sizes={
            FULL: ExperimentSize(
                about=(
                    "64 to 512 channels, 45,000 training images, batches of 128, 60 epochs; these settings "
                    "are ours"
                ),
                source=source,
                widths=(64,),
                batch=128,
                epochs=60,
                images=45_000,
            ),
            SMALL: ExperimentSize(
                about=(
                    "an eighth of the channels, 1,500 training images (500 for validation), batches of 32, 3 "
                    "epochs: 138 steps where full size takes 21,060"
                ),
                source=source,
                widths=(8,),
                batch=32,
                epochs=3,
                images=1_500,
                validation=500,
                test=1_000,
            ),
        },
        claims=(Claim(MATCHED, SGD), Claim(UNCAPPED, SGD)),
        differences=(*DIFFERENCES, *more),
    )


PAPER = Paper(
    "back-matching",
    "Zhang, Chen, Liu, Back-matching Propagation, arXiv 1802.09750 (2018), and On the Local Hessian in "
    "Back-propagation, NeurIPS 2018",
    (
        experiment(10, cifar_channels),
        experiment(
            100,
            cifar100_channels,
            "CIFAR-100 may be stored rounded (the step is in its .npz files): methods can be compared, and "
            "levels less so.",
        ),
    ),
)
