"""Every guarded solver against a slow definition: dense matrices in float64, torch.linalg, no shortcuts."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import plywise as pw
from plywise.engine.call import LinearCall, Update
from plywise.rules import _least_squares as solve
from plywise.rules._conjugate_gradients import conjugate_gradients, official_conjugate_gradients

F64 = torch.float64

LAYERS = {
    "n > d": lambda: (nn.Linear(5, 3), (12, 5)),
    "n > d, no bias": lambda: (nn.Linear(5, 3, bias=False), (12, 5)),
    "n < d": lambda: (nn.Linear(9, 4), (6, 9)),
    "n < d, no bias": lambda: (nn.Linear(9, 4, bias=False), (6, 9)),
    "n = d + 1": lambda: (nn.Linear(5, 3), (6, 5)),
    "n < d < m": lambda: (nn.Linear(7, 11), (4, 7)),
    "n < d < m, no bias": lambda: (nn.Linear(7, 11, bias=False), (4, 7)),
    "4 m < n < d": lambda: (nn.Linear(13, 2), (10, 13)),
    "one sample, no batch": lambda: (nn.Linear(4, 3), (4,)),
    "sequences": lambda: (nn.Linear(4, 3), (3, 5, 4)),
    "conv, n > d": lambda: (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 4)),
    "conv, groups, stride": lambda: (nn.Conv2d(4, 6, 2, stride=2, groups=2, padding=1), (3, 4, 4, 5)),
    "conv, groups, n < d, no bias": lambda: (nn.Conv2d(4, 2, 3, groups=2, bias=False), (1, 4, 4, 5)),
    "conv, n < d": lambda: (nn.Conv2d(3, 4, 3, stride=2), (2, 3, 5, 5)),
    "conv, depthwise, dilated": lambda: (nn.Conv1d(3, 3, 3, groups=3, dilation=2), (4, 3, 8)),
    "conv, reflect": lambda: (nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 2, 6)),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=LAYERS, ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, LinearCall]:
    """A layer, its input, the gradient at its output, and its local problem as a backward makes it."""
    torch.manual_seed(3)
    layer, shape = LAYERS[request.param]()
    x = torch.randn(shape)
    delta = torch.randn_like(layer(x))
    return layer, x, delta, ply_of(layer, x, delta)


def ply_of(layer: nn.Module, x: Tensor, delta: Tensor) -> LinearCall:
    seen = []
    rule = pw.Backprop().attach(layer, on_nonfinite="propagate")
    with rule.observing(lambda ply, move, below: seen.append(ply)):
        (layer(x.clone().requires_grad_()) * delta).sum().backward()
    rule.detach()
    ply = seen[0]
    return replace(ply, a=ply.a.detach(), weight=ply.weight.detach())


def jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    """Of all outputs by all parameters, weight then bias: it knows neither patches nor groups."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    blocks = jacrev(lambda p: functional_call(layer, p, x).flatten())(parameters)
    return torch.cat([block.flatten(1) for block in blocks.values()], 1)


def slow_ridge(layer: nn.Module, x: Tensor, delta: Tensor, damping: float | Tensor) -> Tensor:
    """``argmin_D ½‖J D - Δ‖² + λ/2‖D‖²``; damping a number, or one for each parameter."""
    J = jacobian(layer, x)
    return torch.linalg.solve(J.T @ J + damping * torch.eye(J.shape[1]), J.T @ delta.flatten())


def columns_of(layer: nn.Module, x: Tensor, delta: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each output channel: rows [a, 1], deltas, and where its parameters are among all."""
    J = jacobian(layer, x)
    channel_dim = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    weight = layer.weight
    channel = torch.arange(weight.shape[0])
    of_output = channel.reshape([-1 if d == channel_dim % delta.dim() else 1 for d in range(delta.dim())])
    of_output = of_output.expand(delta.shape).flatten()
    of_parameter = channel.repeat_interleave(weight[0].numel())
    if layer.bias is not None:
        of_parameter = torch.cat([of_parameter, channel])
    out = []
    for c in channel:
        rows, where = (of_output == c).nonzero()[:, 0], (of_parameter == c).nonzero()[:, 0]
        out.append((J[rows][:, where], delta.flatten()[rows], where))
    return out


def flat(move: Update) -> Tensor:
    return torch.cat([part.flatten() for part in (move.weight, move.bias) if part is not None])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)
    assert error <= tolerance, f"relative error {error:.1e}"


# ---- ridge -------------------------------------------------------------------------------------


def test_ridge(problem):
    layer, x, delta, ply = problem
    for damping in (1e-3, 1.0, 50.0):
        close(flat(solve.ridge(ply, damping)), slow_ridge(layer, x, delta, damping))
    assert not ply.health.counts


def test_ridge_with_a_damping_for_each_group(problem):
    layer, x, delta, ply = problem
    damping = torch.linspace(0.5, 2.0, ply.groups)
    each = torch.empty_like(flat(ply.gradient()))
    for c, (_, _, where) in enumerate(columns_of(layer, x, delta)):
        each[where] = damping[c // ply.outputs]
    close(flat(solve.ridge(ply, damping)), slow_ridge(layer, x, delta, each))


def test_ridge_centred(problem):
    layer, x, delta, ply = problem
    if ply.row_count == 1:
        pytest.skip("nothing to centre: see test_solve_fallbacks.py")
    move = solve.ridge_centred(ply, 0.3)
    groups = list(zip(*[iter(columns_of(layer, x, delta))] * ply.outputs, strict=True))
    weight, bias = [], []
    for group in groups:
        A = group[0][0][:, : ply.width]
        D = torch.stack([delta_c for _, delta_c, _ in group], 1)
        centred = A - A.mean(0)
        damping = 0.3 * centred.square().sum() / min(A.shape)
        V = torch.linalg.solve(centred.T @ centred + damping * torch.eye(ply.width), centred.T @ D)
        weight.append(V.T.flatten())
        bias.append((D - A @ V).mean(0))
    close(move.weight.flatten(), torch.cat(weight))
    close(move.bias, torch.cat(bias))


def test_ridge_centred_without_damping_is_least_squares_with_a_bias():
    torch.manual_seed(0)
    x, delta = torch.randn(30, 6) + 2, torch.randn(30, 3)
    move = solve.ridge_centred(ply_of(nn.Linear(6, 3), x, delta), 1e-14)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], 1), delta).solution.T
    close(torch.cat([move.weight, move.bias[:, None]], 1), expected)


# ---- conjugate gradients -------------------------------------------------------------------------


def textbook(A: Tensor, b: Tensor, damping: float, steps: int) -> Tensor:
    """Hestenes and Stiefel on one vector, from zero."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(steps):
        Mp = A.T @ (A @ p) + damping * p
        alpha = (r @ r) / (p @ Mp)
        x = x + alpha * p
        new = r - alpha * Mp
        p = new + (new @ new) / (r @ r) * p
        r = new
    return x


def published(A: Tensor, G: Tensor, damping: float, steps: int) -> tuple[Tensor, int]:
    """ProxProp's iteration as published, one column for each system, for the change of the weights.

    `p = r` without a copy, and `r -= ...` in place: that is the alias. After the first step p is a tensor
    of its own. The second value is the number of the step it stopped at.
    """
    x = torch.zeros_like(G)
    r = G.clone()
    p = r
    old = r.norm(dim=0) ** 2
    scale = old.mean()
    k = 0
    while True:
        k += 1
        Mp = A.T @ (A @ p) + damping * p
        alpha = old / ((p * Mp).sum(0) + 1e-6)
        x += p * alpha
        if k == steps:
            return x, k
        r -= Mp * alpha
        new = r.norm(dim=0) ** 2
        if new.max() < 1e-2**2 * scale:
            return x, k
        p = r + p * (new / (old + 1e-6))
        old = new


def test_conjugate_gradients(problem):
    """Rows fewer and more than columns: two systems of coordinates, one sequence of iterates."""
    layer, x, delta, ply = problem
    expected = torch.zeros_like(flat(ply.gradient()))
    systems = columns_of(layer, x, delta)
    for steps in (1, 2, 3, 5):
        if steps > min(systems[0][0].shape):
            break  # converged: the textbook divides zero by zero
        for A, delta_c, where in systems:
            expected[where] = textbook(A, A.T @ delta_c, 0.7, steps)
        close(flat(conjugate_gradients(ply, 0.7, steps)), expected, 1e-9)


def test_conjugate_gradients_converge_and_then_rest(problem):
    layer, x, delta, ply = problem
    steps = min(ply.row_count, ply.columns) + 12
    close(flat(conjugate_gradients(ply, 0.7, steps)), slow_ridge(layer, x, delta, 0.7), 1e-8)


@pytest.mark.parametrize("size", [1.0, 1e-3])  # 1e-3: squared gradients of 1e-6, where the epsilon rules
def test_official_conjugate_gradients(problem, size):
    layer, x, delta, ply = problem
    delta = delta * size
    ply = ply_of(layer, x, delta)
    J, systems = jacobian(layer, x), columns_of(layer, x, delta)
    gradient = J.T @ delta.flatten()
    for steps in (1, 2, 3, 4, 10):
        if isinstance(layer, nn.modules.conv._ConvNd):  # one flat vector
            expected = published(J, gradient[:, None], 0.7, steps)[0][:, 0]
        else:
            G = torch.stack([gradient[where] for _, _, where in systems], 1)
            expected = torch.empty_like(gradient)
            for column, (_, _, where) in zip(
                published(systems[0][0], G, 0.7, steps)[0].T, systems, strict=True
            ):
                expected[where] = column
        close(flat(official_conjugate_gradients(ply, 0.7, steps)), expected, 1e-9)


@pytest.mark.parametrize("n", [12, 4])  # more, and fewer rows than columns
def test_official_differs_where_it_should(n):
    """The first step is the textbook's but for the epsilon; then the alias shows; and it stops early."""
    torch.manual_seed(0)
    x, delta = torch.randn(n, 7), 1e3 * torch.randn(n, 3)
    ply = ply_of(nn.Linear(7, 3), x, delta)
    gap = [
        (flat(official_conjugate_gradients(ply, 0.7, k)) - flat(conjugate_gradients(ply, 0.7, k)))
        .norm()
        .item()
        / flat(ply.gradient()).norm().item()
        for k in (1, 2)
    ]
    assert gap[0] < 1e-10
    assert gap[1] > 1e-3
    A = torch.cat([x, torch.ones(n, 1)], 1)
    stopped_at, k = published(A, A.T @ delta, 0.7, 200)
    assert k < 200
    close(flat(official_conjugate_gradients(ply, 0.7, 200)),
          torch.cat([stopped_at[:-1].T.flatten(), stopped_at[-1]]), 1e-9)  # fmt: skip


# ---- the cheap ones --------------------------------------------------------------------------------


def test_normalised(problem):
    layer, x, delta, ply = problem
    expected = torch.empty_like(flat(ply.gradient()))
    for A, delta_c, where in columns_of(layer, x, delta):
        norms = A.square().sum(1)
        expected[where] = sum(
            d * a / (q + 0.3 * norms.mean()) for a, d, q in zip(A, delta_c, norms, strict=True)
        )
    close(flat(solve.normalised(ply, 0.3)), expected)


def test_mean_square(problem):
    """Mean eigenvalue of ``AᵀA / samples``, without the bias's column; by rank: mean of the non-zero ones."""
    layer, x, delta, ply = problem
    eigenvalues = [
        torch.linalg.eigvalsh(A[:, : ply.width].T @ A[:, : ply.width]) / ply.samples
        for A, _, _ in columns_of(layer, x, delta)
    ]
    close(solve.mean_square(ply), torch.stack([e.mean() for e in eigenvalues]).mean())
    if layer.weight.dim() == 2:  # patches may overlap so that their rank is below min(n, d)
        nonzero = [e[e > 1e-9 * e.max()].mean() for e in eigenvalues]
        close(solve.mean_square(ply, by_rank=True), torch.stack(nonzero).mean())


# ---- what the layer below receives --------------------------------------------------------------------


def slow_matched(layer: nn.Module, x: Tensor, delta: Tensor, relative: float) -> Tensor:
    """``argmin_X ‖J X - Δ‖² + ε‖X‖²``, J the map from one sample (row) to its output."""
    one = x.reshape(-1, x.shape[-1])[0] if isinstance(layer, nn.Linear) else x[:1]
    J = jacrev(layer)(one).reshape(-1, one.numel())
    out = delta.reshape(-1, J.shape[0])
    damping = relative * J.square().sum() / min(J.shape)
    return torch.linalg.solve(J.T @ J + damping * torch.eye(J.shape[1]), J.T @ out.T).T.reshape(x.shape)


def test_matched_below(problem):
    layer, x, delta, ply = problem
    if getattr(layer, "padding_mode", "zeros") == "reflect":
        pytest.skip("the damping takes two taps that read one mirrored pixel as two pixels")
    close(solve.matched_below(ply, 0.2, steps=60), slow_matched(layer, x, delta, 0.2), 1e-8)


@pytest.mark.parametrize("d", [4, 9])
def test_matched_below_meets_the_target_or_is_least_squares(d):
    """B2, B2b: m <= n gives dX Wᵀ = T; m > n the normal equations."""
    torch.manual_seed(1)
    layer, delta = nn.Linear(d, 6), torch.randn(5, 6)
    matched = solve.matched_below(ply_of(layer, torch.randn(5, d), delta), 1e-13)
    left = matched @ layer.weight.T - delta
    assert (left if d > 6 else left @ layer.weight).norm() < 1e-9 * delta.norm()


def test_matched_below_conv_in_few_steps():
    """The default 8 steps: the residual falls with each, and a well-conditioned case has arrived."""
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight.mul_(0.1)[:, :, 1, 1] += torch.eye(3)
    x, delta = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    ply = ply_of(layer, x, delta)
    dense = slow_matched(layer, x, delta, 0.1)
    errors = [(solve.matched_below(ply, 0.1, steps=k) - dense).norm() / dense.norm() for k in range(9)]
    assert all(after < before for before, after in pairwise(errors)), errors
    assert errors[8] < 1e-4
    torch.testing.assert_close(solve.matched_below(ply, 0.1), solve.matched_below(ply, 0.1, steps=8))
