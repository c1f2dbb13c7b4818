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

Everything is exact up to rounding, relative to the energy of the whole input. Frequencies are the odd
multiples of pi / period: on this grid none is its own conjugate, so a real input needs exactly half of
them, all with the same weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["patch_gram", "patch_rows", "patch_square_sums", "patch_sums", "patch_trace"]

_WORKSPACE = 2**20  # elements of one block of intermediate results, about what the cache holds
_MIN_BATCH = 64  # least images per block: the products run over them
# The cost of both ways, in operations of one large product; measured on a CPU.
_COPY = 60.0  # unfolding one element
_SMALL = 2.5  # an operation of a small product
_CALL = 2e3  # starting a small product
_TERM = 5e6  # starting one term: its tables and its small operations
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
    x = torch.unflatten(x, 1, (groups, x.shape[1] // groups))  # (batch, groups, channels, *positions, *taps)
    x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    return x.reshape(groups, math.prod(x.shape[1 : 2 + n]), math.prod(x.shape[2 + n :]))


def patch_gram(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the symmetric ``rows.mT @ rows`` of :func:`patch_rows`, unfolding only where that is cheaper.

    Correlating needs about as much extra memory as the input; unfolding is done in blocks of the batch.
    """
    channels = x.shape[1] // groups
    axes = [_Axis.of(*v) for v in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)]
    positions, d = math.prod(a.positions for a in axes), channels * math.prod(kernel_size)
    direct_cost = 2.0 * groups * x.shape[0] * positions * d * (d + _COPY)
    if _correlation_cost(x.shape[0], groups, channels, axes) < direct_cost:
        gram = _correlate(x, groups, axes)
    else:
        gram = x.new_zeros(groups, d, d)
        for part in torch.split(x, max(1, _WORKSPACE // max(1, groups * positions * d))):
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
    squares = torch.unflatten(x.square(), 1, (groups, x.shape[1] // groups)).sum(2)
    return _window_sums(squares, kernel_size, stride, padding, dilation).transpose(0, 1).flatten(1)


def patch_trace(
    x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1
) -> Tensor:
    """Compute the trace of :func:`patch_gram`, the squared norm of all rows: shape (groups,)."""
    squares = torch.unflatten(x.square().sum(0), 0, (groups, x.shape[1] // groups)).sum(1, keepdim=True)
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
    def choices(self) -> tuple[int, ...]:
        """Which windows the terms count along this axis."""
        return (_ALL, _BEFORE, _AFTER) if self.border else (_ALL,)

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


def _correlation_cost(batch: int, groups: int, channels: int, axes: Sequence[_Axis]) -> float:
    """Estimate :func:`_correlate` in operations of one large product; infinite where it does not apply."""
    if not batch or any(a.border > a.length or (a.stride > 1 and a.dilation > 1) for a in axes):
        return math.inf
    channels *= math.prod(a.phases for a in axes)
    batch *= math.prod(a.length for a in axes if a.kernel == 1)
    axes = [a for a in axes if a.kernel > 1]
    cost = 0.0
    for term in itertools.product(*(a.choices for a in axes)):
        opened = [a for a, windows in zip(axes, term, strict=True) if windows == _ALL]
        width = channels * math.prod(a.border for a, w in zip(axes, term, strict=True) if w != _ALL)
        lags, frequencies = math.prod(2 * a.kernel - 1 for a in opened), 0.5
        rest = batch * math.prod(a.length for a in opened)
        for a in opened:
            rest //= a.length
            cost += groups * width * frequencies * rest * 8 * a.period * a.length
            frequencies *= a.period
        cost += groups * frequencies * (width**2 * (6 * batch + 4 * lags + 20) + _CALL) + _TERM
    return _SMALL * cost if axes else 0.0  # without overlap, the input already is its own unfolding


def _correlate(x: Tensor, groups: int, axes: Sequence[_Axis]) -> Tensor:
    """Compute the Gram matrices as the sum of all terms, see the module's docstring."""
    n, channels, phases = len(axes), x.shape[1] // groups, [a.phases for a in axes]
    if any(a.stride > 1 for a in axes):
        filled = [a.stride * (a.length - 1) + a.phases - a.lead for a in axes]
        x = _pad(x, [a.lead for a in axes], [f - size for f, size in zip(filled, x.shape[2:], strict=True)])
    for axis, a in enumerate(axes, start=2):
        x = x.unfold(axis, a.phases, a.stride)  # (batch, channels, *lengths, *phases)
    # The batch goes last, for products over long contiguous lines; axes with one tap join it.
    wide = [a for a in axes if a.kernel > 1]
    dims = sorted(range(n), key=lambda i: axes[i].kernel == 1)
    x = x.permute(0, 1, *range(2 + n, 2 + 2 * n), *(2 + i for i in dims))
    image = x[:1].numel() * math.prod(a.period for a in wide) // math.prod(a.length for a in wide)
    rows, lengths = groups * channels * math.prod(phases), [a.length for a in wide]
    parts = [
        part.reshape(len(part), -1).t().contiguous().view(rows, *lengths, -1)  # torch is quick at .t()
        for part in x.chunk(math.ceil(len(x) / max(_MIN_BATCH, _WORKSPACE // image)))
    ]
    gram = _spread(parts, groups, wide, ())
    # (*kernel², groups, rows, columns) to (groups, d, d), with phases and taps of an axis interleaved.
    gram = gram.reshape(*(a.kernel for a in axes for _ in "ij"), groups, *2 * [channels, *phases])
    order = [2 * n]
    for side, channel in enumerate((2 * n + 1, 3 * n + 2)):
        order += [channel, *(dim for i in range(n) for dim in (2 * i + side, channel + 1 + i))]
    gram = gram.permute(order).reshape(groups, *2 * [channels, *(a.kernel * a.phases for a in axes)])
    for i, a in enumerate(axes):  # the last phases may have one tap less than the first
        gram = gram.narrow(2 + i, 0, a.taps).narrow(3 + n + i, 0, a.taps)
    d = channels * math.prod(a.taps for a in axes)
    return gram.reshape(groups, d, d)


def _spread(parts: Sequence[Tensor], groups: int, axes: Sequence[_Axis], term: tuple[int, ...]) -> Tensor:
    """Add up the terms that begin with ``term``, spreading the sums of every later axis to pairs of taps.

    Returns:
        Sums of shape (*sums of the axes in ``term``, *kernel² of the others, groups, width, width).
    """
    depth = len(term)
    if depth == len(axes):
        return _term(parts, groups, axes, term)
    axis = axes[depth]
    sums = torch.cat([_spread(parts, groups, axes, (*term, windows)) for windows in axis.choices], depth)
    taps = torch.cat([axis.spread(windows) for windows in axis.choices]).to(sums)
    spread: Tensor = torch.tensordot(taps, sums, ([0], [depth]))
    return spread.movedim(0, depth)


def _term(parts: Sequence[Tensor], groups: int, axes: Sequence[_Axis], term: Sequence[int]) -> Tensor:
    """Compute one term, of shape (*sums per axis, groups, width, width)."""
    opened = [i for i, windows in enumerate(term) if windows == _ALL]
    closed = [i for i, windows in enumerate(term) if windows != _ALL]
    lines = []
    for part in parts:
        for i in closed:
            border = axes[i].border
            part = part.narrow(1 + i, 0 if term[i] == _BEFORE else axes[i].length - border, border)
        lines.append(part.permute(0, *(1 + i for i in closed), *(1 + i for i in opened), -1))
    sums = _lag_sums(lines, groups, [axes[i] for i in opened])
    o, side = len(opened), [len(parts[0]) // groups, *(axes[i].border for i in closed)]
    sums = sums.reshape(*(2 * axes[i].kernel - 1 for i in opened), groups, *side, *side)
    first, second = o + 1, o + 1 + len(side)
    where = {i: [at] for at, i in enumerate(opened)}
    where |= {i: [first + at, second + at] for at, i in enumerate(closed, start=1)}
    sums = sums.permute(*(dim for i in range(len(axes)) for dim in where[i]), o, first, second)
    sizes = [a.border**2 if i in closed else 2 * a.kernel - 1 for i, a in enumerate(axes)]
    return sums.reshape(*sizes, groups, side[0], side[0])


def _lag_sums(parts: Sequence[Tensor], groups: int, axes: Sequence[_Axis]) -> Tensor:
    """Sum a[t] * b[t + lag] over all t and the batch, for all pairs of rows (a, b) of a group.

    Args:
        parts: Blocks of the batch, of shape (*rows, *lengths, block).
        groups: Groups of rows.
        axes: The axes to correlate.

    Returns:
        Sums of shape (lags, groups, width, width).
    """
    sample, rows = parts[0], parts[0].shape[: parts[0].dim() - 1 - len(axes)].numel()
    width = rows // groups
    if not axes:
        flat = (part.reshape(groups, width, -1) for part in parts)
        return reduce(torch.add, (part @ part.mT for part in flat))[None]
    first, *others = axes
    parts = [part.reshape(rows, first.length, -1) for part in parts]
    other_angles = [a.angles(a.period) for a in others]
    other_waves = [a.waves(angles).to(sample) for a, angles in zip(others, other_angles, strict=True)]
    total = sample.new_zeros(math.prod(2 * a.kernel - 1 for a in axes), groups * width * width)
    # A few frequencies at a time bound the memory. The input is real: half those of the first axis do.
    rest, room = math.prod(a.period for a in others), max(4 * _WORKSPACE, sum(map(torch.numel, parts)))
    step = max(1, room // (2 * rest * rows * (width + sample.shape[-1])))
    for angles in torch.split(first.angles(first.period // 2), step):
        stages = [first.waves(angles)[:, : first.length].to(sample), *other_waves]
        even = sample.new_zeros(len(angles) * rest * groups, width, width)
        odd = torch.zeros_like(even)
        for z in parts:
            inner = z.shape[-1]
            for stage, a in zip(stages, [*others, None], strict=True):
                z = stage @ z.reshape(-1, stage.shape[1], inner)
                inner = inner // a.length if a else inner
            z = z.view(groups, width, -1, 2 * inner).permute(2, 0, 1, 3).flatten(0, 1)
            even.baddbmm_(z, z.mT)  # re reᵀ + im imᵀ
            odd.baddbmm_(z[..., :inner], z[..., inner:].mT)
        waves = 2 * first.lag_waves(angles)
        for a, other in zip(others, other_angles, strict=True):
            waves = (waves[:, None, :, None] * a.lag_waves(other)[:, None]).flatten(2).flatten(0, 1)
        total.addmm_(waves.real.T.to(sample), even.view(len(waves), -1))
        total.addmm_(waves.imag.T.to(sample), (odd - odd.mT).view(len(waves), -1))
    return total
