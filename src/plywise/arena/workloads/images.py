"""Workloads on Fashion-MNIST, MNIST and CIFAR-10: some thousand images to train, the official test set."""

import hashlib
from functools import partial

import numpy as np
import torch
from torch import Tensor

from plywise.arena.task import REGRESSION
from plywise.arena.workload import Workload
from plywise.arena.workloads.digits import TEN_CLASSES
from plywise.arena.workloads.networks import autoencoder, conv_net, mlp, resnet
from plywise.data.digits import Split
from plywise.data.parts import Data, draw_parts
from plywise.data.readers import Bytes
from plywise.data.sets import load_cifar10, load_grey_images

TRAIN, VALIDATION = 10_000, 2_000
CIFAR_TRAIN, CIFAR_VALIDATION = 8_000, 2_000


def fashion() -> Data:
    """Fashion-MNIST, images (1, 28, 28): 10,000 and 2,000 of the training set, and the test set of 10,000.

    Pixels have mean 0 and variance 1 over the training part.
    """
    x, y, x_test, y_test = load_grey_images("fashion_mnist")
    parts = [
        *draw_parts(_make_pixels(x), _make_labels(y), (TRAIN, VALIDATION)),
        Split(_make_pixels(x_test), _make_labels(y_test)),
    ]
    return standardise_channels(Data(*(Split(part.x.unsqueeze(1), part.y) for part in parts)))


def fashion_rows() -> Data:
    """`fashion`, each image a row of 784 pixels."""
    return Data(*(Split(part.x.flatten(1), part.y) for part in fashion().parts))


def mnist_themselves() -> Data:
    """MNIST, to be given back: 784 pixels in [0, 1]; parts of the sizes of `fashion`."""
    x, y, x_test, _ = load_grey_images("mnist")
    rows = [part.x.flatten(1) for part in draw_parts(_make_pixels(x), _make_labels(y), (TRAIN, VALIDATION))]
    return Data(*(Split(part, part) for part in (*rows, _make_pixels(x_test).flatten(1))))


def cifar() -> Data:
    """CIFAR-10, images (3, 32, 32): 8,000 and 2,000 of the training set, and the test set of 10,000.

    Files differ in the order of the images, so images are first sorted by their checksums. Each channel has
    mean 0 and variance 1 over the training part.
    """
    x, y, x_test, y_test = load_cifar10()
    train = _pick_by_checksum(x, y, CIFAR_TRAIN + CIFAR_VALIDATION)
    first, second = train.x.split([CIFAR_TRAIN, CIFAR_VALIDATION])
    labels = train.y.split([CIFAR_TRAIN, CIFAR_VALIDATION])
    test = _pick_by_checksum(x_test, y_test, len(y_test))
    return standardise_channels(Data(Split(first, labels[0]), Split(second, labels[1]), test))


def _pick_by_checksum(x: Bytes, y: Bytes, count: int) -> Split:
    keys = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in x]
    chosen = sorted(range(len(keys)), key=keys.__getitem__)[:count]
    return Split(_make_pixels(x[chosen]).permute(0, 3, 1, 2).contiguous(), _make_labels(y[chosen]))


def _make_pixels(x: Bytes) -> Tensor:
    return torch.from_numpy(x.astype(np.float32)) / 255


def _make_labels(y: Bytes) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))


def standardise_channels(data: Data) -> Data:
    """Each channel by the training part's mean and deviation."""
    deviation, mean = torch.std_mean(data.train.x, dim=(0, 2, 3), keepdim=True)
    return Data(*(Split((part.x - mean) / deviation, part.y) for part in data.parts))


WORKLOADS = (
    Workload(
        "fashion-mlp",
        "784-256-256-10 with ReLU on 10,000 images of Fashion-MNIST: wide linear layers.",
        partial(mlp, 784, 256, 256, 10),
        fashion_rows,
        TEN_CLASSES,
        batch_size=128,
        steps=400,
        blocks=3,
        classes=10,
    ),
    Workload(
        "fashion-2c2d",
        "Two convolutions (8 and 16 channels) and two linear layers on 10,000 images of Fashion-MNIST.",
        partial(conv_net, (1, 28, 28), (8, 16), (64, 10)),
        fashion,
        TEN_CLASSES,
        batch_size=64,
        steps=300,
        blocks=3,
        classes=10,
    ),
    Workload(
        "mnist-autoencoder",
        "784-256-64-16-64-256-784 with ELU on 10,000 images of MNIST, which it is to give back: the "
        "deep bottleneck where second-order methods are known to do well.",
        partial(autoencoder, 784, 256, 64, 16),
        mnist_themselves,
        REGRESSION,
        batch_size=128,
        steps=400,
    ),
    Workload(
        "cifar-3c3d",
        "Three convolutions (8, 16 and 32 channels) and three linear layers on 8,000 images of CIFAR-10: "
        "overfitting, weight decay.",
        partial(conv_net, (3, 32, 32), (8, 16, 32), (128, 64, 10)),
        cifar,
        TEN_CLASSES,
        batch_size=64,
        steps=300,
        blocks=4,
        classes=10,
    ),
    Workload(
        "cifar-resnet",
        "Three residual blocks (8, 16 and 32 channels) with batch norm on 8,000 images of CIFAR-10: "
        "shortcuts and norms.",
        partial(resnet, 8, 16, 32),
        cifar,
        TEN_CLASSES,
        batch_size=64,
        steps=300,
        blocks=4,
        classes=10,
    ),
)
