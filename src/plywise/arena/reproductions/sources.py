"""The papers' data: images of MNIST and CIFAR in the order of their files, and digits in their place."""

import numpy as np
import torch
from torch import Tensor

from plywise.arena.workloads.images import standardise_channels
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data
from plywise.data.readers import Bytes
from plywise.data.sets import load_cifar10, load_cifar100, load_grey_images


def mnist(images: int, validation: int, test: int) -> Data:
    """MNIST, images (1, 28, 28) in [0, 1]: the first of the training file, its last as validation."""
    x, y, x_test, y_test = load_grey_images("mnist")
    return _cut_parts(x[..., None], y, x_test[..., None], y_test, (images, validation, test))


def cifar(images: int, validation: int, test: int) -> Data:
    """CIFAR-10, images (3, 32, 32) in [0, 1]: the first of the training file, its last as validation."""
    return _cut_parts(*load_cifar10(), (images, validation, test))


def digits(images: int, validation: int, test: int) -> Data:
    """Return the digits that come with plywise, 64 pixels in [0, 1]: the first of each part."""
    sizes = (images, validation, test)
    parts = zip(load_digits(), sizes, strict=True)
    return Data(*(Split(part.x[:size], part.y[:size]) for part, size in parts))


def mnist_centred(images: int, validation: int, test: int) -> Data:
    """`mnist`, less the mean of each pixel over the training set."""
    return _centre(mnist(images, validation, test))


def cifar_centred(images: int, validation: int, test: int) -> Data:
    """`cifar`, less the mean of each pixel over the training set."""
    return _centre(cifar(images, validation, test))


def cifar_channels(images: int, validation: int, test: int) -> Data:
    """`cifar`, each channel with mean 0 and variance 1 over the training set."""
    return standardise_channels(cifar(images, validation, test))


def cifar100_channels(images: int, validation: int, test: int) -> Data:
    """`cifar_channels`, of CIFAR-100."""
    return standardise_channels(_cut_parts(*load_cifar100(), (images, validation, test)))


def _cut_parts(x: Bytes, y: Bytes, x_test: Bytes, y_test: Bytes, sizes: tuple[int, int, int]) -> Data:
    images, validation, test = sizes
    assert images + validation <= len(y)
    return Data(
        _split(x[:images], y[:images]),
        _split(x[-validation:], y[-validation:]),
        _split(x_test[:test], y_test[:test]),
    )


def _split(x: Bytes, y: Bytes) -> Split:
    pixels: Tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)).astype(np.float32))
    return Split(pixels.div_(255), torch.from_numpy(y.astype(np.int64)))


def _centre(data: Data) -> Data:
    mean = data.train.x.mean(0)
    return Data(*(Split(part.x - mean, part.y) for part in data.parts))
