"""The Gram matrix, sums and norms of convolution patches against an unfold that shares no code with them."""

import math
import random

import pytest
import torch
from torch.nn import functional

from plywise.numerics import patch_correlation as module
from plywise.numerics.patch_gram import (
    compute_centred_patch_gram,
    compute_patch_gram,
    compute_patch_trace,
    find_channel_means,
    sum_patch_squares,
    sum_patches,
    unfold_patches,
)

CONVS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

# input shape, kernel, stride, padding, dilation, groups
CASES = [
    ((4, 3, 9, 8), (5, 5), (1, 1), (2, 2), (1, 1), 1),
    ((4, 3, 9, 8), (5, 5), (1, 1), (0, 0), (1, 1), 1),
    ((4, 3, 9, 8), (5, 5), (1, 1), (4, 4), (1, 1), 1),
    ((4, 3, 9, 8), (5, 5), (1, 1), (6, 1), (1, 1), 1),
    ((3, 4, 7, 6), (3, 4), (1, 1), (1, 2), (1, 1), 2),
    ((3, 4, 7, 6), (1, 3), (1, 1), (0, 1), (1, 1), 1),
    ((3, 4, 7, 6), (3, 1), (2, 3), (1, 2), (1, 1), 1),
    ((3, 2, 8, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((3, 2, 9, 8), (2, 2), (3, 2), (1, 0), (1, 1), 1),
    ((3, 2, 11, 10), (5, 3), (2, 2), (2, 1), (1, 1), 1),
    ((3, 2, 11, 10), (3, 3), (1, 1), (1, 2), (2, 3), 1),
    ((3, 2, 11, 10), (3, 3), (2, 1), (1, 2), (2, 3), 1),
    ((3, 6, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    ((3, 2, 2, 3), (5, 5), (1, 1), (2, 2), (1, 1), 1),
    ((2, 2, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 3, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((0, 3, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((200, 2, 6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 4, 12), (5,), (1,), (1,), (1,), 2),
    ((3, 4, 12), (5,), (2,), (2,), (1,), 1),
    ((2, 2, 5, 6, 4), (3, 2, 3), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    ((2, 4, 5, 6, 5), (3, 2, 3), (1, 2, 1), (0, 1, 1), (1, 1, 2), 2),
]


def draw_cases(count):
    rng = random.Random(7)
    cases = []
    while len(cases) < count:
        n = rng.choice([1, 2, 2, 2, 3])
        tops = (8, 4, rng.choice([1, 3]), 5, rng.choice([1, 2]))
        size, kernel, stride, padding, dilation = (tuple(rng.randint(1, t) for _ in range(n)) for t in tops)
        padding = tuple(p - 1 for p in padding)
        groups = rng.choice([1, 1, 2])
        spans = zip(size, kernel, padding, dilation, strict=True)
        if all(s + 2 * p > d * (k - 1) for s, k, p, d in spans):
            shape = (rng.randint(1, 3), groups * rng.randint(1, 3), *size)
            cases.append((shape, kernel, stride, padding, dilation, groups))
    return cases


ALL_CASES = CASES + draw_cases(40)


@pytest.fixture(params=["chosen", "correlated", "unfolded"])
def way(request, monkeypatch):
    """Let the cost decide, or force either way wherever it applies."""
    cost = module.estimate_cost
    if request.param == "unfolded":
        monkeypatch.setattr(module, "estimate_cost", lambda *a: math.inf)
    elif request.param == "correlated":
        monkeypatch.setattr(module, "estimate_cost", lambda *a: -1.0 if cost(*a) < math.inf else math.inf)
    return request.param


def reference_rows(x, kernel, stride, padding, dilation, groups):
    """Patches read off a convolution with one-hot weights, (groups, n, d); float64."""
    channels = x.shape[1] // groups
    d = channels * math.prod(kernel)
    one_hot = torch.eye(d, dtype=x.dtype).view(d, channels, *kernel)
    conv = CONVS[len(kernel)]
    parts = [conv(part, one_hot, None, stride, padding, dilation) for part in x.chunk(groups, 1)]
    return torch.stack([part.movedim(1, -1).reshape(-1, d) for part in parts])


def make(shape, dtype=torch.float64):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x + 0.5  # a mean, so that border windows matter


def check(actual, expected, tolerance=1e-12, floor=1e-30):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().max() if expected.numel() else torch.tensor(0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(float(scale), float(floor)))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_rows_are_the_patches(case):
    x = make(case[0])
    torch.testing.assert_close(unfold_patches(x, *case[1:]), reference_rows(x, *case[1:]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in ALL_CASES if len(c[1]) == 2 and c[0][0]], ids=str)
def test_rows_agree_with_torch_unfold(case):
    shape, kernel, stride, padding, dilation, groups = case
    x = make(shape)
    unfolded = functional.unfold(x, kernel, dilation, padding, stride)  # (batch, channels * taps, positions)
    expected = unfolded.mT.reshape(-1, groups, unfolded.shape[1] // groups).transpose(0, 1)
    assert torch.equal(unfold_patches(x, *case[1:]), expected)


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c[0][0]], ids=str)
def test_rows_times_weight_is_the_convolution(case):
    shape, kernel, stride, padding, dilation, groups = case
    x, out = make(shape), 3
    weight = make((groups * out, shape[1] // groups, *kernel))
    delta = CONVS[len(kernel)](x, weight, None, stride, padding, dilation, groups)
    rows = unfold_patches(x, *case[1:])
    product = rows @ weight.flatten(1).unflatten(0, (groups, out)).mT  # (groups, n, out)
    check(product.transpose(0, 1).flatten(1), delta.movedim(1, -1).reshape(-1, groups * out))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_gram(case, way):
    x = make(case[0])
    rows = reference_rows(x, *case[1:])
    gram = compute_patch_gram(x, *case[1:])
    # All windows of a draw may lie in the padding: the rounding is relative to the energy of the input.
    check(gram, rows.mT @ rows, floor=x.square().mean(1).sum())
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_sums_and_squares(case):
    x = make(case[0])
    rows = reference_rows(x, *case[1:])
    check(sum_patches(x, *case[1:]), rows.sum(1))
    check(sum_patch_squares(x, *case[1:]), rows.square().sum(2))
    check(compute_patch_trace(x, *case[1:]), rows.square().sum((1, 2)))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layouts(layout, way):
    x = make((4, 3, 12, 8))
    if layout == "channels_last":
        view = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        view = x.transpose(2, 3)
    else:
        view = x[::2, :, ::2]
    args = ((3, 2), (1, 1), (1, 1), (1, 1), 1)
    rows = reference_rows(view.contiguous(), *args)
    check(compute_patch_gram(view, *args), rows.mT @ rows)
    check(sum_patch_squares(view, *args), rows.square().sum(2))
    assert torch.equal(x, make((4, 3, 12, 8)))


@pytest.mark.parametrize("workspace", [1, 300])
def test_small_blocks(workspace, way, monkeypatch):
    """Many blocks of the batch and of the frequencies add up to the same."""
    monkeypatch.setattr(module, "WORKSPACE", workspace)
    monkeypatch.setattr(module, "_MIN_BATCH", 2)
    x, args = make((7, 4, 6, 5)), ((3, 3), (1, 1), (1, 0), (1, 1), 2)
    rows = reference_rows(x, *args)
    check(compute_patch_gram(x, *args), rows.mT @ rows)


@pytest.mark.parametrize("case", [c for c in CASES if c[0][0]], ids=str)
def test_float32(case, way):
    x = make(case[0], torch.float32)
    rows = reference_rows(x.double(), *case[1:])
    check(compute_patch_gram(x, *case[1:]), (rows.mT @ rows).float(), 5e-6)


# ---- centred patches -------------------------------------------------------------------------------


def centre(rows):
    mean = rows.mean(1)
    rows = rows - mean.unsqueeze(1)
    return rows.mT @ rows, mean


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c[0][0]], ids=str)
def test_centred_gram(case, way):
    x = make(case[0])
    expected, mean = centre(reference_rows(x, *case[1:]))
    gram, actual_mean = compute_centred_patch_gram(x, *case[1:])
    check(gram, expected, floor=x.square().mean(1).sum())
    check(actual_mean, mean)
    check(gram, gram.mT)  # in torch 2.9 not to the bit


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("case", [c for c in CASES if c[0][0]], ids=str)
def test_an_offset_costs_no_digits(case, offset, way):
    """In float32, each entry is right relative to its columns. Taps in the padding vary by the offset."""
    x = make(case[0], torch.float32) + offset
    x[:, 0] -= 3 * offset  # the channels differ
    rows = reference_rows(x.double(), *case[1:])
    expected, mean = centre(rows)
    gram, actual_mean = compute_centred_patch_gram(x, *case[1:])
    size = expected.diagonal(dim1=1, dim2=2).clamp_min(1).sqrt()
    error = (gram - expected).abs() / (size.unsqueeze(2) * size.unsqueeze(1))
    assert error.max() < 2e-5
    assert ((actual_mean - mean).abs() <= 3e-7 * rows.abs().amax(1)).all()


def test_the_difference_of_two_grams_would_not_do():
    x, args = make((20, 3, 9, 9), torch.float32) + 1e3, ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    expected, _ = centre(reference_rows(x.double(), *args))
    mean = sum_patches(x, *args) / (20 * 49)
    naive = compute_patch_gram(x, *args) - 20 * 49 * mean.unsqueeze(2) * mean.unsqueeze(1)
    assert (naive - expected).norm() > 0.05 * expected.norm()
    assert (compute_centred_patch_gram(x, *args)[0] - expected).norm() < 1e-5 * expected.norm()


def test_a_constant_input_has_no_variance_inside(way):
    x, args = torch.full((4, 2, 6, 6), 0.3), ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    gram, mean = compute_centred_patch_gram(x, *args)
    assert gram.abs().max() < 1e-10
    torch.testing.assert_close(mean, torch.full((1, 18), 0.3))


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c[0][0]], ids=str)
def test_channel_means_leave_the_padding_out(case):
    x, (kernel, *rest, groups) = make(case[0]), case[1:]
    rows = reference_rows(x, kernel, *rest, groups)
    inside = reference_rows(torch.ones_like(x), kernel, *rest, groups)
    sums = rows.sum(1).reshape(x.shape[1], -1).sum(1)
    counts = inside.sum(1).reshape(x.shape[1], -1).sum(1).clamp_min(1)
    check(find_channel_means(x, *case[1:]), sums / counts)


def test_large_layers_are_correlated_and_small_ones_unfolded(monkeypatch):
    used = []
    correlate = module.correlate
    monkeypatch.setattr(module, "correlate", lambda *a: used.append(True) or correlate(*a))
    args = ((5, 5), (1, 1), (2, 2), (1, 1), 1)
    compute_patch_gram(make((64, 16, 16, 16), torch.float32), *args)
    assert used
    used.clear()
    compute_patch_gram(make((1, 1, 4, 4)), *args)
    assert not used
