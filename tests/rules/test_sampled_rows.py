"""A sample of the rows: a grid of positions, all grids in turn, and how far its covariance is off."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import plywise as pw
from plywise.data.digits import load_digits
from plywise.engine.health import Health
from plywise.engine.maps.convolution import read_convolution_module
from plywise.engine.maps.matmul import MATRIX_PRODUCT

DATA = os.environ.get("PLYWISE_DATA")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Sampled:
    """The map of a layer, with what pads its input before."""

    def __init__(self, layer: nn.Module) -> None:
        self.map, self.pad = MATRIX_PRODUCT, lambda x: x
        if not isinstance(layer, nn.Linear):
            self.map, self.pad = read_convolution_module(layer)

    def sample(self, layer: nn.Module, x: Tensor, every: int, turn: int) -> tuple[Tensor, Tensor, int]:
        return self.map.sample_positions(self.pad(x), every, turn)


def kind_of(layer: nn.Module) -> Sampled:
    return Sampled(layer)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The patch of every output position, one at a time: (g, B, *positions, d)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    geometry = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, (k, s, d) in zip(x.shape[2:], geometry, strict=True)]
    rows = []
    for place in itertools.product(*map(range, counts)):
        window = [
            slice(p * s, p * s + d * (k - 1) + 1, d) for p, (k, s, d) in zip(place, geometry, strict=True)
        ]
        patch = x[(slice(None), slice(None), *window)]
        rows.append(torch.stack([part.flatten(1) for part in patch.chunk(layer.groups, 1)]))
    return torch.stack(rows, 2).unflatten(2, counts)


def ply_of(layer: nn.Module, x: Tensor) -> pw.LinearCall:
    with torch.no_grad():
        delta = layer(x)
    kind, weight = kind_of(layer), layer.weight.detach()
    return pw.LinearCall("layer", kind.map, kind.pad(x), delta, weight, layer.bias is not None, Health())


def statistics(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Gram, sums and number of rows (g, n, d)."""
    return rows.mT @ rows, rows.sum(1), rows.shape[1]


def same(found: tuple[Tensor, Tensor, int], expected: tuple[Tensor, Tensor, int]) -> bool:
    """To 1e-10 of the largest; of the Gram, the triangle that is promised."""
    near = [
        (one.tril() - two.tril()).abs().max() <= 1e-10 * two.abs().max().clamp_min(1e-300)
        for one, two in ((found[0], expected[0]), (found[1].unsqueeze(2), expected[1].unsqueeze(2)))
    ]
    return all(near) and found[2] == expected[2]


def subsets(rows: Tensor, every: int) -> dict[tuple[int, ...], tuple[Tensor, Tensor, int]]:
    """For rows (g, B, *positions, d): the statistics of each grid of positions, by its offsets."""
    steps = [every if size >= every else 1 for size in rows.shape[2:-1]]
    found = {}
    for offsets in itertools.product(*map(range, steps)):
        grid = [slice(offset, None, step) for offset, step in zip(offsets, steps, strict=True)]
        found[offsets] = statistics(rows[(slice(None), slice(None), *grid)].flatten(1, -2))
    return found


def check(layer: nn.Module, x: Tensor, rows: Tensor, every: int) -> None:
    """Each turn is one grid of positions; a cycle of turns takes each once, and begins again."""
    kind, grids = kind_of(layer), subsets(rows, every)
    turns = [kind.sample(layer, x, every, turn) for turn in range(2 * len(grids))]
    order = [[key for key, grid in grids.items() if same(found, grid)] for found in turns]
    assert all(len(keys) == 1 for keys in order), "not the rows of one grid"
    cycle = [keys[0] for keys in order]
    assert sorted(cycle[: len(grids)]) == sorted(grids)
    assert cycle[len(grids) :] == cycle[: len(grids)]
    totals = tuple(sum(part) for part in zip(*turns[: len(grids)], strict=True))
    assert same(totals, statistics(rows.flatten(1, -2)))


CONVS = [
    (nn.Conv1d, (2, 4, 11)),
    (nn.Conv2d, (2, 4, 9, 8)),
    (nn.Conv3d, (2, 2, 6, 5, 7)),
]
GEOMETRIES = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"stride": 2, "padding": 2, "dilation": 2},
    {"padding": "same", "kernel_size": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2},
    {"padding": 1, "groups": 2, "stride": 3},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    {"padding": 2, "padding_mode": "reflect", "stride": 2, "groups": 2},
    {"kernel_size": 1},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("conv", "shape"), CONVS)
def test_a_sample_of_a_convolution_is_a_grid_of_its_positions(conv, shape, geometry, every):
    layer = conv(shape[1], 4, **{"kernel_size": 3, **geometry})
    x = torch.randn(shape)
    rows = patches(layer, x)
    weight = layer.weight.reshape(layer.groups, -1, rows.shape[-1])
    out = torch.einsum("gb...d,gmd->bgm...", rows, weight).reshape(layer(x).shape)
    bias = layer.bias.reshape(-1, *[1] * (len(shape) - 2))
    assert torch.allclose(out + bias, layer(x), atol=1e-12)  # the test's own patches are the layer's
    check(layer, x, rows, every)


def test_stride_and_padding_differ_by_axis():
    layer = nn.Conv2d(2, 3, (2, 4), stride=(3, 1), padding=(0, 3), dilation=(1, 2))
    x = torch.randn(3, 2, 13, 8)
    for every in (2, 3, 4):
        check(layer, x, patches(layer, x), every)


@pytest.mark.parametrize("shape", [(5, 1, 7), (5, 7, 1), (5, 2, 3), (5, 1, 1)])
def test_an_axis_shorter_than_the_step_is_taken_whole(shape):
    layer, x = nn.Conv2d(5, 2, 1), torch.randn(2, *shape)
    check(layer, x, patches(layer, x), 4)
    tokens = nn.Linear(6, 2)
    x = torch.randn(3, *shape[1:], 6)
    check(tokens, x, x.unsqueeze(0), 4)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_linear_layer_samples_the_axes_between_batch_and_features(every):
    layer = nn.Linear(6, 2)
    for shape in ((4, 7, 6), (4, 5, 3, 6), (4, 2, 6)):
        x = torch.randn(shape)
        check(layer, x, x.unsqueeze(0), every)


@pytest.mark.parametrize("shape", [(9, 6), (1, 6), (6,)])
@pytest.mark.parametrize("turn", [0, 1, 5])
def test_samples_of_the_batch_are_never_left_out(shape, turn):
    layer, x = nn.Linear(6, 2), torch.randn(shape)
    assert same(kind_of(layer).sample(layer, x, 3, turn), statistics(x.reshape(1, -1, 6)))


def test_every_sample_of_the_batch_is_in_each_turn():
    """An image that is left out would bias a statistic where few images differ from all others."""
    layer, x = nn.Conv2d(1, 1, 3, bias=False), torch.zeros(4, 1, 8, 8)
    x[3] = torch.randn(8, 8)
    kind = kind_of(layer)
    assert all(kind.sample(layer, x, 3, turn)[0].norm() > 0 for turn in range(9))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", ["linear", "tokens", "conv"])
def test_the_sampled_gram_has_the_biass_ones(make, bias):
    layer, shape = {
        "linear": (nn.Linear(6, 2, bias=bias), (9, 6)),
        "tokens": (nn.Linear(6, 2, bias=bias), (4, 5, 6)),
        "conv": (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, bias=bias), (3, 4, 9, 8)),
    }[make]
    x = torch.randn(shape)
    rows = x.reshape(1, shape[0], *shape[1:]) if make != "conv" else patches(layer, x)
    rows = functional.pad(rows, (0, 1), value=1.0) if bias else rows
    for every, turn in ((1, 0), (2, 0), (2, 3)):
        gram, count = ply_of(layer, x).sampled_gram(torch.float64, every, turn)
        grids = subsets(rows, every) if make != "linear" else {(): statistics(rows)}
        matches = [g for g in grids.values() if same((gram, g[1], count), g)]
        assert len(matches) == 1


# ---- how far a sample is from all ------------------------------------------------------------------


def digits() -> Tensor:
    return load_digits(0)[0].x[:256].reshape(-1, 1, 8, 8).double()


def mnist() -> Tensor:
    path = Path(DATA or "") / "mnist.npz"
    if DATA is None or not path.is_file():
        pytest.skip("PLYWISE_DATA names no folder with mnist.npz")
    with np.load(path) as file:
        return torch.from_numpy(file["x_train"][:128])[:, None].double() / 255


def smooth() -> Tensor:
    """Noise with a spectrum that falls as that of photographs does, 1/f."""
    f = torch.fft.fftfreq(32)
    fall = 1 / torch.hypot(f[:, None], f[None]).clamp_min(1 / 32)
    return torch.fft.ifft2(torch.fft.fft2(torch.randn(64, 3, 32, 32)) * fall).real


# measured: digits .112 and .007, MNIST .0040 and .0047, 1/f .043 and .013. A padded border weighs otherwise
# in each grid, the more the smaller the image; over the turns that averages out.
@pytest.mark.parametrize(
    ("images", "alone", "in_turn"), [(digits, 0.13, 0.01), (mnist, 0.005, 0.006), (smooth, 0.05, 0.018)]
)
def test_every_second_position_gives_nearly_the_same_covariance(images, alone, in_turn):
    """sample=2 on a 3×3 convolution, a fourth of the rows: one turn, and four batches with a turn each."""
    x = images()
    layer = nn.Conv2d(x.shape[1], 8, 3, padding=1)
    whole, n = ply_of(layer, x).sampled_gram(torch.float64, 1, 0)
    for turn in range(4):
        gram, count = ply_of(layer, x).sampled_gram(torch.float64, 2, turn)
        assert count == n / 4
        assert distance(gram / count, whole / n) < alone
    parts = [ply_of(layer, part).sampled_gram(torch.float64, 2, turn) for turn, part in enumerate(x.chunk(4))]
    grams, counts = zip(*parts, strict=True)
    assert distance(sum(grams) / sum(counts), whole / n) < in_turn


def distance(gram: Tensor, whole: Tensor) -> float:
    """Relative distance of two Grams of which one triangle is promised."""
    one, two = (g.tril() + g.tril(-1).mT for g in (gram, whole))
    return ((one - two).norm() / two.norm()).item()
