"""Factorisations by way of a quick size are those of `torch.linalg.cholesky_ex`."""

import pytest
import torch

from plywise.numerics.cholesky import factorise, find_quick_size

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 64, 100, 111, 112, 127, 128, 129, 192, 256])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_factor_is_the_definition(size, groups):
    rows = torch.randn(
        groups, size, size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    matrix = rows @ rows.mT
    before = matrix.clone()
    factor, failed = factorise(matrix)
    assert factor.shape == matrix.shape
    assert failed.tolist() == [0] * groups
    assert torch.equal(matrix, before)
    assert torch.allclose(factor @ factor.mT, matrix, rtol=0, atol=1e-11 * float(matrix.abs().max()))
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("size", [16, 128, 256])
def test_a_matrix_without_a_factor_is_told(size):
    matrices = torch.eye(size).repeat(2, 1, 1)
    matrices[1, 3, 3] = -1
    failed = factorise(matrices)[1]
    assert (failed > 0).tolist() == [False, True]


def test_a_quick_size_is_not_below_the_size_and_not_far_above():
    for size in range(1, 1100):
        assert size <= find_quick_size(size, CPU) <= max(size + 1, 129)
    assert find_quick_size(128, torch.device("cuda")) == 128
