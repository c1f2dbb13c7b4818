"""Inverse roots against a slow definition: float64 eigenvalues, one group at a time, no shortcuts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from plywise.numerics import events as names
from plywise.numerics import inverse_roots
from plywise.numerics.inverse_roots import compute_inverse_root
from plywise.numerics.low_rank import compute_low_rank_root

MODULE = "plywise.numerics.inverse_roots"
CONVERGED = [
    ("auto", 1), ("auto", 0.5), ("cholesky", 1), ("eigh", 1), ("eigh", 0.5), ("eigh", 0.25), ("eigh", 0.7),
    ("newton", 1), ("newton", 0.5), ("newton", 1 / 3), ("newton", 0.25),
]  # fmt: skip
ALL = [*CONVERGED, ("newton_schulz", 0.5)]
# ---- the converged solvers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("solver", "power"), CONVERGED)
def test_roots(solver, power, name):
    """Both dtypes, from the lower triangle alone; symmetric to the bit; no fallback.

    A small λ costs no digits of the Gram that is given. Those that it lost before may be counted.
    """
    for k in (1, 2, 7, 33):
        gram = gram_of(spectrum(name, k))
        for relative in RELATIVE:
            for damping in (1e-3, 0.1):
                for dtype, tolerance in ((F64, 1e-9), (F32, 5e-4 if damping < 0.1 else 5e-5)):
                    expected = slow_root(gram.to(dtype), power, damping, relative)
                    events: list[str] = []
                    given_gram = lower_only(gram.to(dtype))
                    before = given_gram.clone()
                    root = compute_inverse_root(given_gram, power, damping, relative, solver, events.append)
                    assert error(root, expected) < tolerance, (k, relative, damping, dtype)
                    assert root.dtype == dtype
                    assert torch.equal(root, root.mT)
                    assert set(events) <= ({names.ROUNDING} if dtype == F32 and damping < 0.1 else set())
                    assert torch.equal(given_gram.nan_to_num(-7), before.nan_to_num(-7))


def test_a_size_of_more_than_one_block():
    gram = gram_of(spectrum("log-spaced", 300))
    for solver, power in CONVERGED:
        root = compute_inverse_root(lower_only(gram), power, 1e-2, "mean", solver)
        assert error(root, slow_root(gram, power, 1e-2, "mean")) < 1e-10
        assert torch.equal(root, root.mT)


@pytest.mark.parametrize("power", [1, 0.5, 1 / 3, 0.25])
def test_newton_ends_at_the_root_or_says_that_it_did_not(power):
    """Of a float32 Gram whose rounding has made eigenvalues next to λ."""
    gram = gram_of(spectrum("rank one", 300)).float()
    root = compute_inverse_root(gram, power, 1e-5, "mean", "newton")
    assert error(root, compute_inverse_root(gram.double(), power, 1e-5, "mean", "eigh")) < 1e-6


@pytest.mark.parametrize("relative", RELATIVE)
@pytest.mark.parametrize(("solver", "power"), ALL)
def test_groups_are_independent(solver, power, relative):
    """A batch, with a zero and a constant gram among it, gives what each gives alone."""
    values = [spectrum(name, 9) * scale for name, scale in zip(SPECTRA, (1, 1e3, 1, 1, 1, 7), strict=True)]
    gram = lower_only(torch.cat([gram_of(v, seed) for seed, v in enumerate(values)]))
    batch = compute_inverse_root(gram, power, 1e-2, relative, solver)
    for group, root in zip(gram, batch, strict=True):
        alone = compute_inverse_root(group[None], power, 1e-2, relative, solver)
        assert error(root[None], alone) < 1e-10


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("relative", ["mean", "max"])
@pytest.mark.parametrize(("solver", "power"), ALL)
def test_scale_equivariance(solver, power, relative, dtype):
    """To rounding for any factor, to the bit for powers of four, in float32 too; no fallback on the way."""
    gram = lower_only(gram_of(spectrum("log-spaced", 12)).to(dtype))
    root = compute_inverse_root(gram, power, 1e-3, relative, solver)
    for factor in (1e-16, 1e-8, 0.3, 1e8, 1e16, 2.0**-40, 2.0**40):
        events: list[str] = []
        scaled = compute_inverse_root(gram * factor, power, 1e-3, relative, solver, events.append)
        # a factor such as 0.3 rounds the gram, and the root of its smallest eigenvalues feels it
        assert error(scaled, root.double() * factor**-power) < (1e-2 if dtype == F32 else 1e-10), factor
        assert set(events) <= ({names.ROUNDING} if dtype == F32 else set())
        if factor in (2.0**-40, 2.0**40) and power in (1, 0.5, 0.25):
            assert torch.equal(scaled, root * factor**-power)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(ALL),
    st.integers(1, 12),
    st.integers(0, 14),
    st.integers(-8, 8),
    st.sampled_from([0.0, 1e-12, 1e-6, 1e-2, 1.0]),
    st.sampled_from(RELATIVE),
    st.sampled_from([F32, F64]),
)
def test_every_gram_has_a_bounded_root(choice, k, rows, exponent, damping, relative, dtype):
    """Any rank, scale and damping: finite, symmetric, positive, no larger than the floor lets it."""
    solver, power = choice
    x = torch.randn(rows, k, dtype=dtype, generator=torch.Generator().manual_seed(rows * 100 + k))
    x = x * 10.0**exponent
    gram = (x.T @ x)[None]
    root = compute_inverse_root(lower_only(gram), power, damping, relative, solver)
    assert root is not None
    assert torch.isfinite(root).all()
    assert torch.equal(root, root.mT)
    values = torch.linalg.eigvalsh(root.double())[0]
    assert values.min() > -1e-5 * values.max()
    largest = float(torch.linalg.eigvalsh(gram.double())[0, -1])
    if largest > 0:
        shift = damping_of(gram[0].double(), damping, "absolute" if relative == "absolute" else "mean")
        # rounding: float32 may take a tenth off a λ that is at its rounding
        assert values.max() <= 1.5 * max(1e-12 * largest, shift / 2) ** -power


def test_methods_for_what_they_can_do():
    gram = torch.eye(3)[None]
    for solver, power in [
        ("cholesky", 0.5), ("newton", 0.3), ("newton", 2), ("newton_schulz", 1), ("newton_schulz", 0.25),
        ("newton", 1e12), ("eigh", 0), ("auto", -1), ("auto", math.nan),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="power must be"):
            compute_inverse_root(gram, power, 0.1, solver=solver)
    with pytest.raises(ValueError, match="unknown solver"):
        compute_inverse_root(gram, 1, 0.1, solver="qr")
    for f in (compute_inverse_root, lambda *a: compute_low_rank_root(*a, rank=1)):
        with pytest.raises(ValueError, match="unknown relative"):
            f(gram, 1, 0.1, "trace")
        with pytest.raises(ValueError, match="damping must not be negative"):
            f(gram, 1, -0.1, "mean")
    for power, rank, sweeps in [(0, 1, 1), (1, 0, 1), (1, 1, 0)]:
        with pytest.raises(ValueError, match="must be positive"):
            compute_low_rank_root(gram, power, 0.1, "mean", rank, sweeps=sweeps)


# ---- the published iteration ----------------------------------------------------------------------


def published(A: Tensor, damping: float, relative: str) -> Tensor:
    """AdaBK's power iteration and its ten Newton-Schulz steps, one matrix, literally."""
    k = len(A)
    v = torch.ones(k, dtype=A.dtype)
    for _ in range(10):
        v = A @ v / (A @ v).norm()
    largest = float((A @ v).norm())
    shift = {"max": largest, "mean": float(A.trace()) / k, "absolute": 1.0}[relative] * damping
    A = A + shift * torch.eye(k, dtype=A.dtype)
    Y, Z = A / A.trace(), torch.eye(k, dtype=A.dtype)
    for _ in range(10):
        T = 0.5 * (3 * torch.eye(k, dtype=A.dtype) - Z @ Y)
        Y = Y @ T
        Z = T @ Z
    return Z / A.trace().sqrt()


@pytest.mark.parametrize("relative", RELATIVE)
@pytest.mark.parametrize("name", ["well conditioned", "log-spaced", "rank one", "half rank", "constant"])
def test_newton_schulz_is_the_published_iteration(name, relative):
    for k in (2, 9, 40):
        gram = gram_of(spectrum(name, k))
        for damping in (1e-5, 1e-2, 1.0):
            expected = published(gram[0], damping, relative)[None]
            for dtype, tolerance in ((F64, 1e-11), (F32, 1e-4)):
                events: list[str] = []
                root = compute_inverse_root(
                    lower_only(gram.to(dtype)), 0.5, damping, relative, "newton_schulz", events.append
                )
                assert error(root, expected) < tolerance
                assert torch.equal(root, root.mT)
                assert events == []


def test_newton_schulz_has_not_converged_at_the_published_damping():
    """The gain of the smallest eigenvalues is capped at 1.5^10 / √trace; with a large λ it is the root."""
    gram = gram_of(spectrum("half rank", 40))

    def gains(damping: float) -> tuple[Tensor, Tensor]:
        root = compute_inverse_root(gram, 0.5, damping, "mean", "newton_schulz")
        return torch.linalg.eigvalsh(root)[0], torch.linalg.eigvalsh(slow_root(gram, 0.5, damping, "mean"))[0]

    actual, exact = gains(1e-5)
    cap = 1.5**10 / float(gram.diagonal(dim1=1, dim2=2).sum()) ** 0.5
    assert actual.max() < cap
    assert actual.max() > 0.95 * cap
    assert actual.max() < exact.max() / 10
    for damping, tolerance in ((0.3, 1e-4), (1.0, 1e-10)):
        actual, exact = gains(damping)
        assert ((actual - exact).abs() / exact).max() < tolerance


def test_the_published_largest_eigenvalue_is_an_estimate():
    """The power iteration starts from ones: of what is orthogonal to them it knows nothing, and ends at 0."""
    v = torch.tensor([1.0, -1.0, 0.0], dtype=F64)
    root = compute_inverse_root(torch.outer(v, v)[None], 0.5, 0.5, "max", "newton_schulz")
    plain = compute_inverse_root(torch.outer(v, v)[None], 0.5, 0.0, "max", "newton_schulz")
    assert same(root, plain)
    assert torch.isfinite(root).all()
    gram = gram_of(torch.linspace(0.9, 1.0, 8, dtype=F64))
    assert (
        error(compute_inverse_root(gram, 0.5, 1.0, "max", "newton_schulz"), slow_root(gram, 0.5, 1.0, "max"))
        > 1e-4
    )


# ---- guards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "power"), CONVERGED)
def test_a_damping_below_float32_rounding_is_solved_in_float64(solver, power):
    gram = gram_of(torch.logspace(0, -6, 8, dtype=F64)).float()
    for relative in RELATIVE:
        events: list[str] = []
        root = compute_inverse_root(lower_only(gram), power, 1e-9, relative, solver, events.append)
        assert events == [names.ROUNDING]  # of the statistic: it was float32 already
        assert error(root, slow_root(gram, power, 1e-9, relative)) < 1e-6
        assert root.dtype == F32
        assert torch.equal(root, root.mT)


@pytest.mark.parametrize(("solver", "power"), CONVERGED)
def test_without_damping_a_full_rank_is_no_fallback_in_float64(solver, power):
    for values in (torch.linspace(1, 3, 8, dtype=F64), torch.logspace(0, -6, 8, dtype=F64)):
        gram, events = gram_of(values), []
        root = compute_inverse_root(gram, power, 0.0, "mean", solver, events.append)
        assert error(root, slow_root(gram, power, 0.0, "mean")) < 1e-8
        assert events == []


@pytest.mark.parametrize(("solver", "power"), CONVERGED)
def test_a_damping_just_above_the_floor_is_no_fallback_in_float64(solver, power):
    gram, events = gram_of(spectrum("half rank", 40)), []
    root = compute_inverse_root(gram, power, 1e-9, "mean", solver, events.append)
    assert error(root, slow_root(gram, power, 1e-9, "mean")) < 1e-4
    assert events == []


@pytest.mark.parametrize("name", ["rank one", "half rank", "just rounding"])
@pytest.mark.parametrize(("solver", "power"), CONVERGED)
def test_without_damping_rounding_is_never_divided_by(solver, power, name):
    """Rank deficient and λ = 0, or eigenvalues below the floor: clamped, so bounded, whatever their sign."""
    k = 12
    values = spectrum(name, k) if name != "just rounding" else torch.logspace(0, -15, k, dtype=F64)
    for seed in range(4):
        gram, events = gram_of(values, seed), []
        root = compute_inverse_root(lower_only(gram), power, 0.0, "mean", solver, events.append)
        assert events == [names.EIGENVALUES]
        floor = 1e-12 * float(values.max())
        expected = gram_of(values.clamp_min(floor) ** -power, seed)
        assert error(root, expected) < 1e-4  # rounding over the floor, 1e-16 / 1e-12


@pytest.mark.parametrize(("solver", "power"), ALL)
def test_an_indefinite_gram_has_its_eigenvalues_clamped(solver, power):
    if solver == "newton_schulz":
        pytest.skip("takes whatever comes: its gain is bounded by the number of steps")
    gram = gram_of(torch.tensor([3.0, 2.0, 1.0, -0.5], dtype=F64))
    for dtype in (F32, F64):
        events: list[str] = []
        root = compute_inverse_root(gram.to(dtype), power, 0.1, "absolute", solver, events.append)
        assert events == [names.EIGENVALUES]
        expected = gram_of(torch.tensor([3.1, 2.1, 1.1, 0.1], dtype=F64) ** -power)
        assert error(root, expected) < 1e-5


@pytest.mark.parametrize(
    ("solver", "power", "where", "what"),
    [
        ("cholesky", 1, "torch.linalg.cholesky_ex", lambda a: (a, torch.ones(len(a), dtype=torch.int32))),
        ("cholesky", 1, "torch.cholesky_inverse", lambda a: a * math.nan),
        ("newton", 0.5, f"{MODULE}.NEWTON_STEPS", 3),
        ("newton_schulz", 0.5, f"{MODULE}._estimate_largest", lambda a: a[:, 0, 0] * math.nan),
    ],
)  # fmt: skip
def test_a_solver_that_fails_hands_over(monkeypatch, solver, power, where, what):
    gram = gram_of(spectrum("well conditioned", 6))
    expected = slow_root(gram, power, 0.1, "max")
    monkeypatch.setattr(where, what)
    for dtype, event in ((F32, names.FLOAT64), (F64, names.EIGENVALUES)):
        events: list[str] = []
        root = compute_inverse_root(gram.to(dtype), power, 0.1, "max", solver, events.append)
        assert events == [event]
        assert error(root, expected) < 1e-6


def test_eigenvalues_that_do_not_converge(monkeypatch):
    """In float32: float64. In float64 too: there is no root."""
    gram, eigh = gram_of(spectrum("well conditioned", 6)), torch.linalg.eigh

    def fails_for(dtypes):
        def f(matrix):
            if matrix.dtype in dtypes:
                raise torch.linalg.LinAlgError("no convergence")
            return eigh(matrix)

        return f

    expected = slow_root(gram, 0.5, 0.1, "mean")
    monkeypatch.setattr(torch.linalg, "eigh", fails_for([F32]))
    events: list[str] = []
    assert error(compute_inverse_root(gram.float(), 0.5, 0.1, note=events.append), expected) < 1e-6
    assert events == [names.FLOAT64]
    assert compute_low_rank_root(gram.float(), 0.5, 0.1, "mean", 2) is None
    monkeypatch.setattr(torch.linalg, "eigh", fails_for([F32, F64]))
    assert compute_inverse_root(gram.float(), 0.5, 0.1, note=events.append) is None
    assert events == [names.FLOAT64, names.IDENTITY]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 2, 2), (1, 3, 1), (0, 3, 3)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_gram_that_is_not_finite_has_no_root(bad, where, dtype):
    gram = torch.cat([gram_of(spectrum("well conditioned", 4)), gram_of(spectrum("constant", 4))]).to(dtype)
    good = compute_low_rank_root(gram, 0.5, 0.1, "mean", 2)
    gram[where] = bad
    for relative in RELATIVE:
        for solver, power in ALL:
            events: list[str] = []
            assert compute_inverse_root(gram, power, 0.1, relative, solver, events.append) is None
            assert events == [names.NON_FINITE]
        assert compute_low_rank_root(gram, 0.5, 0.1, relative, 2) is None
        assert compute_low_rank_root(gram, 0.5, 0.1, relative, 2, good.vectors) is None


@pytest.mark.parametrize(("solver", "power"), ALL)
def test_a_gram_of_zeros_has_the_identity(solver, power):
    eye = torch.eye(70, dtype=F32)[None]
    for damping in (0.0, 0.1):
        for relative in ("mean", "max"):
            events: list[str] = []
            zero = lower_only(torch.zeros(1, 70, 70))
            assert same(compute_inverse_root(zero, power, damping, relative, solver, events.append), eye)
            assert events == []
    assert same(compute_inverse_root(torch.zeros(1, 70, 70), power, 0.0, "absolute", solver), eye)
    if solver != "newton_schulz":  # an absolute λ is something to divide by
        root = compute_inverse_root(torch.zeros(1, 70, 70), power, 1e-4, "absolute", solver)
        assert error(root, eye * 1e-4**-power) < 1e-5


def test_the_same_bits_twice_and_the_global_generator_untouched():
    gram = lower_only(gram_of(spectrum("log-spaced", 20)).float())
    state = torch.get_rng_state()
    for solver, power in ALL:
        assert same(*(compute_inverse_root(gram, power, 1e-2, solver=solver) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_constants_are_the_documented_ones():
    """Ten steps of each are the published ones; the floor is that of `least_squares`."""
    assert (inverse_roots.SCHULZ_STEPS, inverse_roots.POWER_STEPS, inverse_roots.NOISE) == (10, 10, 1e-12)
