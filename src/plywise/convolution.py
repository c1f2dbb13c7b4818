"""Convolutions as linear maps of their patches: Conv1d, Conv2d and Conv3d.

Rows are output positions, ``n = B · positions``; a row is the patch that the position reads,
``d = C/groups · prod(kernel)``. Any stride, padding (numbers, "same", "valid"; zeros, reflect,
replicate, circular), dilation and groups. The patch statistics come from `plywise.patch_gram`.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from plywise.layers import LayerType, register_layer, thinned
from plywise.patch_gram import patch_gram, patch_rows, patch_square_sums, patch_sums, patch_trace


class ConvolutionType(LayerType):
    """A convolution of one to three spatial dimensions."""

    def groups(self, module: nn.Module) -> int:
        return cast(_ConvNd, module).groups

    def linear_input(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == len(cast(_ConvNd, module).kernel_size) + 1 else x

    def rows(self, module: nn.Module, a: Tensor) -> Tensor:
        return patch_rows(_padded(module, a), *_geometry(module))

    def delta_rows(self, module: nn.Module, delta: Tensor) -> Tensor:
        groups = self.groups(module)
        batch, channels = delta.shape[:2]
        split = delta.reshape(batch, groups, channels // groups, -1)  # (B, g, m, positions)
        return split.permute(1, 0, 3, 2).reshape(groups, -1, channels // groups)

    def from_delta_rows(self, module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
        groups = self.groups(module)
        batch, channels = like.shape[:2]
        positions = math.prod(like.shape[2:])
        split = rows.reshape(groups, batch, positions, channels // groups)
        return split.permute(1, 0, 3, 2).reshape(like.shape)

    def scale_rows(self, module: nn.Module, delta: Tensor, factors: Tensor) -> Tensor:
        # in the layout of the output: making rows of Δ and undoing it would copy it twice
        groups, batch = self.groups(module), delta.shape[0]
        split = delta.reshape(batch, groups, -1, *delta.shape[2:])
        by_position = factors.reshape(groups, batch, 1, *delta.shape[2:]).transpose(0, 1)
        return (split * by_position).reshape(delta.shape)

    def weight_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        return cast(Tensor, _backward(module, _padded(module, a), delta, weight, (False, True, False))[1])

    def input_gradient(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        if not _pads_outside(module):
            return cast(Tensor, _backward(module, a, delta, weight, (True, False, False))[0])
        with torch.enable_grad():
            source = torch.zeros_like(a, requires_grad=True)
            padded = _padded(module, source)
        below = _backward(module, padded.detach(), delta, weight, (True, False, False))[0]
        return torch.autograd.grad(padded, source, below)[0]

    def bias_gradient(self, module: nn.Module, delta: Tensor) -> Tensor:
        return delta.sum([0, *range(2, delta.dim())])

    def apply(self, module: nn.Module, a: Tensor, weight: Tensor) -> Tensor:
        _, stride, padding, dilation, groups = _geometry(module)
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[a.dim()]
        return conv(_padded(module, a), weight, None, stride, padding, dilation, groups)

    def row_count(self, module: nn.Module, delta: Tensor) -> int:
        return delta.shape[0] * math.prod(delta.shape[2:])

    def gram(self, module: nn.Module, a: Tensor) -> Tensor:
        return patch_gram(_padded(module, a), *_geometry(module))

    def sums(self, module: nn.Module, a: Tensor) -> Tensor:
        return patch_sums(_padded(module, a), *_geometry(module))

    def sample(self, module: nn.Module, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        # a convolution of wider stride, over the padded image from an offset on, has just these rows
        kernel, stride, padding, dilation, groups = _geometry(module)
        x = F.pad(_padded(module, a), [p for p in reversed(padding) for _ in range(2)])
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        counts = [(size - r) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
        windows = thinned(counts, every, turn)
        x = x[
            (
                slice(None),
                slice(None),
                *(slice(w.start * s, None) for w, s in zip(windows, stride, strict=True)),
            )
        ]
        wider = tuple(w.step * s for w, s in zip(windows, stride, strict=True))
        geometry = kernel, wider, (0,) * len(kernel), dilation, groups
        rows = a.shape[0] * math.prod(len(range(*w.indices(n))) for w, n in zip(windows, counts, strict=True))
        return patch_gram(x, *geometry), patch_sums(x, *geometry), rows

    def square_norms(self, module: nn.Module, a: Tensor) -> Tensor:
        return patch_square_sums(_padded(module, a), *_geometry(module))

    def trace(self, module: nn.Module, a: Tensor) -> Tensor:
        return patch_trace(_padded(module, a), *_geometry(module))

    def weight_energy(self, module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        # A tap of the kernel meets the image at as many positions as its window covers real pixels:
        # border taps of a padded convolution count less often.
        kernel, stride, padding, dilation, _ = _geometry(module)
        outside = cast(_ConvNd, module)._reversed_padding_repeated_twice if _pads_outside(module) else ()
        taps = weight.square().sum((0, 1))
        for dim, (k, s, p, step) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
            size, out = a.shape[2 + dim], delta.shape[2 + dim]
            size += sum(outside[2 * (len(kernel) - 1 - dim) :][:2])
            start = torch.arange(k, device=a.device)[:, None] * step - p
            where = start + s * torch.arange(out, device=a.device)
            counts = ((where >= 0) & (where < size)).sum(1).to(taps.dtype)
            taps = taps * counts.reshape([-1 if i == dim else 1 for i in range(len(kernel))])
        return taps.sum() / math.prod(a.shape[1:])


def _pads_outside(module: nn.Module) -> bool:
    """Whether padding is a step of its own before the convolution.

    Zero padding of equal size on both sides is part of the convolution itself. Other modes, and
    "same" with an even kernel (one more zero on one side), pad first.
    """
    conv = cast(_ConvNd, module)
    before_after = conv._reversed_padding_repeated_twice
    return conv.padding_mode != "zeros" or before_after[::2] != before_after[1::2]


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    """The tensor that the convolution itself reads."""
    conv = cast(_ConvNd, module)
    if not _pads_outside(conv):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


def _geometry(
    module: nn.Module,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Kernel size, stride, zero padding, dilation and groups of the convolution of `_padded`."""
    conv = cast(_ConvNd, module)
    padding = tuple(reversed(conv._reversed_padding_repeated_twice[::2]))
    if _pads_outside(conv):
        padding = (0,) * len(conv.kernel_size)
    return conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups


def _backward(
    module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward pass that autograd itself runs for a convolution."""
    _, stride, padding, dilation, groups = _geometry(module)
    no_output_padding = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        delta, a, weight, None, stride, padding, dilation, False, no_output_padding, groups, mask
    )


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_type, ConvolutionType())
