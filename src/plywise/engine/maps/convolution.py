"""Convolutions as linear maps of their patches, in one to three spatial dimensions, plain and transposed.

Rows are output positions, ``n = B · positions``; a row is the patch that the position reads,
``d = C/groups · prod(kernel)``. Padding other than equal zeros on both sides is a call of its own before
the convolution, so autograd sees it. The patch statistics come from `plywise.numerics.patch_gram`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plywise.engine.maps.base import LinearMap, thin_axes
from plywise.numerics.patch_gram import (
    compute_centred_patch_gram,
    compute_patch_gram,
    compute_patch_trace,
    sum_patch_squares,
    sum_patches,
    unfold_patches,
)
from plywise.numerics.products import compute_outer_product

CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]


@dataclass(frozen=True)
class Convolution(LinearMap):
    """A convolution of an input (B, C, *spatial) with a weight (g · m, C/g, *kernel).

    Attributes:
        kernel: taps for each spatial axis.
        stride: stride for each spatial axis.
        padding: zeros on both sides of each spatial axis.
        dilation: distance of two taps.
        groups: groups of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kind: ClassVar[str] = "conv"
    sends_below: ClassVar[bool] = True
    longest_chain: ClassVar[int] = 2**14

    @property
    def geometry(self) -> Geometry:
        """Kernel, stride, padding, dilation and groups, in the order of `unfold_patches`."""
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    def rows(self, a: Tensor) -> Tensor:
        """Return the patches, (g, n, d)."""
        return unfold_patches(a, *self.geometry)

    def delta_rows(self, delta: Tensor) -> Tensor:
        """Return Δ with a row for each position, (g, n, m)."""
        batch, channels = delta.shape[:2]
        split = delta.reshape(batch, self.groups, channels // self.groups, -1)  # (B, g, m, positions)
        return split.permute(1, 0, 3, 2).reshape(self.groups, -1, channels // self.groups)

    def from_delta_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape of the output."""
        batch, channels = like.shape[:2]
        positions = math.prod(like.shape[2:])
        split = rows.reshape(self.groups, batch, positions, channels // self.groups)
        return split.permute(1, 0, 3, 2).reshape(like.shape)

    def centre_delta(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Centre in the layout of the output, twice as `centre_rows` does: no copy to rows and back."""
        axes = [0, *range(2, delta.dim())]
        mean = delta.mean(axes, keepdim=True)
        centred = delta - mean
        rest = centred.mean(axes, keepdim=True)
        return centred.sub_(rest), (mean + rest).reshape(self.groups, -1)

    def scale_rows(self, delta: Tensor, factors: Tensor) -> Tensor:
        """Scale in the layout of the output: making rows of Δ and undoing it would copy it twice."""
        groups, batch = self.groups, delta.shape[0]
        split = delta.reshape(batch, groups, -1, *delta.shape[2:])
        by_position = factors.reshape(groups, batch, 1, *delta.shape[2:]).transpose(0, 1)
        return (split * by_position).reshape(delta.shape)

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` by the backward pass that autograd itself runs."""
        return self._run_backward(a, delta, weight, (False, True, False))[1]

    def precise_weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute it for parts of the batch: torch adds up all positions of a batch in a single chain."""
        count = max(self.longest_chain // max(math.prod(delta.shape[2:]), 1), 1)
        if len(a) <= count or delta.dtype == torch.float64 or delta.device.type != "cpu":
            return self.weight_gradient(a, delta, weight)
        parts = zip(a.split(count), delta.split(count), strict=True)
        gradients = [self.weight_gradient(x, d, weight).double() for x, d in parts]
        return torch.stack(gradients).sum(0).to(delta.dtype)

    def centred_weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute it by the backward pass of an input whose channels are centred.

        What is left is the gradient for images that are constant in each channel. It comes from the
        padding, and is the same for all images, so it is computed once, of the sum of their Δ.
        """
        axes, wide = [0, *range(2, a.dim())], torch.float64 if a.device.type != "mps" else a.dtype
        mean = a.mean(axes, keepdim=True)
        gradient = self.precise_weight_gradient(a - mean, delta, weight)
        total = delta.sum(0, keepdim=True, dtype=wide)
        total -= total.mean(axes, keepdim=True)
        ones = total.new_ones(1, 1, *a.shape[2:])
        of_ones = replace(self, groups=1).weight_gradient(
            ones, total, ones.new_zeros(len(weight), 1, *self.kernel)
        )
        channels = mean.reshape(self.groups, 1, -1, *[1] * len(self.kernel))
        constant = channels * of_ones.reshape(self.groups, -1, 1, *self.kernel)
        return gradient + constant.reshape(weight.shape).to(gradient.dtype)

    def input_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW`` by the backward pass that autograd itself runs."""
        return self._run_backward(a, delta, weight, (True, False, False))[0]

    def _run_backward(
        self, a: Tensor, delta: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        none = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            delta, a, weight, None, self.stride, self.padding, self.dilation, False, none, self.groups, mask
        )

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """Compute ``Δᵀ1``, (channels,)."""
        return delta.sum([0, *range(2, delta.dim())])

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution without its bias."""
        return CONVOLVE[a.dim()](a, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def row_count(self, delta: Tensor) -> int:
        """Return samples × positions."""
        return delta.shape[0] * math.prod(delta.shape[2:])

    def gram(self, a: Tensor) -> Tensor:
        """Return the Gram of the patches, without unfolding them where that is cheaper."""
        return compute_patch_gram(a, *self.geometry)

    def centred_gram(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Gram of the centred patches, and the mean patch."""
        return compute_centred_patch_gram(a, *self.geometry)

    def sums(self, a: Tensor) -> Tensor:
        """Return the sums of the patches."""
        return sum_patches(a, *self.geometry)

    def sample_positions(self, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """Sample by a convolution with a wider stride over the padded image, from an offset."""
        x = F.pad(a, [p for p in reversed(self.padding) for _ in range(2)])
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        counts = [(size - r) // s + 1 for size, r, s in zip(x.shape[2:], reach, self.stride, strict=True)]
        windows = thin_axes(counts, every, turn)
        offsets = [slice(w.start * s, None) for w, s in zip(windows, self.stride, strict=True)]
        x = x[(slice(None), slice(None), *offsets)]
        wider = tuple(w.step * s for w, s in zip(windows, self.stride, strict=True))
        geometry = self.kernel, wider, (0,) * len(self.kernel), self.dilation, self.groups
        rows = a.shape[0] * math.prod(len(range(*w.indices(n))) for w, n in zip(windows, counts, strict=True))
        return compute_patch_gram(x, *geometry), sum_patches(x, *geometry), rows

    def square_norms(self, a: Tensor) -> Tensor:
        """Compute ``‖patch‖²`` of each position, (g, n)."""
        return sum_patch_squares(a, *self.geometry)

    def trace(self, a: Tensor) -> Tensor:
        """Compute ``‖patches‖²_F`` of each group."""
        return compute_patch_trace(a, *self.geometry)

    def matching_trace(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Weigh each tap by how often it meets real pixels: taps at the border of a padded image less."""
        taps = weight.square().sum((0, 1))
        axes = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        for dim, (k, s, p, step) in enumerate(axes):
            size, out = a.shape[2 + dim], delta.shape[2 + dim]
            start = torch.arange(k, device=a.device)[:, None] * step - p
            where = start + s * torch.arange(out, device=a.device)
            counts = ((where >= 0) & (where < size)).sum(1).to(taps.dtype)
            taps = taps * counts.reshape([-1 if i == dim else 1 for i in range(len(self.kernel))])
        return taps.sum() / math.prod(a.shape[1:])


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """A transposed convolution, read as a plain one over its input spread out with zeros.

    The canonical weight (g · m, C/g, *kernel) is the weight (C, m, *kernel) with its taps flipped. The
    plain convolution has stride 1, dilation ``dilation`` and zeros ``dilation · (kernel - 1) - padding``
    around the spread input, more at the end by ``output_padding``.

    Attributes:
        spread: the stride of the transposed convolution.
        shrink: its padding.
        extra: its output padding.
    """

    spread: tuple[int, ...] = ()
    shrink: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    # by keyword: the pseudo-field of the base class would give it its place
    sends_below: bool = field(default=False, compare=False, kw_only=True)  # type: ignore[misc]
    kind: ClassVar[str] = "conv"

    @classmethod
    def of(
        cls,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        output_padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> "TransposedConvolution":
        """Return the map of a transposed convolution with these settings."""
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        return cls(kernel, ones, zeros, dilation, groups, stride, padding, output_padding)

    def _spread(self, a: Tensor) -> Tensor:
        """Return the input with zeros between its entries and around it."""
        sizes = [(size - 1) * s + 1 for size, s in zip(a.shape[2:], self.spread, strict=True)]
        wide = a.new_zeros(*a.shape[:2], *sizes)
        wide[(slice(None), slice(None), *(slice(None, None, s) for s in self.spread))] = a
        return F.pad(wide, self._find_sides())

    def _find_sides(self) -> list[int]:
        """Return the zeros around the spread input, as `F.pad` takes them."""
        around = []
        for k, d, p, e in zip(self.kernel, self.dilation, self.shrink, self.extra, strict=True):
            before = d * (k - 1) - p
            around.append((before, before + e))
        return [side for pair in reversed(around) for side in pair]

    def rows(self, a: Tensor) -> Tensor:
        """Return the patches of the spread input."""
        return super().rows(self._spread(a))

    def weight_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔᵀA`` over the spread input."""
        return super().weight_gradient(self._spread(a), delta, weight)

    def input_gradient(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute ``ΔW`` at the entries of the spread input that are the input's."""
        wide = super().input_gradient(self._spread(a), delta, weight)
        inner = F.pad(wide, [-side for side in self._find_sides()])
        return inner[(slice(None), slice(None), *(slice(None, None, s) for s in self.spread))]

    def apply(self, a: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of the spread input."""
        return super().apply(self._spread(a), weight)

    def gram(self, a: Tensor) -> Tensor:
        """Return the Gram of the patches of the spread input."""
        return super().gram(self._spread(a))

    def centred_gram(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Gram of the centred patches of the spread input.

        Zeros between the entries keep the mean so small that it can be subtracted from the product. Centred
        zeros would be equal numbers, and their squares would be rounded in the same direction.
        """
        wide = self._spread(a)
        if max(self.spread) == 1:
            return super().centred_gram(wide)
        axes = zip(wide.shape[2:], self.dilation, self.kernel, strict=True)
        rows = len(a) * math.prod(size - d * (k - 1) for size, d, k in axes)
        mean = super().sums(wide) / max(rows, 1)
        return super().gram(wide) - rows * compute_outer_product(mean, mean), mean

    def sums(self, a: Tensor) -> Tensor:
        """Return the sums of the patches of the spread input."""
        return super().sums(self._spread(a))

    def sample_positions(self, a: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        """Return a sample of the patches of the spread input."""
        return super().sample_positions(self._spread(a), every, turn)

    def square_norms(self, a: Tensor) -> Tensor:
        """Compute ``‖patch‖²`` of each position."""
        return super().square_norms(self._spread(a))

    def trace(self, a: Tensor) -> Tensor:
        """Compute ``‖patches‖²_F`` of each group."""
        return super().trace(self._spread(a))

    def matching_trace(self, a: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        """Compute it as if each input met each tap: those that the padding cuts off are counted, too."""
        return weight.square().sum() * self.groups / (a.shape[1])


def read_convolution_module(conv: Any) -> tuple[Convolution, Any]:
    """Return the map of a plain convolution module, and what pads its input before."""
    before_after = conv._reversed_padding_repeated_twice
    outside = conv.padding_mode != "zeros" or before_after[::2] != before_after[1::2]
    padding = (0,) * len(conv.kernel_size) if outside else tuple(reversed(before_after[::2]))
    map_ = Convolution(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, before_after, mode=mode) if outside else x

    return map_, pad
