"""The forward maps of the Associated Learning paper's networks, as its code has them.

Each function makes the blocks f of one network, for `plywise.Blocks`; `he_normal_` is their initialisation,
for blocks and for the rest of the learner alike. Bridges, encoders and decoders are those of
`plywise.AssociatedLearning` by default; the code's width n (``neuron_num``) is 1024 / 3000 / 3000 for the
MLP on MNIST / CIFAR-10 / CIFAR-100, 256 / 256 / 500 for the CNN, and 300 / 500 on CIFAR-10 / 100 for ResNet
and VGG.

Convolutions of stride 2 pad on all sides, where TensorFlow's "same" pads below and to the right.

Source: the authors' TensorFlow code of Kao, Chen 2021 (see `plywise.AssociatedLearning`).
"""

import math
from typing import TypeVar

from torch import Tensor, nn

Modules = list[nn.Module]
T = TypeVar("T", bound=nn.Module)

TRUNCATED = 0.87962566103423978
"""Standard deviation of a standard normal cut at ±2."""


def he_normal_(module: T) -> T:
    """Draw weights from a normal of deviation ``√(2 / fan_in)``, cut at twice its own deviation; biases 0.

    Example:
        >>> he_normal_(nn.Linear(50, 2)).bias.detach().abs().sum().item()
        0.0
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            deviation = math.sqrt(2 / fan_in) / TRUNCATED
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp_blocks(inputs: int, width: int) -> Modules:
    """MLP_AL: two layers of the code's width.

    Example:
        >>> len(mlp_blocks(784, 1024))
        2
    """
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ELU()),
        nn.Sequential(nn.Linear(width, width), nn.ELU()),
    ]


def cnn_blocks(channels: int, filters: int = 32) -> Modules:
    """CNN_AL: four times two 3×3 convolutions, every other pair with stride 2; no norm, no pooling.

    Example:
        >>> import torch
        >>> nn.Sequential(*cnn_blocks(1))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64, 7, 7])
    """

    def pair(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(after, after, 3, stride, padding=1),
            nn.ELU(),
        )

    wide = 2 * filters
    return [
        pair(channels, filters, 1),
        pair(filters, filters, 2),
        pair(filters, wide, 1),
        pair(wide, wide, 2),
    ]


def vgg_blocks(channels: int = 3, width: int = 128, *, norm: bool = False) -> Modules:
    """VGG_AL for images of 32×32: six convolutions in three blocks, two layers of 8 · width; no norm.

    Args:
        channels: channels of an image.
        width: channels of the first convolution.
        norm: whether batch norm comes after each map, as in the authors' baseline.

    Example:
        >>> import torch
        >>> nn.Sequential(*vgg_blocks())(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1024])
    """

    def conv(before: int, after: int) -> Modules:
        return [nn.Conv2d(before, after, 3, padding=1), *([_norm(after)] if norm else []), nn.ELU()]

    def dense(before: int, after: int) -> Modules:
        norms = [nn.BatchNorm1d(after, eps=1e-3, momentum=0.01)] if norm else []
        return [nn.Linear(before, after), *norms, nn.ELU()]

    c = width
    return [
        nn.Sequential(*conv(channels, c), *conv(c, 2 * c), nn.MaxPool2d(2)),
        nn.Sequential(*conv(2 * c, 2 * c), *conv(2 * c, 4 * c), nn.MaxPool2d(2)),
        nn.Sequential(*conv(4 * c, 4 * c), nn.MaxPool2d(2), *conv(4 * c, 4 * c), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), *dense(16 * c, 8 * c), *dense(8 * c, 8 * c)),
    ]


def resnet_blocks(channels: int = 3, depth: int = 20) -> Modules:
    """ResNet_AL: a convolution, then three stages of ``(depth - 2) / 6`` basic blocks; no pooling.

    Example:
        >>> import torch
        >>> nn.Sequential(*resnet_blocks())(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64, 8, 8])
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 with n at least 1 (20 and 32 in the paper), not {depth}.")
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), _norm(16), nn.ELU())
    stages = []
    for before, after, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        first = BasicBlock(before, after, stride)
        stages.append(
            nn.Sequential(first, *(BasicBlock(after, after, 1) for _ in range((depth - 2) // 6 - 1)))
        )
    return [stem, *stages]


class BasicBlock(nn.Module):
    """``elu(r(x) + skip(x))``, r two 3×3 convolutions, each with batch norm and ELU.

    The skip is a 1×1 convolution where sizes change. As in the authors' code there is an ELU before the
    addition, and one after it.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1),
            _norm(after),
            nn.ELU(),
            nn.Conv2d(after, after, 3, padding=1),
            _norm(after),
            nn.ELU(),
        )
        self.skip = nn.Identity() if stride == 1 and before == after else nn.Conv2d(before, after, 1, stride)
        self.activation = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, after, H/stride, W/stride)."""
        return self.activation(self.body(x) + self.skip(x))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # TensorFlow's defaults
