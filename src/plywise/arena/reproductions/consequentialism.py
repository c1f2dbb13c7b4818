"""Consequentialism weight updates: the claims of the abstract on MNIST, an MLP and a ConvNet."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

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
from plywise.arena.reproductions.sources import mnist
from plywise.arena.task import CLASSIFICATION
from plywise.arena.workloads.networks import conv_net, mlp
from plywise.rules.consequentialism import Consequentialism

MakeModel = Callable[[tuple[int, ...]], nn.Module]


def dense(widths: tuple[int, ...]) -> nn.Module:
    """Return an MLP with ReLU; widths are those of all layers."""
    return nn.Sequential(nn.Flatten(), *mlp(*widths))


def convolutions(widths: tuple[int, ...]) -> nn.Module:
    """Two convolutions of 3×3 and two linear layers; widths are (channels, channels, hidden units)."""
    return conv_net((1, 28, 28), widths[:2], (*widths[2:], 10))


def trained(
    model: MakeModel,
    optimizer: type[Optimizer],
    settings: dict[str, Any],
    rule: Consequentialism | None,
    start: Start,
) -> Trainer:
    """Return a network by an optimizer at a constant rate, perhaps with the rule."""
    made = model(start.size.widths).to(start.device)
    stepped = optimizer(made.parameters(), lr=start.rate, **settings)  # type: ignore[call-arg]
    return with_rule(made, stepped, rule, CLASSIFICATION.loss)


SGD, NESTEROV, ADAM = "SGD", "SGD with Nesterov momentum", "Adam"
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any], tuple[float, ...], tuple[float, ...]]] = {
    SGD: (torch.optim.SGD, {}, (0.03, 0.1, 0.3, 1.0), (0.1, 0.3, 1.0, 3.0)),
    NESTEROV: (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
        (0.01, 0.03, 0.1, 0.3),
        (0.01, 0.03, 0.1, 0.3),
    ),
    ADAM: (torch.optim.Adam, {}, (1e-3, 3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2, 3e-2)),
}
"""Classes, settings, rates without and with the rule."""


def with_it(name: str) -> str:
    """Return what an optimizer with the rule is called.

    Example:
        >>> with_it("Adam")
        'CWU on Adam'
    """
    return f"CWU on {name}"


def _make_arms(model: MakeModel) -> tuple[Arm, ...]:
    arms = []
    for name, (optimizer, settings, plain, corrected) in OPTIMIZERS.items():
        arms.append(Arm(name, partial(trained, model, optimizer, settings, None), plain))
        rule = Consequentialism()
        arms.append(Arm(with_it(name), partial(trained, model, optimizer, settings, rule), corrected))
    return tuple(arms)


CLAIMS = (
    *(Claim(with_it(name), name) for name in OPTIMIZERS),
    Claim(with_it(SGD), NESTEROV),  # "can remove the need for momentum"
)
DIFFERENCES = (
    "The paper's data, networks, settings and numbers are not known: all of these are ours.",
    "The damping ε and the treatment of the bias are a reconstruction.",
    "Rates are constant, of four a method the one with the lowest training loss for a seed of its own.",
)


def _make_experiment(
    network: str, about: str, model: MakeModel, full: ExperimentSize, small: ExperimentSize
) -> Experiment:
    return Experiment(
        name=f"mnist-{network}",
        about=about,
        where=(
            "the abstract ('usually fewer iterations'); its body could not be read, so that no number is "
            "known"
        ),
        measure=TRAINING_LOSS,
        arms=_make_arms(model),
        sizes={FULL: full, SMALL: small},
        claims=CLAIMS,
        differences=DIFFERENCES,
    )


FULL_MLP = ExperimentSize(
    about="784-1024-1024-10, 55,000 training images, batches of 128, 20 epochs; ours",
    source=mnist,
    widths=(784, 1024, 1024, 10),
    batch=128,
    epochs=20,
    images=55_000,
)
SMALL_MLP = ExperimentSize(
    about=(
        "784-128-128-10, 5,000 training images (1,000 for validation), batches of 64, 3 epochs: 234 steps "
        "where full size takes 8,580"
    ),
    source=mnist,
    widths=(784, 128, 128, 10),
    batch=64,
    epochs=3,
    images=5_000,
    validation=1_000,
    test=2_000,
)

PAPER = Paper(
    "consequentialism",
    "Paeedeh, Ghiasi-Shirazi, Improving the Backpropagation Algorithm with Consequentialism Weight Updates "
    "over Mini-Batches, Neurocomputing 461 (2021), arXiv 2003.05164",
    (
        _make_experiment("mlp", "MLP on MNIST: fewer steps with every optimizer", dense, FULL_MLP, SMALL_MLP),
        _make_experiment(
            "conv",
            "ConvNet on MNIST: the same with convolutions",
            convolutions,
            replace(
                FULL_MLP,
                about=(
                    "32 and 64 channels of 3×3, 128 units, 55,000 training images, batches of 128, 20 "
                    "epochs; ours"
                ),
                widths=(32, 64, 128),
            ),
            replace(
                SMALL_MLP,
                about=(
                    "8 and 16 channels, 64 units, 2,000 training images (1,000 for validation), batches of "
                    "64, 3 epochs: 93 steps where full size takes 8,580"
                ),
                widths=(8, 16, 64),
                images=2_000,
            ),
        ),
    ),
)
