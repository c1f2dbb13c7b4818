"""The guarded solver against a slow definition that forms no Gram, and its fallbacks."""

import math

import pytest
import torch
from torch import Tensor

from plywise.numerics.events import EIGENVALUES, FLOAT64, IDENTITY
from plywise.numerics.least_squares import (
    CentredSystem,
    find_power_of_two,
    solve_damped,
    solve_damped_with_bias,
)

from .problems import F32, F64, Problem, draw_delta, draw_rows, relative, with_ones

SHAPES = [  # groups, rows, columns, right-hand sides
    (1, 12, 5, 3),
    (1, 6, 9, 4),
    (1, 6, 6, 3),
    (1, 4, 7, 11),
    (1, 10, 13, 2),
    (1, 90, 60, 7),
    (1, 50, 70, 7),
    (1, 90, 40, 60),
    (1, 40, 90, 60),
    (3, 12, 5, 3),
    (3, 4, 9, 2),
    (7, 30, 9, 1),
    (200, 10, 2, 1),
    (200, 10, 1, 3),
    (2, 1, 2, 2),
    (1, 300, 140, 2),
]


def make_problem(shape: tuple[int, ...], damping: float = 1.0, kind: str = "normal") -> Problem:
    groups, n, k, c = shape
    rows = draw_rows(kind, n, k, 1, groups).double()
    return Problem(rows, draw_delta("normal", rows, c).double(), damping)


# ---- the answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_are_the_definition(shape):
    for damping in (1e-3, 1.0, 50.0):
        problem = make_problem(shape, damping)
        answer, events = problem.solve()
        assert relative(answer, problem.slow_solution()) < 1e-10
        assert events == []
        problem = Problem(problem.rows.float(), problem.delta.float(), damping)
        answer, events = problem.solve()
        assert answer.dtype == F32
        assert relative(answer, problem.slow_solution()) < 1e-4
        assert events == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_with_a_bias_are_the_definition(shape):
    for damping in (1e-3, 1.0, 50.0):
        problem = make_problem(shape, damping, "3")
        answer, events = problem.solve_with_bias()
        assert relative(answer, problem.with_ones().slow_solution()) < 1e-10
        assert events == []


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=str)
def test_a_damping_for_each_group(shape):
    problem = make_problem(shape)
    damping = torch.linspace(0.5, 2.0, shape[0], dtype=F64)
    answer, _ = problem.solve(damping)
    with_bias, _ = problem.solve_with_bias(damping)
    for g, value in enumerate(damping.tolist()):
        one = Problem(problem.rows[g : g + 1], problem.delta[g : g + 1], value)
        assert relative(answer[g : g + 1], one.slow_solution()) < 1e-10
        assert relative(with_bias[g : g + 1], one.with_ones().slow_solution()) < 1e-10


@pytest.mark.parametrize("shape", [(1, 12, 5, 3), (1, 5, 40, 3), (3, 12, 5, 3)], ids=str)
def test_every_kind_of_damping(shape):
    problem = make_problem(shape, 0.7)
    expected, _ = problem.solve()
    for damping in (torch.tensor(0.7), torch.full((shape[0],), 0.7), lambda gram: 0.7):
        assert relative(problem.solve(damping)[0], expected) < 1e-7
    relative_damping, _ = problem.solve(lambda gram: 0.1 * gram.diagonal(dim1=1, dim2=2).mean(1))
    means = problem.rows.square().sum((1, 2)) / min(shape[1:3])
    assert relative(relative_damping, problem.solve(0.1 * means)[0]) < 1e-12


def test_nothing_above_the_diagonal_is_needed():
    problem = make_problem((1, 90, 60, 7))
    gram, right = problem.build(F32)
    mirrored = solve_damped(lambda _: (gram.tril() + gram.tril(-1).mT, right), 1.0, F32, pytest.fail)
    lower = solve_damped(lambda _: (gram.tril(), right), 1.0, F32, pytest.fail)
    assert torch.equal(mirrored, lower)


def test_no_columns_no_unknowns():
    for shape in [(2, 3, 0), (2, 0, 3)]:
        right = torch.ones(shape)
        gram = torch.zeros(2, shape[1], shape[1])
        answer = solve_damped(lambda _, g=gram, r=right: (g, r), 1.0, F32, pytest.fail)
        assert answer.shape == shape


# ---- the guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [100, 1000, 3000, 10000])
@pytest.mark.parametrize("shape", [(1, 6, 3, 2), (1, 3, 20, 2), (1, 300, 20, 4), (1, 64, 200, 4)], ids=str)
def test_an_offset_of_the_inputs(shape, offset):
    """Rows ``c + noise`` and a bias: the plain system needs float64 and says so, the centred one does not."""
    groups, n, k, c = shape
    rows = draw_rows(str(offset), n, k, 1, groups)
    problem = Problem(rows, draw_delta("normal", rows, c), 1.0)
    expected = problem.with_ones().slow_solution()
    answer, events = problem.with_ones().solve()
    assert relative(answer, expected) < 1e-6
    assert events == [FLOAT64]
    answer, events = problem.solve_with_bias()
    assert relative(answer, expected) < 1e-4
    assert events == []
    assert answer.dtype == F32


@pytest.mark.parametrize("kind", ["normal", "relu", "pixels"])
@pytest.mark.parametrize("n", [64, 300])
def test_usual_layers_are_solved_in_float32(kind, n):
    """λ = 1, as ProxProp has it."""
    for k in (8, 33, 65, 128, 257, 299, 301, 600, 1500):
        rows = draw_rows(kind, n, k, k)
        problem = Problem(rows, draw_delta("normal", rows, 10) / n, 1.0)
        answer, events = problem.solve_with_bias()
        assert events == [], k
        if k < 600:
            assert relative(answer, problem.with_ones().slow_solution()) < 5e-5
        # where n and k are close and large, the plain system loses more than 1e-4
        near = 0.7 * n < k < 1.4 * n and n > 200
        if kind == "normal" or not near:
            assert problem.with_ones().solve()[1] == [], k


def test_a_well_conditioned_system_is_built_once():
    problem = Problem(draw_rows("pixels", 64, 20), torch.randn(1, 64, 3), 1.0)
    dtypes = []
    build = lambda dtype: dtypes.append(dtype) or problem.build(dtype)  # noqa: E731
    solve_damped(build, 1.0, F32, pytest.fail)
    assert dtypes == [F32]


@pytest.mark.parametrize(("n", "k"), [(200, 50), (20, 50)])
def test_an_indefinite_float32_gram_is_solved_in_float64(n, k):
    rows = draw_rows("1000", n, k)
    problem = Problem(with_ones(rows), draw_delta("normal", rows, 4), 0.01)
    answer, events = problem.solve()
    assert events == [FLOAT64]
    assert answer.dtype == F64
    assert relative(answer, problem.slow_solution()) < 1e-6


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-300])
def test_a_singular_gram_has_the_solution_of_minimum_norm(dual, damping, dtype):
    x = torch.zeros(1, 9, 4, dtype=dtype)
    x[0, 0, :2], x[0, 1, 2], x[0, 2, 3] = 2, 1, 4  # two columns alike
    x = x.mT.contiguous() if dual else x
    problem = Problem(x, torch.randn(1, x.shape[1], 3, dtype=dtype), damping)
    answer, events = problem.solve()
    assert events == [EIGENVALUES]
    assert relative(answer, torch.linalg.pinv(x.double()) @ problem.delta.double()) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_without_damping_rounding_is_never_divided_by(seed):
    """A Gram whose rank is too low by chance: its pivots are rounding, positive or not."""
    rows = (draw_rows("normal", 40, 5, seed) @ torch.randn(5, 12)).double()
    problem = Problem(rows, draw_delta("normal", rows, 3, seed).double(), 0.0)
    answer, events = problem.solve()
    assert events == [EIGENVALUES]
    expected = torch.linalg.pinv(rows, rtol=1e-6) @ problem.delta
    assert relative(answer, expected) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(1, 12, 6, 3), (1, 4, 6, 3), (3, 30, 2, 1), (1, 90, 60, 3)], ids=str)
def test_what_is_not_finite_has_no_answer(shape, dtype, bad):
    for which in ("rows", "delta"):
        problem = make_problem(shape)
        problem = Problem(problem.rows.to(dtype), problem.delta.to(dtype), 1.0)
        getattr(problem, which)[-1, 1, 0] = bad
        assert problem.solve() == (None, [IDENTITY])
        assert problem.solve_with_bias() == (None, [IDENTITY])


def test_eigenvalues_that_do_not_converge(monkeypatch):
    def fail(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    problem = Problem(torch.ones(1, 9, 4), torch.randn(1, 9, 2), 0.0)
    assert problem.solve() == (None, [IDENTITY])


def test_one_bad_group_among_many():
    rows = torch.randn(500, 30, 2)
    rows[7, :, 1] = rows[7, :, 0] * (1 + 1e-5 * torch.randn(30))
    problem = Problem(rows, torch.randn(500, 30, 1), 1e-6)
    answer, events = problem.solve()
    assert events == [FLOAT64]
    assert relative(answer, problem.slow_solution()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 90, 60, 7), (1, 50, 70, 7), (7, 30, 9, 1), (1, 64, 9, 4)], ids=str)
def test_the_same_bits_twice_and_the_global_generator_untouched(shape):
    problem = make_problem(shape)
    state = torch.get_rng_state()
    first, second = problem.solve()[0], problem.solve()[0]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


# ---- degenerate problems ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "shape", [(1, 7, 3, 2), (1, 3, 7, 2), (1, 1, 2, 2), (1, 60, 40, 3), (5, 9, 2, 1)], ids=str
)
def test_zero_rows_have_the_answer_zero(shape, dtype):
    groups, n, k, c = shape
    problem = Problem(torch.zeros(groups, n, k, dtype=dtype), torch.randn(groups, n, c, dtype=dtype), 0.0)
    for damping in (0.0, 0.1, torch.zeros(groups), lambda gram: 0.1 * gram.diagonal(dim1=1, dim2=2).sum(1)):
        answer, events = problem.solve(damping)
        assert not answer.any()
        assert events == []
        answer, events = problem.solve_with_bias(damping)
        assert not answer[:, :k].any()
        assert events == []
        value = damping if isinstance(damping, float) else 0.0
        expected = problem.delta.sum(1) / (n + value)
        torch.testing.assert_close(answer[:, k], expected.to(answer.dtype))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(3, 20, 4, 2), (3, 4, 20, 2), (6, 20, 2, 1)], ids=str)
def test_a_zero_group_among_others(shape, dtype):
    problem = make_problem(shape)
    problem.rows[1] = 0
    problem = Problem(problem.rows.to(dtype), problem.delta.to(dtype), 0.0)
    damping = lambda gram: 0.1 * gram.diagonal(dim1=1, dim2=2).mean(1)  # noqa: E731
    answer, events = problem.solve(damping)
    assert events == []
    assert not answer[1].any()
    for g in (0, 2):
        one = Problem(problem.rows[g : g + 1], problem.delta[g : g + 1], 0.0)
        alone, _ = one.solve(damping)
        assert relative(answer[g : g + 1], alone.double()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 12, 5, 3), (1, 5, 40, 3), (3, 12, 5, 3), (1, 90, 60, 3)], ids=str)
def test_zero_gradients_have_the_answer_zero(shape):
    problem = Problem(make_problem(shape).rows.float(), torch.zeros(shape[0], shape[1], shape[3]), 1.0)
    for answer, events in (problem.solve(), problem.solve_with_bias()):
        assert answer.dtype == F32
        assert not answer.any()
        assert events == []


@pytest.mark.parametrize("shape", [(1, 30, 5, 3), (1, 5, 40, 3)], ids=str)
def test_columns_without_a_mean(shape):
    problem = make_problem(shape)
    rows = torch.cat([problem.rows, -problem.rows], 1)
    problem = Problem(rows, torch.cat([problem.delta, problem.delta + 1], 1), 0.3)
    answer, events = problem.solve_with_bias()
    assert events == []
    assert relative(answer, problem.with_ones().slow_solution()) < 1e-10


@pytest.mark.parametrize(("n", "k"), [(8, 5), (3, 5)])
def test_rank_one_rows(n, k):
    rows = torch.randn(1, n, 1, dtype=F64) * torch.randn(1, 1, k, dtype=F64)
    problem = Problem(rows, torch.randn(1, n, 2, dtype=F64), 0.5)
    expected = problem.with_ones().slow_solution()
    for answer, events in (problem.with_ones().solve(), problem.solve_with_bias()):
        assert relative(answer, expected) < 1e-10
        assert events == []


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (5, 2), (7, 3), (64, 20), (5, 20), (33, 200)])
def test_constant_rows_make_no_giant_step(n, k, dtype):
    """All samples alike: what centring leaves is rounding, and must not become a direction."""
    for value in (0.1, 0.3, 0.7, 1000.7):
        rows = torch.full((1, n, k), value, dtype=dtype)
        problem = Problem(rows, torch.randn(1, n, 3, dtype=dtype), 1.0)
        expected = problem.with_ones().slow_solution()
        for answer, _ in (problem.solve_with_bias(), problem.with_ones().solve()):
            assert relative(answer, expected) < (1e-4 if dtype == F32 else 1e-5), value


@pytest.mark.parametrize("copies", [2, 3])
def test_samples_twice_are_no_obstacle(copies):
    """With almost no damping, duplicates change nothing."""
    rows, delta = torch.randn(1, 4, 9, dtype=F64), torch.randn(1, 4, 2, dtype=F64)
    once, _ = Problem(rows, delta, 1e-8).solve()
    again, _ = Problem(rows.repeat(1, copies, 1), delta.repeat(1, copies, 1), 1e-8).solve()
    assert relative(again, once) < 1e-6


def test_a_dual_system_with_a_bias_needs_the_projected_mean():
    system = CentredSystem(torch.eye(2)[None], torch.ones(1, 2, 1), torch.ones(1, 3), torch.ones(1, 1), 2)
    with pytest.raises(ValueError, match="projected"):
        solve_damped_with_bias(lambda _: system, 1.0, F32, pytest.fail, dual=True)


# ---- scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e19, 1e30])
@pytest.mark.parametrize("shape", [(1, 12, 5, 3), (1, 5, 40, 3), (3, 12, 2, 3), (1, 90, 60, 3)], ids=str)
def test_any_scale_of_the_inputs(shape, scale):
    """Squares leave the range of float32 and are solved in float64; a power of two keeps them inside."""
    plain = make_problem(shape)
    rows, delta = plain.rows.float(), plain.delta.float()
    expected = Problem(rows, delta, 0.1).slow_solution()
    problem = Problem(rows * scale, delta, 0.0)

    def damping(gram: Tensor) -> Tensor:
        return torch.full((shape[0],), 0.1, dtype=gram.dtype) * scale * scale

    answer, events = problem.solve(damping)
    assert set(events) <= {FLOAT64}
    assert relative(answer.double() * scale, expected) < 1e-4
    s = find_power_of_two(problem.rows, 0.1 * scale * scale)
    inside = Problem(problem.rows / s[:, None, None], delta, 0.0)
    answer, events = inside.solve(0.1 * scale / s.double() * scale / s.double())
    assert events == []
    assert relative(answer.double() / s.double()[:, None, None] * scale, expected) < 1e-4


def test_powers_of_two():
    rows = torch.tensor([[3.0, -5.0], [0.1, 0.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [1e30, 0]])
    expected = torch.tensor([4, 2.0**-4, 1, 1, 1, 2.0**99])
    s = find_power_of_two(rows.unsqueeze(1))
    assert torch.equal(s, expected)
    assert torch.equal(rows[:3] / s[:3, None] * s[:3, None], rows[:3])
    assert find_power_of_two(torch.full((1, 1, 2), 1e-30), 16.0) == 4
    assert torch.equal(
        find_power_of_two(torch.ones(2, 1, 1), torch.tensor([4.0, 1e-9])), torch.tensor([2.0, 1])
    )
    tiny = torch.full((1, 1, 1), 1e-42)
    assert torch.isfinite(tiny / find_power_of_two(tiny))


# ---- real sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "c", "tau"),
    [
        (256, 784, 300, 1.0),
        (256, 784, 9, 0.05),
        (500, 1000, 100, 1.0),
        (500, 400, 9, 0.05),
        (500, 400, 100, 1.0),
    ],
)
def test_float32_is_accurate_at_real_sizes(n, k, c, tau):
    rows = draw_rows("pixels", n, k)
    problem = Problem(rows, draw_delta("normal", rows, c) / n, 1 / tau)
    exact = problem.with_ones()
    A = exact.rows[0].double()
    dual = torch.linalg.solve(A @ A.T + torch.eye(n, dtype=F64) / tau, problem.delta[0].double())
    answer, events = problem.solve_with_bias()
    assert events == []
    assert relative(answer, (A.T @ dual).unsqueeze(0)) < 2e-5
    answer, _ = exact.solve()
    assert relative(answer, (A.T @ dual).unsqueeze(0)) < 1e-4
