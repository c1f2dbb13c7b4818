"""LocalMixer: the network of the local forward gradient's paper, in which each unit influences few losses.

An image is cut into patches. A block mixes patches, then channels, then channels of each group. After the
first of these layers a unit only influences its own patch, after the last one only its own group. So each
loss of a patch and group (``patches=True, groups=...`` of `plywise.LocalForwardGradient`) depends only on the
units of that patch and group, and their estimates have little noise.

Source: Ren, Kornblith, Liao, Hinton, ICLR 2023 (see `plywise.LocalForwardGradient`), and its public code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Modules = list[nn.Module]


class Patches(nn.Module):
    """Images (B, C, H, W) to (B, C·h·w, patches), each patch's pixels as channels.

    Args:
        count: patches along each side; it divides height and width.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """Return the patches, row by row."""
        sides = x.shape[2] // self.count, x.shape[3] // self.count
        return F.unfold(x, sides, stride=sides)


class NormedMap(nn.Module):
    """A linear map of channels, or of patches, and a norm without weights: a push comes after both.

    Args:
        size: inputs of the map.
        outputs: its outputs.
        groups: of channels, mapped by themselves.
        over_patches: whether it maps patches, the same for each channel.
    """

    def __init__(self, size: int, outputs: int, groups: int = 1, over_patches: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(size, outputs) if over_patches else nn.Conv1d(size, outputs, 1, groups=groups)
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # it is one layer with its norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, patches) to the same, of mean 0 and variance 1 over a patch's channels."""
        z = self.map(x).transpose(1, 2)
        return F.layer_norm(z, z.shape[-1:]).transpose(1, 2)


class MixerBlock(nn.Module):
    """Mixes patches, channels and groups of channels, each with a norm and a ReLU, beside a shortcut.

    Args:
        channels: of a patch.
        patches: their number.
        groups: of channels.
    """

    def __init__(self, channels: int, patches: int, groups: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(NormedMap(patches, patches, over_patches=True), nn.ReLU())
        self.channels = nn.Sequential(NormedMap(channels, channels), nn.ReLU())
        self.groups = NormedMap(channels, channels, groups)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, patches) to the same."""
        return self.relu(self.groups(self.channels(self.tokens(x))) + x)


def average_head(shape: torch.Size, num_classes: int) -> nn.Module:
    """Return the mean over all patches and one linear layer that begins as 0."""
    layer = nn.Linear(shape[0], num_classes)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), layer)


def local_mixer(
    image: tuple[int, int, int],
    num_classes: int,
    *,
    patches: int = 4,
    channels: int = 128,
    groups: int = 16,
    blocks: int = 4,
) -> Modules:
    """Return the blocks of a LocalMixer, for `plywise.Blocks`; the last one classifies the mean over patches.

    Args:
        image: channels, height and width.
        num_classes: number of classes.
        patches: along each side of the image.
        channels: of a patch; a multiple of ``groups``.
        groups: of channels.
        blocks: number of blocks before the classifier.

    Example:
        >>> modules = local_mixer((1, 8, 8), 10, patches=2, channels=32, groups=4, blocks=2)
        >>> nn.Sequential(*modules)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    if image[1] % patches or image[2] % patches or channels % groups:
        raise ValueError(
            f"{patches} patches a side must divide {image[1]}×{image[2]}, and {groups} groups the {channels} "
            "channels."
        )
    pixels = image[0] * (image[1] // patches) * (image[2] // patches)
    first = nn.Sequential(
        Patches(patches),
        NormedMap(pixels, channels),
        nn.ReLU(),
        NormedMap(channels, channels, groups),
        nn.ReLU(),
    )
    mixers = [MixerBlock(channels, patches**2, groups) for _ in range(blocks - 1)]
    return [first, *mixers, average_head(torch.Size((channels, patches**2)), num_classes)]
