"""Changes of basis against their matrices, in float64."""

import pytest
import torch
from torch import Tensor

from plywise.numerics.bases import find_basis, list_tensors, make_basis
from plywise.numerics.eigenbasis import compute_eigenbasis


def draw(groups: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors, and positive scales of which those of the rest are alike."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    scales = torch.rand(groups, size, generator=generator, dtype=torch.float64) + 0.5
    if rank < size:
        scales[:, rank:] = scales[:, rank : rank + 1]
    return torch.linalg.qr(noise).Q[:, :, :rank], scales


SIZES = [(1, 6, 6), (1, 6, 2), (3, 10, 4), (1, 5, 4), (2, 300, 16)]


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_the_matrix(size: tuple[int, int, int], turned: bool) -> None:
    vectors, scales = draw(*size)
    basis = make_basis(vectors, scales, turned)
    T = basis.as_matrix()
    x = torch.randn(size[0], 7, size[1], dtype=torch.float64)
    assert torch.allclose(basis.turn(x.clone()), x @ T, atol=1e-12)
    assert torch.allclose(basis.turn_back(x.clone()), x @ T.mT, atol=1e-12)
    assert torch.allclose(basis.solve(x.clone()) @ T, x, atol=1e-12)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_basis_scales_along_the_vectors(size: tuple[int, int, int], turned: bool) -> None:
    """``T Tᵀ`` knows nothing of how the vectors have been completed."""
    vectors, scales = draw(*size)
    T = make_basis(vectors, scales, turned).as_matrix()
    leading, rest = scales[:, : size[2]], scales[:, -1:].unsqueeze(2)
    projection = vectors @ vectors.mT
    eye = torch.eye(size[1], dtype=torch.float64)
    metric = (vectors * leading.square().unsqueeze(1)) @ vectors.mT + rest.square() * (eye - projection)
    assert torch.allclose(T @ T.mT, metric, atol=1e-12)
    if turned:  # orthogonal columns, of which the first are the vectors
        inside = T.mT @ T
        assert torch.allclose(inside, torch.diag_embed(scales.square()), atol=1e-12)
        assert torch.allclose((T / scales.unsqueeze(1))[:, :, : size[2]].abs(), vectors.abs(), atol=1e-12)


def test_vectors_that_are_axes_already() -> None:
    vectors = torch.eye(5, 2, dtype=torch.float64).unsqueeze(0)
    T = make_basis(vectors, torch.ones(1, 5, dtype=torch.float64), True).as_matrix()
    assert torch.allclose(T.abs(), torch.eye(5, dtype=torch.float64).unsqueeze(0))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_kept_gives_the_same_basis(size: tuple[int, int, int], turned: bool) -> None:
    basis = make_basis(*draw(*size), turned)
    kept = list_tensors(basis, "input")
    found = find_basis(kept, "input")
    assert found is not None
    assert torch.equal(found.as_matrix(), basis.as_matrix())
    assert find_basis(kept, "output") is None
    stacked = {name: torch.stack([value, value]) for name, value in kept.items()}
    both = find_basis(stacked, "input")
    assert both is not None
    assert torch.allclose(both.as_matrix(), torch.cat([basis.as_matrix()] * 2), atol=1e-14)


@pytest.mark.parametrize("start", [False, True])
def test_leading_eigenvectors_are_those_of_a_whole_decomposition(start: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 30, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(30)
    gram = (rows.T @ rows).unsqueeze(0)
    whole = compute_eigenbasis(gram)
    first = compute_eigenbasis(gram, rank=4)
    assert whole is not None
    assert first is not None
    if start:
        again = compute_eigenbasis(gram, first[1], rank=4)
        assert again is not None
        first = again
    assert torch.allclose(first[0][:, :4], whole[0][:, :4], rtol=1e-3)
    assert torch.allclose(first[0][:, 4:], whole[0][:, 4:].mean().expand(1, 26), rtol=1e-2)
    cosines = (first[1] * whole[1][:, :, :4]).sum(1)
    assert cosines.min() > 0.99
