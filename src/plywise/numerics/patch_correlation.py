"""The Gram matrix of the patches of a convolution by correlation, without unfolding the input.

Two facts make it cheap:

* If there were a window at *every* offset, also the windows that only partly overlap the input, an entry of
  ``PᵀP`` would depend on the two taps only through their distance. It would be a correlation of two channels,
  and a discrete Fourier transform turns a correlation into one small product per frequency.
* The windows that the convolution does not have lie before the first or after the last window of an axis, and
  they cover only a few border lines. Along such an axis the border lines become channels, and the other axes
  are treated as before. So there are three terms for each axis: all windows, minus the windows before, minus
  the windows after. For several axes, it is the product of these terms.

Everything is exact up to rounding, relative to the energy of the whole input. The frequencies are the odd
multiples of pi / period. No frequency of this grid is its own conjugate, so a real input needs exactly half
of them, all with the same weight.
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

Sizes = Sequence[int]

WORKSPACE = 2**20
"""Elements of one block of intermediate results, about what the cache holds."""

_MIN_BATCH = 64  # least images per block: the products run over them
# The cost of the correlation, in operations of one large product; measured on a CPU.
_SMALL = 2.5  # an operation of a small product
_CALL = 2e3  # starting a small product
_TERM = 5e6  # starting one term: its tables and its small operations
_ALL, _BEFORE, _AFTER = range(3)  # which windows of an axis a term counts


def pad_or_crop(x: Tensor, before: Sizes, after: Sizes) -> Tensor:
    """Pad the last axes with zeros, or crop them where a size is negative."""
    return pad(x, [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair])


@dataclass(frozen=True)
class Axis:
    """A spatial axis at stride 1. The lines of a strided axis are distributed over ``phases`` extra channels.

    Attributes:
        length: Lines of the input, per phase.
        kernel: Taps, per phase.
        padding: Zeros on either side. They are never stored.
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
    def of(cls, length: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
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
        """Lines at either end that are covered by windows before the first one, or after the last one."""
        return max(0, self.reach - self.padding)

    @property
    def period(self) -> int:
        """Even period at which no two lines within reach of each other wrap around."""
        return (self.length + self.reach + 1) // 2 * 2

    @property
    def choices(self) -> tuple[int, ...]:
        """Which windows the terms count along this axis."""
        return (_ALL, _BEFORE, _AFTER) if self.border else (_ALL,)

    def make_angles(self, count: int) -> Tensor:
        """Return the first ``count`` frequencies, as angles per line."""
        return (2 * torch.arange(count, dtype=torch.float64, device="cpu") + 1) * (math.pi / self.period)

    def make_waves(self, angles: Tensor) -> Tensor:
        """Return the complex Fourier transform as a real matrix (2 * frequencies, 2 * length)."""
        phase = angles[:, None] * torch.arange(self.length, device="cpu")
        c, s = phase.cos(), phase.sin()
        return torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1).flatten(2).flatten(0, 1)

    def make_lag_waves(self, angles: Tensor) -> Tensor:
        """Return the inverse transform (frequencies, lags), scaled for all ``period`` frequencies."""
        lag = angles[:, None] * (self.dilation * self._make_lags())
        return torch.polar(torch.full_like(lag, 1 / self.period), lag)

    def _make_lags(self) -> Tensor:
        return torch.arange(1 - self.kernel, self.kernel, device="cpu")

    def spread(self, windows: int) -> Tensor:
        """Return the matrix (sums, kernel * kernel) that adds sums to the pairs of taps that need them.

        For all windows, there is one sum for each lag. For the windows beyond one end, there is one sum for
        each pair of border lines (r, q) that the taps (i, j) of one window read, counted negatively.
        """
        taps = torch.arange(self.kernel, device="cpu")
        i, j = torch.meshgrid(taps, taps, indexing="ij")
        if windows == _ALL:
            lags = self._make_lags()
            return (lags[:, None, None] == j - i).flatten(1).double()
        line = torch.arange(self.border, device="cpu")
        r, q = line[:, None, None, None], line[:, None, None]
        i, j = self.dilation * i, self.dilation * j
        beyond = i - r > self.padding if windows == _BEFORE else r >= i
        return -((i - r == j - q) & beyond).reshape(self.border**2, self.kernel**2).double()


def estimate_cost(batch: int, groups: int, channels: int, axes: Sequence[Axis]) -> float:
    """Estimate the cost of `correlate` in operations of one large product.

    It is infinite where `correlate` does not apply.
    """
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


def correlate(x: Tensor, groups: int, axes: Sequence[Axis]) -> Tensor:
    """Compute the Gram matrices (groups, d, d) as the sum of all terms; see the module's docstring."""
    n, channels, phases = len(axes), x.shape[1] // groups, [a.phases for a in axes]
    if any(a.stride > 1 for a in axes):
        filled = [a.stride * (a.length - 1) + a.phases - a.lead for a in axes]
        x = pad_or_crop(
            x, [a.lead for a in axes], [f - size for f, size in zip(filled, x.shape[2:], strict=True)]
        )
    for axis, a in enumerate(axes, start=2):
        x = x.unfold(axis, a.phases, a.stride)  # (batch, channels, *lengths, *phases)
    # The batch is the last axis, for products over long contiguous lines. Axes with one tap join it.
    wide = [a for a in axes if a.kernel > 1]
    dims = sorted(range(n), key=lambda i: axes[i].kernel == 1)
    x = x.permute(0, 1, *range(2 + n, 2 + 2 * n), *(2 + i for i in dims))
    image = x[:1].numel() * math.prod(a.period for a in wide) // math.prod(a.length for a in wide)
    rows, lengths = groups * channels * math.prod(phases), [a.length for a in wide]
    parts = [
        part.reshape(len(part), -1).t().contiguous().view(rows, *lengths, -1)  # torch is quick at .t()
        for part in x.chunk(math.ceil(len(x) / max(_MIN_BATCH, WORKSPACE // image)))
    ]
    gram = _add_terms(parts, groups, wide, ())
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


def _add_terms(parts: Sequence[Tensor], groups: int, axes: Sequence[Axis], term: tuple[int, ...]) -> Tensor:
    """Add up the terms that begin with ``term``, and the sums of every later axis to its pairs of taps.

    Returns:
        Sums of shape (*sums of the axes in ``term``, *kernel² of the others, groups, width, width).
    """
    depth = len(term)
    if depth == len(axes):
        return _compute_term(parts, groups, axes, term)
    axis = axes[depth]
    sums = torch.cat([_add_terms(parts, groups, axes, (*term, windows)) for windows in axis.choices], depth)
    taps = torch.cat([axis.spread(windows) for windows in axis.choices]).to(sums)
    spread: Tensor = torch.tensordot(taps, sums, ([0], [depth]))
    return spread.movedim(0, depth)


def _compute_term(parts: Sequence[Tensor], groups: int, axes: Sequence[Axis], term: Sequence[int]) -> Tensor:
    """Compute one term, of shape (*sums of each axis, groups, width, width)."""
    opened = [i for i, windows in enumerate(term) if windows == _ALL]
    closed = [i for i, windows in enumerate(term) if windows != _ALL]
    lines = []
    for part in parts:
        for i in closed:
            border = axes[i].border
            part = part.narrow(1 + i, 0 if term[i] == _BEFORE else axes[i].length - border, border)
        lines.append(part.permute(0, *(1 + i for i in closed), *(1 + i for i in opened), -1))
    sums = _sum_lags(lines, groups, [axes[i] for i in opened])
    o, side = len(opened), [len(parts[0]) // groups, *(axes[i].border for i in closed)]
    sums = sums.reshape(*(2 * axes[i].kernel - 1 for i in opened), groups, *side, *side)
    first, second = o + 1, o + 1 + len(side)
    where = {i: [at] for at, i in enumerate(opened)}
    where |= {i: [first + at, second + at] for at, i in enumerate(closed, start=1)}
    sums = sums.permute(*(dim for i in range(len(axes)) for dim in where[i]), o, first, second)
    sizes = [a.border**2 if i in closed else 2 * a.kernel - 1 for i, a in enumerate(axes)]
    return sums.reshape(*sizes, groups, side[0], side[0])


def _sum_lags(parts: Sequence[Tensor], groups: int, axes: Sequence[Axis]) -> Tensor:
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
    other_angles = [a.make_angles(a.period) for a in others]
    total = sample.new_zeros(math.prod(2 * a.kernel - 1 for a in axes), groups * width * width)
    # A few frequencies at a time bound the memory. The input is real: half those of the first axis do.
    rest, room = math.prod(a.period for a in others), max(4 * WORKSPACE, sum(map(torch.numel, parts)))
    step = max(1, room // (2 * rest * rows * (width + sample.shape[-1])))
    for angles in torch.split(first.make_angles(first.period // 2), step):
        even, odd = _multiply_spectra(parts, groups, axes, [angles, *other_angles])
        waves = 2 * first.make_lag_waves(angles)
        for a, other in zip(others, other_angles, strict=True):
            waves = (waves[:, None, :, None] * a.make_lag_waves(other)[:, None]).flatten(2).flatten(0, 1)
        total.addmm_(waves.real.T.to(sample), even.view(len(waves), -1))
        total.addmm_(waves.imag.T.to(sample), (odd - odd.mT).view(len(waves), -1))
    return total


def _multiply_spectra(
    parts: Sequence[Tensor], groups: int, axes: Sequence[Axis], angles: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Transform ``parts`` at the given angles of each axis, and multiply all pairs of rows.

    Returns:
        The real part of the products, and the half of the imaginary part whose transpose is the other half,
        both of shape (frequencies * groups, width, width).
    """
    sample, rows = parts[0], len(parts[0])
    first, *others = axes
    stages = [first.make_waves(angles[0])[:, : first.length].to(sample)]
    stages += [a.make_waves(other).to(sample) for a, other in zip(others, angles[1:], strict=True)]
    count, width = math.prod(map(len, angles)), rows // groups
    even = sample.new_zeros(count * groups, width, width)
    odd = torch.zeros_like(even)
    for z in parts:
        inner = z.shape[-1]
        for stage, a in zip(stages, [*others, None], strict=True):
            z = stage @ z.reshape(-1, stage.shape[1], inner)
            inner = inner // a.length if a else inner
        z = z.view(groups, width, -1, 2 * inner).permute(2, 0, 1, 3).flatten(0, 1)
        even.baddbmm_(z, z.mT)  # re reᵀ + im imᵀ
        odd.baddbmm_(z[..., :inner], z[..., inner:].mT)
    return even, odd
