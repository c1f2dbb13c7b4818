"""Products of batched matrices against the plain ones."""

import math

import pytest
import torch

from plywise.numerics.products import (
    BLOCK,
    centre_rows,
    compute_lower_product,
    compute_outer_product,
    divide_or_zero,
    mirror_lower,
)

F64 = torch.float64


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_lower_product(size, groups):
    rows = torch.randn(groups, size, 9, dtype=F64)
    expected = rows @ rows.mT
    product = compute_lower_product(rows)
    torch.testing.assert_close(product.tril(), expected.tril())
    above = product.triu(1)
    assert ((above == 0) | torch.isclose(above, expected.triu(1))).all()
    torch.testing.assert_close(mirror_lower(product), expected)


def test_mirror_lower_ignores_what_is_above():
    lower = torch.tensor([[[1.0, math.nan], [2.0, 3.0]]])
    assert torch.equal(mirror_lower(lower), torch.tensor([[[1.0, 2.0], [2.0, 3.0]]]))


@pytest.mark.parametrize("size", [4 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK + 3])
def test_mirror_lower_is_exact_in_blocks(size):
    whole = torch.randn(2, size, size)
    whole += whole.mT.clone()
    lower = whole.tril() + torch.full_like(whole, math.nan).triu(1)
    before = lower.clone()
    assert torch.equal(mirror_lower(lower), whole)
    assert torch.equal(lower.nan_to_num(), before.nan_to_num()), "its argument stays as it is"


def test_outer_product():
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    torch.testing.assert_close(compute_outer_product(x, y), torch.einsum("gm,gk->gmk", x, y))


def test_divide_or_zero():
    quotient = divide_or_zero(torch.tensor([6.0, 1.0, 0.0, 1.0]), torch.tensor([2.0, 0.0, 0.0, -1.0]))
    assert torch.equal(quotient, torch.tensor([3.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_centre_rows(offset):
    rows = offset + torch.randn(2, 300, 5)
    before = rows.clone()
    centred, mean = centre_rows(rows)
    exact = rows.double()
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=1e-6)
    assert (centred.double() - (exact - exact.mean(1, keepdim=True))).abs().max() < 1e-6
    assert torch.equal(rows, before)
