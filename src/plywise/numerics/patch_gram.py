"""Gram matrices, sums and norms of the patches of a convolution, without unfolding its input.

A convolution is a linear layer whose rows are the patches of its input, ``P``. The least-squares rules need
``PᵀP``, and to multiply the unfolded patches costs several times the layer's own forward and backward pass.
`plywise.numerics.patch_correlation` computes it by correlation. Where that is not cheaper, the patches are
unfolded in blocks.

Everything is exact up to rounding, relative to the energy of the whole input. `compute_centred_patch_gram`
subtracts the mean before it multiplies, so an offset of the input costs no digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from plywise.numerics import patch_correlation
from plywise.numerics.patch_correlation import Axis, pad_or_crop
from plywise.numerics.products import compute_outer_product

__all__ = [
    "compute_centred_patch_gram",
    "compute_patch_gram",
    "compute_patch_trace",
    "find_channel_means",
    "sum_patch_squares",
    "sum_patches",
    "unfold_patches",
]

_COPY = 60.0  # the cost of unfolding one element, in operations of one large product; measured on a CPU

Sizes = Sequence[int]

Geometry = tuple[Sizes, Sizes, Sizes, Sizes, int]
"""Kernel size, stride, padding, dilation and groups."""


def unfold_patches(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Unfold the patches of a 1-d, 2-d or 3-d convolution. This defines what the other functions compute.

    Args:
        x: Input of shape (batch, channels, *spatial).
        kernel_size: Taps per spatial axis.
        stride: Stride per spatial axis.
        padding: Zeros on both sides of each spatial axis.
        dilation: Dilation per spatial axis.
        groups: Groups of channels.

    Returns:
        Rows of shape (groups, batch * positions, channels / groups * taps). Rows run over the batch, then
        over the positions in row-major order; columns are ordered like ``weight.flatten(1)``.
    """
    n = len(kernel_size)
    x = pad_or_crop(x, padding, padding)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    x = torch.unflatten(x, 1, (groups, x.shape[1] // groups))  # (batch, groups, channels, *positions, *taps)
    x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    return x.reshape(groups, math.prod(x.shape[1 : 2 + n]), math.prod(x.shape[2 + n :]))


def compute_patch_gram(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the symmetric ``rows.mT @ rows`` of `unfold_patches`, and unfold only where that is cheaper.

    Correlating needs about as much extra memory as the input; unfolding is done in blocks of the batch.
    """
    channels = x.shape[1] // groups
    axes = [Axis.of(*v) for v in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)]
    if _prefers_correlation(x, axes, groups):
        gram = patch_correlation.correlate(x, groups, axes)
    else:
        d = channels * math.prod(kernel_size)
        gram = x.new_zeros(groups, d, d)
        for part in _split_batch(x, axes, d, groups):
            rows = unfold_patches(part, kernel_size, stride, padding, dilation, groups)
            gram += rows.mT @ rows
    return (gram + gram.mT).div_(2)


def compute_centred_patch_gram(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute the Gram of the rows of `unfold_patches` minus their mean row, and the mean row.

    The mean is subtracted before the product, so the Gram is not a small difference of large numbers. The
    zeros of the padding are part of the rows, and the mean counts them.

    Args:
        x: Input of shape (batch, channels, *spatial).
        kernel_size: Taps per spatial axis.
        stride: Stride per spatial axis.
        padding: Zeros on both sides of each spatial axis.
        dilation: Dilation per spatial axis.
        groups: Groups of channels.

    Returns:
        The symmetric Gram (groups, d, d), and the mean row (groups, d), with d = channels / groups * taps.
    """
    geometry = kernel_size, stride, padding, dilation, groups
    axes = [Axis.of(*v) for v in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)]
    count = max(1, x.shape[0] * math.prod(a.positions for a in axes))
    if not _prefers_correlation(x, axes, groups):
        parts = _split_batch(x, axes, x.shape[1] // groups * math.prod(kernel_size), groups)
        return _centre_unfolded(parts, sum_patches(x, *geometry) / count, count, geometry)
    means = find_channel_means(x, *geometry)
    y = x - means.reshape(1, -1, *[1] * len(kernel_size))
    rest = sum_patches(y, *geometry) / count
    gram = compute_patch_gram(y, *geometry) - count * compute_outer_product(rest, rest)
    means = means.view(groups, -1)
    inside = _find_inside(x, kernel_size, stride, padding, dilation)
    share = inside.mean(0)
    if any(padding):
        gram += _correct_padding(y, means, inside - share, geometry)
    return gram, rest + (means.unsqueeze(2) * share).flatten(1)


def find_channel_means(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the mean of each channel over all entries of its patches, without the zeros of the padding.

    `compute_centred_patch_gram` subtracts it from the input. Subtract it too where the patches are multiplied
    with something else whose columns sum to zero, to keep the digits that an offset of the input would cost.

    Args:
        x: Input of shape (batch, channels, *spatial).
        kernel_size: Taps per spatial axis.
        stride: Stride per spatial axis.
        padding: Zeros on both sides of each spatial axis.
        dilation: Dilation per spatial axis.
        groups: Groups of channels.

    Returns:
        Means of shape (channels,).
    """
    sums = sum_patches(x, kernel_size, stride, padding, dilation, groups)
    entries = x.shape[0] * _find_inside(x, kernel_size, stride, padding, dilation).sum()
    return sums.reshape(x.shape[1], -1).sum(1) / entries.clamp_min(1)


def sum_patches(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Sum `unfold_patches` over the rows: shape (groups, channels / groups * taps)."""
    return unfold_patches(x.sum(0, keepdim=True), kernel_size, stride, padding, dilation, groups).sum(1)


def sum_patch_squares(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the squared norm of every row of `unfold_patches`: shape (groups, batch * positions)."""
    squares = torch.unflatten(x.square(), 1, (groups, x.shape[1] // groups)).sum(2)
    return _sum_windows(squares, kernel_size, stride, padding, dilation).transpose(0, 1).flatten(1)


def compute_patch_trace(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the trace of `compute_patch_gram`, the squared norm of all rows: shape (groups,)."""
    squares = torch.unflatten(x.square().sum(0), 0, (groups, x.shape[1] // groups)).sum(1, keepdim=True)
    return _sum_windows(squares, kernel_size, stride, padding, dilation).flatten(1).sum(1)


def _prefers_correlation(x: Tensor, axes: Sequence[Axis], groups: int) -> bool:
    """Tell whether correlating costs less than unfolding."""
    channels = x.shape[1] // groups
    positions, d = math.prod(a.positions for a in axes), channels * math.prod(a.taps for a in axes)
    direct_cost = 2.0 * groups * x.shape[0] * positions * d * (d + _COPY)
    return patch_correlation.estimate_cost(x.shape[0], groups, channels, axes) < direct_cost


def _split_batch(x: Tensor, axes: Sequence[Axis], d: int, groups: int) -> Sequence[Tensor]:
    """Split the batch into parts whose unfolded patches fit into the cache."""
    size = groups * math.prod(a.positions for a in axes) * d
    parts: Sequence[Tensor] = torch.split(x, max(1, patch_correlation.WORKSPACE // max(1, size)))
    return parts


def _centre_unfolded(
    parts: Sequence[Tensor], mean: Tensor, count: int, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Compute the centred Gram by unfolding, given the number of rows and their mean up to rounding."""
    gram = mean.new_zeros(*mean.shape, mean.shape[1])
    rest = torch.zeros_like(mean)
    for part in parts:
        rows = unfold_patches(part, *geometry) - mean.unsqueeze(1)
        gram += rows.mT @ rows
        rest += rows.sum(1)
    rest /= count
    gram -= count * compute_outer_product(rest, rest)
    return (gram + gram.mT).div_(2), mean + rest


def _find_inside(x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Find which taps of a window lie inside the input: 1 or 0, of shape (positions, taps)."""
    return unfold_patches(x.new_ones(1, 1, *x.shape[2:]), kernel_size, stride, padding, dilation)[0]


def _correct_padding(y: Tensor, means: Tensor, inside: Tensor, geometry: Geometry) -> Tensor:
    """Compute what the Gram of the centred patches lacks if ``y = x - means`` is padded with zeros.

    The padding of x is zero, which is ``-means`` of y. So a row of x is a row of y, plus the means where its
    tap lies inside. Taps that are always inside get no correction.

    Args:
        y: the input minus the means of its channels.
        means: the means, (groups, channels).
        inside: which taps are inside, minus the mean of that, (positions, taps).
        geometry: the arguments of `unfold_patches`.

    Returns:
        The correction, (groups, d, d).
    """
    rows = unfold_patches(y.sum(0, keepdim=True), *geometry)  # (groups, positions, d)
    cross = rows.mT @ inside  # (groups, d, taps)
    mixed = torch.einsum("git,gc->gict", cross, means).flatten(2)
    both = y.shape[0] * torch.einsum("gb,gc,st->gbsct", means, means, inside.mT @ inside)
    return mixed + mixed.mT + both.flatten(3).flatten(1, 2)


def _sum_windows(x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Sum every window of (a, b, *spatial), one axis after another."""
    x = pad_or_crop(x, padding, padding)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        span = x.shape[axis] - d * (k - 1)
        taps = (x.narrow(axis, d * tap, span) for tap in range(k))
        x = reduce(torch.add, taps)[(slice(None),) * axis + (slice(None, None, s),)]
    return x
