"""The ridge head against its normal equations, in float64; what it sums, when it solves, what it refuses."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from closeness import close, normal_equations_error
from torch import Tensor

import plywise as pw
from plywise.local.linear_heads import RidgeHead

CLASSES = 3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def problem(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape), torch.arange(n) % CLASSES


def taught(features: Tensor, y: Tensor, sizes=(), **settings) -> RidgeHead:
    head = RidgeHead(features.shape[1:], CLASSES, **settings)
    sizes = list(sizes) or [len(y)]
    for rows, targets in zip(features.split(sizes), y.split(sizes), strict=True):
        head.take_in(rows, targets)
    return head


@pytest.mark.parametrize("ridge", [1e-2, 1e-6, 3.0])
@pytest.mark.parametrize("width", [1, 7, 128, 129, 300])
def test_normal_equations(width, ridge):
    """Whatever number of block rows the Gram takes; with more samples than features, and with fewer."""
    features, y = problem(150, width)
    head = taught(features, y, (64, 64, 21, 1), ridge=ridge)
    assert head.solution().shape == (width, CLASSES)
    assert normal_equations_error(features, y, head.solution(), ridge) < 1e-9


def test_order_and_size_of_batches_do_not_matter():
    features, y = problem(50, 20)
    expected = taught(features, y).solution()
    assert not close(taught(features[1:], y[1:]).solution(), expected)
    for sizes in ((16, 16, 16, 2), (1,) * 50, (7, 43)):
        order = torch.randperm(50)
        assert close(taught(features[order], y[order], sizes).solution(), expected)


def test_repeated_data_does_not_matter():
    features, y = problem(50, 20)
    thrice = taught(features.repeat(3, 1), y.repeat(3), (50, 50, 50))
    assert close(thrice.solution(), taught(features, y).solution())
    assert int(thrice.count) == 150


def test_the_solution_follows_the_sums():
    features, y = problem(50, 20)
    head = taught(features[:30], y[:30])
    assert normal_equations_error(features[:30], y[:30], head.solution()) < 1e-12
    head.take_in(features[30:], y[30:])
    assert normal_equations_error(features, y, head.solution()) < 1e-12
    head.load_state_dict(taught(features[:30], y[:30]).state_dict())
    assert normal_equations_error(features[:30], y[:30], head.solution()) < 1e-12


def test_before_any_data_weights_are_zero():
    head = RidgeHead(torch.Size([4]), CLASSES)
    assert torch.equal(head.solution(), torch.zeros(4, CLASSES))


def test_loss_is_that_of_the_weights_when_samples_last_doubled():
    features, y = problem(90, 8)
    target = F.one_hot(y, CLASSES).double()
    head, start = RidgeHead(torch.Size([8]), CLASSES), 0
    for size, seen in [(5, 0), (5, 0), (5, 10), (15, 10), (50, 30), (10, 80)]:  # not before 8 samples
        batch = slice(start, start + size)
        weight = taught(features[:seen], y[:seen]).solution() if seen else torch.zeros(8, CLASSES)
        expected = (features[batch] @ weight - target[batch]).square().mean()
        assert close(head.loss(features[batch], y[batch]), expected)
        head.take_in(features[batch], y[batch])
        head.solution()  # to ask for the solution makes no difference to the loss
        start += size


def test_a_singular_problem_has_its_smallest_solution():
    """Features twice over, and a ridge below rounding."""
    once, y = problem(30, 4)
    features = torch.cat([once, once], 1)
    expected = torch.linalg.pinv(features) @ F.one_hot(y, CLASSES).double()
    assert close(taught(features, y, ridge=1e-30).solution(), expected)


def test_sums_of_float32_features_are_in_float64():
    features, y = problem(5000, 6)
    features = (features + 100).float()  # a mean that float32 sums would not carry
    head = taught(features, y, (1000,) * 5, ridge=1e-8)
    assert head.solution().dtype == torch.float64
    assert normal_equations_error(features.double(), y, head.solution(), 1e-8) < 1e-8
    assert head.loss(features, y).dtype == torch.float32
    assert head.as_module()(features).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "limit", "pooled"),
    [
        ((4, 6, 6), 144, lambda maps: maps),
        ((4, 6, 6), 143, lambda maps: F.avg_pool2d(maps, 2)),
        ((4, 6, 6), 35, lambda maps: F.avg_pool2d(maps, 3)),
        ((4, 5, 3), 24, lambda maps: F.avg_pool2d(maps, 2, ceil_mode=True)),
        ((4, 6, 3), 4, lambda maps: maps.mean((2, 3))),
        ((4, 6), 8, lambda maps: F.avg_pool1d(maps, 3)),
        ((2, 4, 4, 2), 8, lambda maps: F.avg_pool3d(maps, 2)),
    ],
)
def test_too_many_features_are_averaged_over_squares(shape, limit, pooled):
    maps, y = problem(30, *shape)
    head = taught(maps, y, max_features=limit)
    features, W = pooled(maps).flatten(1), head.solution()
    assert len(W) == features.shape[1] <= limit
    assert normal_equations_error(features, y, W) < 1e-12
    assert close(head.as_module()(maps), features @ W)


@pytest.mark.parametrize("shape", [(40,), (20, 2, 1)])
def test_too_many_features_without_a_map_are_refused(shape):
    with pytest.raises(pw.BlockError, match=r"40 features.*at most 12"):
        RidgeHead(torch.Size(shape), CLASSES, max_features=12)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    with pytest.raises(ValueError, match="ridge must be a finite number above 0"):
        RidgeHead(torch.Size([4]), CLASSES, ridge=ridge)
