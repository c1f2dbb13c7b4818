"""Roots of low rank against their definition, by exact eigenvectors in float64."""

import math

import pytest
import torch
from torch import Tensor

from numerics.grams import (
    F32,
    F64,
    RELATIVE,
    SPECTRA,
    damping_of,
    error,
    gram_of,
    lower_only,
    same,
    slow_root,
    spectrum,
)
from plywise.numerics.inverse_roots import compute_inverse_root
from plywise.numerics.low_rank import (
    LARGE,
    LowRankRoot,
    compute_low_rank_root,
    find_eigenpairs,
    multiply_by_root,
)


def dense(root: LowRankRoot | None) -> Tensor:
    assert root is not None
    for part in (root.vectors, root.weights, root.scale):
        assert torch.isfinite(part).all()
    r = root.vectors.shape[2]
    eye = torch.eye(r, dtype=root.vectors.dtype)
    assert (root.vectors.mT @ root.vectors - eye).abs().max() < 100 * torch.finfo(root.vectors.dtype).eps
    body = root.vectors @ torch.diag_embed(root.weights) @ root.vectors.mT
    return root.scale[:, None, None] * (torch.eye(body.shape[1], dtype=body.dtype) + body)


def slow_low_rank(gram: Tensor, power: float, damping: float, relative: str, rank: int) -> Tensor:
    """Its definition, with exact eigenvectors."""
    values, vectors = torch.linalg.eigh(gram[0].double())
    shift = damping_of(gram[0].double(), damping, relative)
    if rank < len(values):
        values[: len(values) - rank] = values[: len(values) - rank].mean()
    return (vectors @ torch.diag((values + shift) ** -power) @ vectors.T)[None]


@pytest.mark.parametrize("relative", RELATIVE)
@pytest.mark.parametrize("power", [1, 0.5, 0.25])
def test_low_rank_is_exact_where_the_tail_is_constant(power, relative):
    values = torch.full((40,), 0.2, dtype=F64)
    values[-4:] = torch.tensor([20.0, 9, 5, 3])
    gram = gram_of(values)
    expected = slow_root(gram, power, 0.01, relative)
    for rank in (4, 7, 39, 40, 100):
        for dtype, tolerance in ((F64, 1e-4), (F32, 1e-4)):
            root = compute_low_rank_root(lower_only(gram.to(dtype)), power, 0.01, relative, rank)
            assert root.vectors.shape == (1, 40, min(rank, 40))
            assert root.vectors.dtype == root.weights.dtype == root.scale.dtype == dtype
            assert error(dense(root), expected) < tolerance, (rank, dtype)
        assert same(
            root.vectors, compute_low_rank_root(gram.float(), power, 0.01, relative, min(rank, 40)).vectors
        )
        settled = compute_low_rank_root(gram, power, 0.01, relative, rank, sweeps=15)
        assert error(dense(settled), expected) < 1e-9


@pytest.mark.parametrize("relative", RELATIVE)
def test_low_rank_is_its_definition(relative):
    gram = gram_of(torch.logspace(2, -2, 20, dtype=F64))
    for rank in (1, 3, 19, 20):
        root = compute_low_rank_root(lower_only(gram), 0.5, 0.01, relative, rank, sweeps=60)
        assert error(dense(root), slow_low_rank(gram, 0.5, 0.01, relative, rank)) < 1e-9


def test_low_rank_gets_better_with_rank_and_with_sweeps():
    gram = gram_of(torch.logspace(0, -3, 60, dtype=F64)).float()
    exact = slow_root(gram, 0.5, 1e-2, "mean")
    errors = [
        error(dense(compute_low_rank_root(gram, 0.5, 1e-2, "mean", rank)), exact)
        for rank in (1, 4, 16, 40, 60)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert errors[0] > 100 * errors[-1]
    best = slow_low_rank(gram, 0.5, 1e-2, "mean", 8)
    fresh = [
        error(dense(compute_low_rank_root(gram, 0.5, 1e-2, "mean", 8, sweeps=n)), best) for n in (1, 4, 8, 16)
    ]
    assert fresh[0] == fresh[1]  # at least four without a start
    assert fresh[1:] == sorted(fresh[1:], reverse=True)


@pytest.mark.parametrize("size", [LARGE, LARGE + 1])
def test_eigenpairs_of_a_large_matrix(size):
    directions = torch.linalg.qr(torch.randn(1, size, 3)).Q
    values = torch.tensor([9.0, 4.0, 1.0])
    whole = (directions * values) @ directions.mT
    lower = whole.tril() + torch.full_like(whole, 1e3).triu(1)  # only the lower triangle counts
    found, vectors = find_eigenpairs(lower, torch.ones(1, 1, 1), 3, None, 1)
    torch.testing.assert_close(found[0], values.flip(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((vectors * found) @ vectors.mT, whole, rtol=1e-4, atol=1e-4)


def test_a_warm_start_tracks_a_rotating_gram_in_one_sweep():
    torch.manual_seed(0)
    k, rank = 60, 8
    values = torch.cat([torch.linspace(1, 10, rank), torch.logspace(-1, -3, k - rank)]).double()
    turn = torch.randn(k, k, dtype=F64)
    turn = torch.linalg.matrix_exp(0.02 * (turn - turn.T) / k**0.5)
    basis = torch.linalg.qr(torch.randn(k, k, dtype=F64)).Q
    start, rest = None, None
    for step in range(30):
        gram = ((basis * values) @ basis.T)[None].float()
        root = compute_low_rank_root(gram, 0.5, 1e-2, "mean", rank, start)
        best = slow_low_rank(gram, 0.5, 1e-2, "mean", rank)
        assert error(dense(root), best) < 0.01, step
        rest = root if rest is None else rest
        # it may come back from a checkpoint in another dtype
        start, basis = root.vectors.to([F32, F64, torch.bfloat16][step % 3]), turn @ basis
    assert error(dense(rest), best) > 0.1  # what was tracked did move


def apply(root: Tensor | LowRankRoot, gradient: Tensor) -> Tensor:
    """An update of norm 1, in float64."""
    update = gradient.double() @ root if isinstance(root, Tensor) else multiply_by_root(gradient, root)
    return update.double() / update.double().norm()


@pytest.mark.parametrize("kind", ["flat", "smooth", "turned"])
def test_where_rows_exceed_the_rank_little_is_lost_but_what_is_left_out(kind):
    """Before, the directions of a second batch were found some refreshes later."""
    torch.manual_seed(0)
    k, rank, start = 150, 32, None
    basis = torch.linalg.qr(torch.randn(k, k)).Q
    gram = torch.zeros(1, k, k)
    for step in range(12):
        if kind == "turned" and step == 8:
            basis = torch.linalg.qr(torch.randn(k, k)).Q
        rows = torch.randn(25, k) if kind == "flat" else torch.randn(25, k) * torch.logspace(0, -2, k) @ basis
        gradient = torch.randn(1, 4, 25) @ rows
        gram = 0.95 * gram + rows.mT @ rows
        root = compute_low_rank_root(gram, 1, 1.0, "mean", rank, start)
        start = root.vectors
        wanted = apply(slow_root(gram, 1, 1.0, "mean"), gradient)
        lost = (apply(slow_low_rank(gram, 1, 1.0, "mean", rank), gradient) - wanted).norm()
        assert (apply(root, gradient) - wanted).norm() < 1.6 * lost + 1e-4, step


@pytest.mark.parametrize(("damping", "relative", "power"), [(0.1, "mean", 1), (1e-3, "max", 0.5)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_fewer_rows_than_the_rank_lose_no_digits(offset, damping, relative, power):
    torch.manual_seed(0)
    gram, start = torch.zeros(1, 300, 300), None
    for _ in range(4):
        rows = torch.randn(16, 300) + offset
        gradient = torch.randn(1, 4, 16) @ rows
        gram = 0.95 * gram + rows.mT @ rows
        root = compute_low_rank_root(gram, power, damping, relative, 128, start)
        start = root.vectors
        wanted = apply(slow_root(gram, power, damping, relative), gradient)
        wide = LowRankRoot(*(part.double() for part in vars(root).values()))
        assert (apply(wide, gradient.double()) - wanted).norm() < 5e-5


def test_a_start_that_does_not_fit_is_no_start():
    gram = gram_of(spectrum("log-spaced", 20)).float()
    fresh = compute_low_rank_root(gram, 0.5, 1e-2, "mean", 5)
    for start in (torch.randn(1, 20, 4), torch.randn(2, 20, 5), torch.full((1, 20, 5), math.nan)):
        assert same(compute_low_rank_root(gram, 0.5, 1e-2, "mean", 5, start).vectors, fresh.vectors)


def test_low_rank_groups_are_independent():
    gram = torch.cat([gram_of(spectrum(name, 15), i) for i, name in enumerate(SPECTRA)])
    batch = dense(compute_low_rank_root(lower_only(gram), 0.5, 1e-2, "mean", 4))
    for group, root in zip(gram, batch, strict=True):
        assert error(root[None], dense(compute_low_rank_root(group[None], 0.5, 1e-2, "mean", 4))) < 1e-9


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("relative", RELATIVE)
def test_low_rank_is_bounded_for_every_gram(relative, dtype):
    """Rank deficient without damping, zero, any scale: finite, and no gain above that of the noise floor."""
    eps = torch.finfo(dtype).eps
    for name in SPECTRA:
        for factor in (1e-16, 1e-8, 1.0, 1e8, 1e16):
            gram = (gram_of(spectrum(name, 15)) * factor).to(dtype)
            before = gram.clone()
            for damping in (0.0, 1e-3):
                for power in (1, 0.25):
                    for rank in (1, 4, 15):
                        root = compute_low_rank_root(gram, power, damping, relative, rank)
                        again = compute_low_rank_root(gram, power, damping, relative, rank, root.vectors)
                        for each in (dense(root), dense(again)):
                            largest = float(gram.abs().max())
                            if largest > 0:
                                assert each.abs().max() < 2 * (eps * largest) ** -power
            assert torch.equal(gram, before)


def test_low_rank_clamps_what_is_negative():
    """Rounding may make an eigenvalue, or the mean of the tail, negative: λ must not cancel it."""
    gram = gram_of(torch.tensor([3.0, 2.0, -0.05, -0.05], dtype=F64))
    for rank in (2, 4):
        root = compute_low_rank_root(gram, 1, 0.1, "absolute", rank, sweeps=20)
        expected = gram_of(1 / torch.tensor([3.1, 2.1, 0.1, 0.1], dtype=F64))
        assert error(dense(root), expected) < 1e-6


def test_low_rank_of_full_rank_needs_no_damping():
    gram = gram_of(spectrum("well conditioned", 12)).float()
    for rank in (12, 20):
        assert (
            error(dense(compute_low_rank_root(gram, 1, 0.0, "mean", rank)), slow_root(gram, 1, 0.0, "mean"))
            < 1e-5
        )


@pytest.mark.parametrize("relative", ["mean", "max"])
def test_low_rank_scale_equivariance(relative):
    gram = gram_of(spectrum("log-spaced", 20)).float()
    for power in (1, 0.5):
        root = dense(compute_low_rank_root(gram, power, 1e-2, relative, 6)).double()
        for factor in (1e-16, 1e-8, 1e8, 1e16):
            scaled = dense(compute_low_rank_root(gram * factor, power, 1e-2, relative, 6))
            assert error(scaled, root * factor**-power) < 1e-3


@pytest.mark.parametrize("relative", ["mean", "max", "absolute"])
@pytest.mark.parametrize("divisor", [40.0, torch.tensor(40.0, dtype=torch.float64)])
def test_a_divisor_does_what_division_does(relative, divisor):
    rows = torch.randn(1, 30, 12, dtype=torch.float64)
    gram = rows.mT @ rows
    whole, divided = (
        multiply_by_root(torch.eye(12, dtype=torch.float64).unsqueeze(0), root)
        for root in (
            compute_low_rank_root(gram, 0.5, 0.3, relative, 4, divisor=divisor),
            compute_low_rank_root(gram / 40, 0.5, 0.3, relative, 4),
        )
    )
    torch.testing.assert_close(whole, divided, rtol=1e-10, atol=1e-12)


def test_low_rank_of_zero_is_the_identity():
    for relative, damping in (("mean", 0.1), ("max", 0.1), ("absolute", 0.0)):
        root = compute_low_rank_root(lower_only(torch.zeros(2, 9, 9)), 0.5, damping, relative, 3)
        assert not root.weights.any()
        assert (root.scale == 1).all()
        assert torch.isfinite(root.vectors).all()
    root = compute_low_rank_root(torch.zeros(2, 9, 9), 0.5, 0.04, "absolute", 3)
    torch.testing.assert_close(dense(root), 5 * torch.eye(9).expand(2, 9, 9))


def test_times_root():
    gram = torch.cat([gram_of(spectrum(name, 10), i) for i, name in enumerate(SPECTRA)])
    x = torch.randn(len(SPECTRA), 7, 10, dtype=F64)
    before = x.clone()
    root = compute_inverse_root(gram, 0.5, 1e-2)
    torch.testing.assert_close(multiply_by_root(x, root), torch.einsum("gnk,gkl->gnl", x, root))
    low = compute_low_rank_root(gram, 0.5, 1e-2, "mean", 3)
    torch.testing.assert_close(multiply_by_root(x, low), torch.einsum("gnk,gkl->gnl", x, dense(low)))
    assert torch.equal(x, before)


def test_low_rank_gives_the_same_bits_twice_and_leaves_the_global_generator_alone():
    gram = gram_of(spectrum("log-spaced", 12))
    state = torch.get_rng_state()
    first, second = (compute_low_rank_root(gram, 0.5, 1e-2, "mean", 5) for _ in range(2))
    assert same(first.vectors, second.vectors)
    assert same(first.weights, second.weights)
    assert torch.equal(torch.get_rng_state(), state)
