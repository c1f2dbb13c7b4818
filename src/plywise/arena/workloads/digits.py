"""Workloads on the handwritten digits that ship with the package: no file needed, about a second a run."""

from dataclasses import replace
from functools import partial

from plywise.arena.task import CLASSIFICATION, REGRESSION
from plywise.arena.workload import Workload
from plywise.arena.workloads.networks import autoencoder, conv_net, mlp
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data

TEN_CLASSES = replace(CLASSIFICATION, chance=0.9)


def digits() -> Data:
    """1,100 images to train, 297 to validate, 400 to test; 64 pixels in [0, 1]."""
    return Data(*load_digits())


def digit_images() -> Data:
    """Return the digits as images (1, 8, 8)."""
    return Data(*(Split(part.x.view(-1, 1, 8, 8), part.y) for part in load_digits()))


def digits_themselves() -> Data:
    """Return the digits as inputs and targets."""
    return Data(*(Split(part.x, part.x) for part in load_digits()))


WORKLOADS = (
    Workload(
        "digits-mlp",
        "64-128-128-128-10 with ReLU on 1,100 handwritten digits of 8×8 pixels: linear layers, and "
        "nothing to download. The network of the demo.",
        partial(mlp, 64, 128, 128, 128, 10),
        digits,
        TEN_CLASSES,
        batch_size=128,
        steps=300,
        blocks=4,
        classes=10,
    ),
    Workload(
        "digits-conv",
        "Two convolutions (16 and 32 channels) and two linear layers on the same digits: convolutions, "
        "in seconds.",
        partial(conv_net, (1, 8, 8), (16, 32), (64, 10)),
        digit_images,
        TEN_CLASSES,
        batch_size=128,
        steps=200,
        blocks=3,
        classes=10,
    ),
    Workload(
        "digits-autoencoder",
        "64-32-16-8-16-32-64 with ELU on the same digits, which it is to give back: a deep bottleneck, "
        "where plain gradients are slow.",
        partial(autoencoder, 64, 32, 16, 8),
        digits_themselves,
        REGRESSION,
        batch_size=128,
        steps=300,
    ),
)
