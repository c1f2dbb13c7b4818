"""Gram matrices, sums and norms of the patches of a convolution, without unfolding its input.

A convolution is a linear layer whose rows are the patches of its input, ``P``. The least-squares rules
need ``PᵀP``, and multiplying the unfolded patches costs several times the layer's own forward and
backward pass. Two facts make it cheap:

* Were a window placed at *every* offset, also the ones that only partly overlap the input, an entry of
  ``PᵀP`` would depend on the two taps only through their distance: it is a correlation of two channels,
  which a discrete Fourier transform turns into one small product per frequency.
* The windows that the convolution does not have lie before the first or after the last one of an axis,
  and see only a few border lines. Along such an axis the border lines become channels, and the other
  axes are treated as before. So per axis: all windows, minus those before, minus those after; for
  several axes, the product of these three terms.

Everything is exact up to rounding. Frequencies are the odd multiples of pi / period: on this grid no
frequency is its own conjugate, so a real input needs exactly half of them, all with the same weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["patch_gram", "patch_rows", "patch_square_sums", "patch_sums", "patch_trace"]

_WORKSPACE = 2**20  # elements of one block of intermediate results, small enough to stay in the cache
_MIN_BATCH = 64  # least images per block, so that products are long enough
_SLOWDOWN = 2.5  # cost of an operation in small products, relative to one in the large product of all rows
_CALL = 20_000.0  # cost of starting one small product, in operations
_COPY = 20.0  # cost of unfolding one element, in columns of the product
_ALL, _BEFORE, _AFTER = range(3)  # which windows of an axis a term counts

Sizes = Sequence[int]


def patch_rows(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Unfold the patches of a 1-d, 2-d or 3-d convolution: the definition that the others agree with.

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
    x = _pad(x, padding, padding)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, x.shape[1] // groups))  # (batch, groups, channels, *positions, *taps)
    x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    return x.reshape(groups, math.prod(x.shape[1 : 2 + n]), math.prod(x.shape[2 + n :]))


def patch_gram(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute ``rows.mT @ rows`` of :func:`patch_rows` by the cheaper of unfolding and correlating.

    Correlating needs about as much extra memory as the input; unfolding is done in blocks of the batch.

    Args:
        x: Input of shape (batch, channels, *spatial).
        kernel_size: Taps per spatial axis.
        stride: Stride per spatial axis.
        padding: Zeros on both sides of each spatial axis.
        dilation: Dilation per spatial axis.
        groups: Groups of channels.

    Returns:
        Symmetric matrices of shape (groups, d, d) with d = channels / groups * taps.
    """
    channels = x.shape[1] // groups
    axes = [_Axis.of(*v) for v in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)]
    positions, d = math.prod(a.positions for a in axes), channels * math.prod(kernel_size)
    direct_cost = 2.0 * groups * x.shape[0] * positions * d * (d + _COPY)
    if _correlation_cost(x.shape[0], groups, channels, axes) < direct_cost:
        gram = _correlate(x, groups, axes)
    else:
        gram = x.new_zeros(groups, d, d)
        for part in x.split(max(1, _WORKSPACE // max(1, groups * positions * d))):
            rows = patch_rows(part, kernel_size, stride, padding, dilation, groups)
            gram += rows.mT @ rows
    return (gram + gram.mT).div_(2)


def patch_sums(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Sum :func:`patch_rows` over the rows: shape (groups, channels / groups * taps)."""
    return patch_rows(x.sum(0, keepdim=True), kernel_size, stride, padding, dilation, groups).sum(1)


def patch_square_sums(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the squared norm of every row of :func:`patch_rows`: shape (groups, batch * positions)."""
    squares = x.square().unflatten(1, (groups, -1)).sum(2)
    return _window_sums(squares, kernel_size, stride, padding, dilation).transpose(0, 1).flatten(1)


def patch_trace(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the trace of :func:`patch_gram`, the squared norm of all rows: shape (groups,)."""
    squares = x.square().sum(0).unflatten(0, (groups, -1)).sum(1, keepdim=True)
    return _window_sums(squares, kernel_size, stride, padding, dilation).flatten(1).sum(1)


def _pad(x: Tensor, before: Sizes, after: Sizes) -> Tensor:
    """Pad the last axes with zeros, or crop them where a size is negative."""
    return pad(x, [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair])


def _window_sums(x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Sum every window of (a, b, *spatial), one axis after another."""
    x = _pad(x, padding, padding)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        span = x.shape[axis] - d * (k - 1)
        taps = (x.narrow(axis, d * tap, span) for tap in range(k))
        x = reduce(torch.add, taps)[(slice(None),) * axis + (slice(None, None, s),)]
    return x


@dataclass(frozen=True)
class _Axis:
    """A spatial axis at stride 1: the lines of a strided one are dealt to ``phases`` extra channels.

    Attributes:
        length: Lines of the input, per phase.
        kernel: Taps, per phase.
        padding: Zeros on either side, never materialised.
        dilation: Distance of two taps.
        positions: Windows of the convolution.
        taps: Taps before the reduction to stride 1.
        stride: Stride before the reduction.
        phases: How many of the ``stride`` interleaved phases any tap reads.
        lead: Zeros to put before the first line for the reduction.
    """

    length: int
    kernel: int
    padding: int
    dilation: int
    positions: int
    taps: int
    stride: int = 1
    phases: int = 1
    lead: int = 0

    @classmethod
    def of(cls, length: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
        """Describe one axis of a convolution."""
        positions = (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if stride == 1:
            return cls(length, kernel, padding, dilation, positions, kernel)
        per_phase, phases = -(-kernel // stride), min(kernel, stride)
        return cls(
            positions - 1 + per_phase, per_phase, 0, dilation, positions, kernel, stride, phases, padding
        )

    @property
    def reach(self) -> int:
        """Lines between the first and the last tap of a window."""
        return self.dilation * (self.kernel - 1)

    @property
    def border(self) -> int:
        """Lines at either end that windows before the first, or after the last one, see."""
        return max(0, self.reach - self.padding)

    @property
    def period(self) -> int:
        """Period at which no two lines within reach of each other wrap around; even, to be halved."""
        return (self.length + self.reach + 1) // 2 * 2

    @property
    def filled(self) -> int:
        """Length that the input needs before it is dealt to phases."""
        return self.stride * (self.length - 1) + self.phases

    def angles(self, count: int) -> Tensor:
        """Return the first ``count`` frequencies, as angles per line."""
        return (2 * torch.arange(count, dtype=torch.float64) + 1) * (math.pi / self.period)

    def waves(self, angles: Tensor) -> Tensor:
        """Return the matrix (2 * frequencies, 2 * length) of the complex Fourier transform in real parts."""
        phase = angles[:, None] * torch.arange(self.length)
        c, s = phase.cos(), phase.sin()
        return torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1).flatten(2).flatten(0, 1)

    def lag_waves(self, angles: Tensor) -> Tensor:
        """Return the inverse transform (frequencies, lags), scaled for all ``period`` frequencies."""
        lag = angles[:, None] * (self.dilation * torch.arange(1 - self.kernel, self.kernel))
        return torch.polar(torch.full_like(lag, 1 / self.period), lag)

    def spread(self, windows: int) -> Tensor:
        """Return the matrix (sums, kernel * kernel) that puts sums where two taps need them.

        The sums are those of the lags for all windows; for the windows beyond one end, those of the pairs
        of border lines (r, q) that taps (i, j) of one window hit, counted negatively.
        """
        i, j = torch.meshgrid(torch.arange(self.kernel), torch.arange(self.kernel), indexing="ij")
        if windows == _ALL:
            lags = torch.arange(1 - self.kernel, self.kernel)
            return (lags[:, None, None] == j - i).flatten(1).double()
        line = torch.arange(self.border)
        r, q = line[:, None, None, None], line[:, None, None]
        i, j = self.dilation * i, self.dilation * j
        beyond = i - r > self.padding if windows == _BEFORE else r >= i
        return -((i - r == j - q) & beyond).reshape(self.border**2, self.kernel**2).double()


def _terms(axes: Sequence[_Axis]) -> Iterator[tuple[int, ...]]:
    """Enumerate which windows to count along each axis."""
    return itertools.product(*((_ALL, _BEFORE, _AFTER) if axis.border else (_ALL,) for axis in axes))


def _correlation_cost(batch: int, groups: int, channels: int, axes: Sequence[_Axis]) -> float:
    """Estimate :func:`_correlate` in operations of a large matrix product; infinite where it cannot work."""
    if not batch or any(a.border > a.length or (a.stride > 1 and a.dilation > 1) for a in axes):
        return math.inf
    channels *= math.prod(a.phases for a in axes)
    batch *= math.prod(a.length for a in axes if a.kernel == 1)
    axes = [a for a in axes if a.kernel > 1]
    cost = 0.0
    for term in _terms(axes):
        opened = [a for a, windows in zip(axes, term, strict=True) if windows == _ALL]
        width = channels * math.prod(
            a.border for a, windows in zip(axes, term, strict=True) if windows != _ALL
        )
        frequencies, rest = 0.5, batch * math.prod(a.length for a in opened)
        for a in opened:
            rest //= a.length
            cost += groups * width * frequencies * rest * 8 * a.period * a.length
            frequencies *= a.period
        lags = math.prod(2 * a.kernel - 1 for a in opened)
        cost += groups * frequencies * (width**2 * (6 * batch + 4 * lags) + _CALL)
    return _SLOWDOWN * cost


def _correlate(x: Tensor, groups: int, axes: Sequence[_Axis]) -> Tensor:
    """Compute the Gram matrices as the sum of all terms, see the module's docstring."""
    n, channels, phases = len(axes), x.shape[1] // groups, [a.phases for a in axes]
    if any(a.stride > 1 for a in axes):
        surplus = [a.filled - a.lead - size for a, size in zip(axes, x.shape[2:], strict=True)]
        x = _pad(x, [a.lead for a in axes], surplus)
    for axis, a in enumerate(axes, start=2):
        x = x.unfold(axis, a.phases, a.stride)  # (batch, channels, *lengths, *phases)
    # The batch last: all products then run over long contiguous lines. Axes with one tap join the batch.
    wide = [i for i, a in enumerate(axes) if a.kernel > 1]
    order = (
        1,
        *range(2 + n, 2 + 2 * n),
        *(2 + i for i in wide),
        *(2 + i for i in range(n) if i not in wide),
        0,
    )
    wide_axes = [axes[i] for i in wide]
    lengths = [a.length for a in wide_axes]
    image = x[:1].numel() // math.prod(lengths) * math.prod(a.period for a in wide_axes)
    blocks = math.ceil(x.shape[0] / max(_MIN_BATCH, _WORKSPACE // image))
    width = channels * math.prod(phases)
    parts = [p.permute(order).reshape(groups * width, *lengths, -1) for p in x.chunk(blocks)]
    gram = reduce(torch.add, (_term(parts, groups, wide_axes, term) for term in _terms(wide_axes)))
    # (groups, width, width, kernel², ...) to one block of taps = (kernel, phase) per axis, on both sides
    kernels = [k for a in axes for k in (a.kernel, a.kernel)]
    gram = gram.reshape(groups, channels, *phases, channels, *phases, *kernels)
    order = [0]
    for channel, kernel in ((1, 3 + 2 * n), (2 + n, 4 + 2 * n)):  # where the dims of either side start
        order += [channel, *(dim for i in range(n) for dim in (kernel + 2 * i, channel + 1 + i))]
    gram = gram.permute(order)
    block = [channels, *(a.kernel * a.phases for a in axes)]
    gram = gram.reshape(groups, *block, *block)
    for i, a in enumerate(axes):
        gram = gram.narrow(2 + i, 0, a.taps).narrow(3 + n + i, 0, a.taps)
    d = channels * math.prod(a.taps for a in axes)
    return gram.reshape(groups, d, d)


def _term(parts: Sequence[Tensor], groups: int, axes: Sequence[_Axis], term: Sequence[int]) -> Tensor:
    """Compute one term of the Gram matrices: (groups, channels, channels, kernel² of each axis)."""
    opened = [i for i, windows in enumerate(term) if windows == _ALL]
    closed = [i for i, windows in enumerate(term) if windows != _ALL]
    lines = []
    for part in parts:
        for i in closed:
            border = axes[i].border
            part = part.narrow(1 + i, 0 if term[i] == _BEFORE else axes[i].length - border, border)
        lines.append(part.permute(0, *(1 + i for i in closed), *(1 + i for i in opened), 1 + len(axes)))
    sums = _lag_sums(lines, groups, [axes[i] for i in opened])
    # (*lags, groups, channels, *border, channels, *border) to (groups, channels, channels, *sums per axis)
    borders = [axes[i].border for i in closed]
    channels = parts[0].shape[0] // groups
    lags = [2 * axes[i].kernel - 1 for i in opened]
    sums = sums.reshape(*lags, groups, channels, *borders, channels, *borders)
    o, c = len(opened), len(closed)
    where = {i: [at] for at, i in enumerate(opened)}
    where |= {i: [o + 2 + at, o + 3 + c + at] for at, i in enumerate(closed)}
    sums = sums.permute(o, o + 1, o + 2 + c, *(at for i in range(len(axes)) for at in where[i]))
    sizes = [
        2 * a.kernel - 1 if windows == _ALL else a.border**2 for a, windows in zip(axes, term, strict=True)
    ]
    sums = sums.reshape(groups, channels, channels, *sizes)
    for a, windows in zip(axes, term, strict=True):
        sums = torch.tensordot(sums, a.spread(windows).to(sums), ([3], [0]))
    return sums


def _lag_sums(parts: Sequence[Tensor], groups: int, axes: Sequence[_Axis]) -> Tensor:
    """Correlate all pairs of rows within reach of the kernel, summed over the last axis.

    Args:
        parts: Blocks of the batch, of shape (groups * width, ..., *lengths, block).
        groups: Groups of rows.
        axes: The axes to correlate.

    Returns:
        Sums of shape (lags, groups, width, width): of a[t] * b[t + lag] over all t.
    """
    rows = parts[0].shape[: parts[0].dim() - 1 - len(axes)].numel()
    if not axes:
        flat = (part.reshape(groups, rows // groups, -1) for part in parts)
        return reduce(torch.add, (part @ part.mT for part in flat))[None]
    first, *others = axes
    sample, width, rest = parts[0], rows // groups, math.prod(a.period for a in others)
    other_angles = [a.angles(a.period) for a in others]
    other_waves = [a.waves(angles).to(sample) for a, angles in zip(others, other_angles, strict=True)]
    total = sample.new_zeros(math.prod(2 * a.kernel - 1 for a in axes), groups * width * width)
    # A few frequencies at a time bound the memory, whatever the number of channels. The input is real, so
    # half the frequencies of the first axis do.
    block = max(1, _WORKSPACE // (2 * rest * rows * (width + sample.shape[-1])))
    for angles in first.angles(first.period // 2).split(block):
        stages = [first.waves(angles)[:, : first.length].to(sample), *other_waves]
        even = sample.new_zeros(len(angles) * rest * groups, width, width)
        odd = torch.zeros_like(even)
        for part in parts:
            z, batch = part, part.shape[-1]
            for stage, axis in zip(stages, range(1, 1 + len(axes)), strict=True):
                inner = math.prod(a.length for a in axes[axis:]) * batch
                z = stage @ z.reshape(-1, stage.shape[1], inner)
            z = z.view(groups, width, -1, 2 * batch).permute(2, 0, 1, 3).flatten(0, 1)
            re, im = z[..., :batch], z[..., batch:]
            even.baddbmm_(z, z.mT)  # re reᵀ + im imᵀ
            odd.baddbmm_(re, im.mT)
        odd = odd - odd.mT
        lag_waves = 2 * first.lag_waves(angles)
        for a, other in zip(others, other_angles, strict=True):
            lag_waves = (lag_waves[:, None, :, None] * a.lag_waves(other)[:, None]).flatten(2).flatten(0, 1)
        total.addmm_(lag_waves.real.T.to(sample), even.view(len(lag_waves), -1))
        total.addmm_(lag_waves.imag.T.to(sample), odd.view(len(lag_waves), -1))
    return total
