"""Newton-Schulz iterations: what they reach, and both orders of their products."""

import pytest
import torch

from plywise.numerics.polar import COEFFICIENTS, WORTH_IT, count_saved, orthogonalize
from plywise.optim.muon import THREE_ITERATIONS


def test_singular_values_come_near_one():
    generator = torch.Generator().manual_seed(4)
    matrices = torch.randn((3, 20, 12), generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.6 < values.min() < values.max() < 1.25


def test_three_iterations_bring_a_hundredfold_range_near_one():
    values = torch.logspace(-2, 0, 40, dtype=torch.float64)
    values = values / torch.linalg.vector_norm(values)
    found = torch.linalg.svdvals(orthogonalize(values.diag()[None], THREE_ITERATIONS))
    reached = values >= 0.01
    assert 0.72 < found[0, : reached.sum()].min() <= found.max() < 1.28


def define(matrices, iterations):
    """The iterations written out, one matrix at a time in float64."""
    found = []
    for x in matrices.double():
        x = x / x.square().sum().sqrt().clamp(min=1e-7)
        for a, b, c in iterations:
            x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
        found.append(x)
    return torch.stack(found)


def draw(k, m, n, smallest, dtype):
    """Matrices with singular values from 1 down to ``smallest``; 0 for rank one."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(k, side, min(m, n), generator=generator).double() for side in (m, n))
    left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    values = torch.logspace(0, -6, min(m, n), dtype=torch.float64).clamp(min=smallest)
    if smallest == 0:
        values[1:] = 0
    return (left * values @ right.mT).to(dtype)


@pytest.mark.parametrize("iterations", [THREE_ITERATIONS, (COEFFICIENTS,) * 5], ids=["three", "five"])
@pytest.mark.parametrize("shape", [(1, 64, 784), (3, 48, 400), (1, 500, 70), (2, 96, 96)], ids=str)
@pytest.mark.parametrize("smallest", [0.1, 1e-3, 1e-6, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_orders_of_the_products_equal_the_definition(iterations, shape, smallest, dtype):
    matrices = draw(*shape, smallest, dtype)
    k, m, n = shape[0], min(shape[1:]), max(shape[1:])
    assert (count_saved(k, m, n, len(iterations)) > WORTH_IT) == (m != n), (
        "this shape is for one of the orders"
    )
    found = orthogonalize(matrices, iterations)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-4  # entries are up to 1
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), define(matrices, iterations), rtol=0, atol=tolerance)


def test_zeros_stay_zeros_in_both_orders():
    for shape in ((2, 3, 4), (1, 64, 784)):
        assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))
