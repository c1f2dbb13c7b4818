"""Changes of basis against their matrices, in float64."""

import pytest
import torch
from torch import Tensor

from plywise.numerics.bases import find_basis, list_tensors, make_basis
from plywise.numerics.eigenbasis import compute_eigenbasis, measure_residual
from plywise.numerics.products import multiply_lower


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


@pytest.mark.parametrize("size", [1, 5, 130, 600])
def test_of_a_symmetric_matrix_the_lower_triangle_is_enough(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    noise = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    whole, x = noise + noise.mT, torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    lower = whole.tril() + noise.triu(1)
    assert torch.allclose(multiply_lower(lower, x), whole @ x, rtol=1e-10, atol=1e-10)


def test_one_step_of_orthogonal_iteration() -> None:
    """By its definition; within the tolerance only the values are new."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 400, 30, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(30)
    gram, count = rows.mT @ rows, 400.0
    first = compute_eigenbasis(gram, rank=4, count=count)
    assert first is not None
    start = first[1]
    gram = gram + torch.diag(torch.linspace(0, 90, 30))
    mean = gram.diagonal(dim1=1, dim2=2).mean(1) / count
    size = torch.exp2(torch.log2(mean).floor())[:, None, None]
    matrix = gram / count / size + torch.diag(torch.linspace(1e-4, 0, 30))
    Q, upper = torch.linalg.qr(matrix @ start)
    Q = Q * upper.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    trace = matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    for tolerance, vectors in ((0.0, Q), (1e9, start)):
        found = compute_eigenbasis(gram.tril(), start, rank=4, count=count, tolerance=tolerance)
        assert found is not None
        values = (vectors * (matrix @ vectors)).sum(1) / trace
        assert torch.allclose(found[1], vectors, rtol=1e-9, atol=1e-11)
        assert torch.allclose(found[0][:, :4], values, rtol=1e-9)
        assert torch.allclose(found[0].mean(1), torch.ones_like(trace[:, 0]))
    assert compute_eigenbasis(gram.index_fill(1, torch.tensor(3), torch.inf), start, rank=4) is None


@pytest.mark.parametrize("start", [False, True])
def test_dead_inputs_leave_no_dust_in_the_vectors_of_others(start: bool) -> None:
    """A product with numbers that are nearly zero would be denormal, and slow."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 20, generator=generator) * (torch.arange(20) % 3 > 0)
    gram = (rows.T @ rows).unsqueeze(0)
    found = compute_eigenbasis(gram)
    assert found is not None
    if start:
        found = compute_eigenbasis(gram, found[1])
        assert found is not None
    size = found[1].abs()
    assert bool(((size == 0) | (size > 1e-11)).all())
    assert torch.allclose(found[1].mT @ found[1], torch.eye(20), atol=1e-5)


def test_the_residual_is_zero_for_eigenvectors() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).unsqueeze(0)
    vectors = torch.eye(3, dtype=torch.float64)[None, :, :2]
    assert measure_residual(matrix @ vectors, torch.tensor([[4.0, 2.0]])).item() == 0
    angle = torch.tensor(0.1, dtype=torch.float64)
    vectors = torch.stack([angle.cos(), angle.sin(), 0 * angle]).reshape(1, 3, 1)
    product = matrix @ vectors
    value = (vectors * product).sum(1)
    wanted = (product - vectors * value).norm() / (2 * value)
    assert torch.allclose(measure_residual(product, value), wanted)


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
