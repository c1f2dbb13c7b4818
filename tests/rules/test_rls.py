"""Recursive least squares: P is an inverse, and one pass over the data is ridge regression."""

import pytest
import torch
from algebra import relative
from torch import Tensor, nn
from torch.nn import functional

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


def mean_row(layer: nn.Module, x: Tensor) -> Tensor:
    """ū, (g, k): the mean over batch and positions, with a 1 for the bias."""
    if isinstance(layer, nn.Linear):
        mean = x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
    else:
        patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        mean = patches.mean((0, 2)).reshape(layer.groups, -1)
    return mean if layer.bias is None else functional.pad(mean, (0, 1), value=1.0)


def grads(layer: nn.Module) -> Tensor:
    """(g, m, k)"""
    matrix = torch.cat([p.grad.reshape(len(p), -1) for p in layer.parameters()], 1)
    return matrix.reshape(getattr(layer, "groups", 1), -1, matrix.shape[1])


class Walk:
    """A layer under RLS, step by step."""

    def __init__(self, layer: nn.Module, lr: float = 0.0, **how: float) -> None:
        self.layer, self.rule = layer, pw.RLS(**how)
        self.optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
        self.rule.attach(layer, self.optimizer)

    def step(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``(G, D)``."""
        out = self.layer.forward(x)  # past the rule's hook
        plain = torch.autograd.grad((out * delta).sum(), list(self.layer.parameters()))
        self.optimizer.zero_grad()
        (self.layer(x) * delta).sum().backward()
        self.optimizer.step()
        D = grads(self.layer)
        G = torch.cat([p.reshape(len(p), -1) for p in plain], 1).reshape(D.shape)
        return G, D

    def inverse(self) -> Tensor:
        return self.rule.statistics[""]["inverse"]


LAYERS = {
    "linear": lambda: (nn.Linear(5, 3), lambda n: torch.randn(n, 5) + 1),
    "linear without bias": lambda: (nn.Linear(5, 3, bias=False), lambda n: torch.randn(n, 5)),
    "tokens": lambda: (nn.Linear(5, 3), lambda n: torch.randn(n, 4, 5) + 1),
    "conv": lambda: (nn.Conv2d(2, 3, (3, 2), padding=1), lambda n: torch.randn(n, 2, 5, 4) + 1),
    "grouped conv": lambda: (
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
        lambda n: torch.randn(n, 4, 7, 9) * 2,
    ),
}


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(
    ("forgetting", "gain", "ridge"), [(1.0, 0.1, 1.0), (0.999, 2.0, 0.25), (0.9, 0.5, 3.0)]
)
def test_p_is_the_inverse_of_the_discounted_autocorrelation(make, forgetting, gain, ridge):
    """A ← λA + κ ūūᵀ from A = δI, no trace above the first; D = G P / (λ + κ ūᵀPū), P of the step before."""
    layer, draw = LAYERS[make]()
    walk = Walk(layer, forgetting=forgetting, gain=gain, ridge=ridge)
    groups, k = mean_row(layer, draw(1)).shape
    A, held = ridge * torch.eye(k).expand(groups, k, k), 0
    for t in range(50):
        x = draw((3, 1, 40)[t % 3])
        u, P = mean_row(layer, x), torch.linalg.inv(A)
        G, D = walk.step(x, torch.randn_like(layer(x)))
        h = forgetting + gain * torch.einsum("gi,gij,gj->g", u, P, u)
        assert relative(D, G @ P / h.reshape(-1, 1, 1)) < 1e-10, t
        A = forgetting * A + gain * u.unsqueeze(2) * u.unsqueeze(1)
        if forgetting < 1:
            excess = torch.linalg.inv(A).diagonal(dim1=1, dim2=2).sum(1) * ridge / k
            held += int((excess > 1).any())
            A = A * excess.clamp_min(1).reshape(-1, 1, 1)
    assert relative(walk.inverse(), torch.linalg.inv(A)) < 1e-10
    assert (held > 0) == (forgetting == 0.9)  # the closed form alone, but where λ is small
    assert relative(walk.inverse(), walk.inverse().mT) < 1e-13
    assert (torch.linalg.eigvalsh(walk.inverse()) > 0).all()


@pytest.mark.parametrize("make", LAYERS)
def test_p_only_shrinks_where_nothing_is_forgotten(make):
    layer, draw = LAYERS[make]()
    walk = Walk(layer, gain=0.7)
    before = torch.eye(mean_row(layer, draw(1)).shape[1])
    for _ in range(20):
        x = draw(4)
        walk.step(x, torch.randn_like(layer(x)))
        assert (torch.linalg.eigvalsh(before - walk.inverse()) > -1e-13).all()
        assert before.diagonal(dim1=-2, dim2=-1).sum() > walk.inverse().diagonal(dim1=1, dim2=2).sum(1).amin()
        before = walk.inverse()


@pytest.mark.parametrize("make", ["linear without bias", "grouped conv"])
@pytest.mark.parametrize("forgetting", [0.5, 0.95])
def test_inputs_that_stay_away_wind_nothing_up(make, forgetting):
    """One direction for ever: P would grow as λ^-t in all others."""
    layer, draw = LAYERS[make]()
    walk, x = Walk(layer, forgetting=forgetting, ridge=0.5), draw(2)
    for t in range(200):
        walk.step(x if t < 100 else 0 * x, torch.randn_like(layer(x)))
        traces = walk.inverse().diagonal(dim1=1, dim2=2).sum(1)
        assert (traces <= walk.inverse().shape[1] / 0.5 * (1 + 1e-12)).all()
    assert torch.linalg.eigvalsh(walk.inverse()).amin() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_one_pass_of_single_samples_is_ridge_regression(bias, ridge):
    """κ = 1, rate 1, loss ½‖·‖²: the minimum of ½Σ‖Wx - y‖² + ½δ‖W - W₀‖², W with the bias in it."""
    layer = nn.Linear(6, 3, bias=bias)
    start = torch.cat([p.detach().clone().reshape(3, -1) for p in layer.parameters()], 1)
    X, Y = torch.randn(25, 6) * torch.arange(1.0, 7), torch.randn(25, 3)
    walk = Walk(layer, lr=1.0, gain=1.0, ridge=ridge)
    A = functional.pad(X, (0, 1), value=1.0) if bias else X
    for n, (x, y) in enumerate(zip(X.split(1), Y.split(1), strict=True), start=1):
        walk.optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum()).backward()
        walk.optimizer.step()
        if n in (1, 4, 25):  # exact on the way, too: fewer samples than inputs, and more
            rows, residual = A[:n], Y[:n] - A[:n] @ start.T
            gram = rows.T @ rows + ridge * torch.eye(A.shape[1])
            expected = start + torch.linalg.solve(gram, rows.T @ residual).T
            found = torch.cat([p.detach().reshape(3, -1) for p in layer.parameters()], 1)
            assert relative(found, expected) < 1e-10, n


def test_forgetting_is_a_weighted_ridge_regression():
    """λ^(n-i) before sample i and λ^n before the ridge, as long as P's trace needs no holding."""
    layer, lam = nn.Linear(4, 2, bias=False), 0.97
    start, X, Y = layer.weight.detach().clone(), 5 * torch.randn(30, 4), torch.randn(30, 2)
    walk = Walk(layer, lr=1.0, gain=1.0, forgetting=lam)
    for x, y in zip(X.split(1), Y.split(1), strict=True):
        walk.optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum()).backward()
        walk.optimizer.step()
        assert walk.inverse().diagonal(dim1=1, dim2=2).sum() < 4
    weights = lam ** torch.arange(29.0, -1, -1)
    gram = X.T @ (weights[:, None] * X) + lam**30 * torch.eye(4)
    expected = start + torch.linalg.solve(gram, X.T @ (weights[:, None] * (Y - X @ start.T))).T
    assert relative(layer.weight, expected) < 1e-10


@pytest.mark.parametrize("make", LAYERS)
def test_moves_go_down_and_grow_with_the_loss(make):
    layer, draw = LAYERS[make]()
    one, seven = Walk(layer), []
    inputs = [draw(n) for n in (4, 1, 9)]
    deltas = [torch.randn_like(layer(x)) for x in inputs]
    pairs = [one.step(x, delta) for x, delta in zip(inputs, deltas, strict=True)]
    one.rule.detach()
    louder = Walk(layer)
    seven = [louder.step(x, 7 * delta)[1] for x, delta in zip(inputs, deltas, strict=True)]
    for (G, D), D7 in zip(pairs, seven, strict=True):
        assert (G * D).sum() > 0
        assert relative(D7, 7 * D) < 1e-12


def test_micro_batches_of_a_step_are_one_batch():
    """The mean is over all their rows, and one step is one correction of P."""
    X, delta = torch.randn(12, 5) + 1, torch.randn(12, 3)
    layer, found = nn.Linear(5, 3), []
    for sizes in ([12], [2, 7, 3]):
        walk = Walk(layer)
        for _ in range(3):
            walk.optimizer.zero_grad()
            for x, d in zip(X.split(sizes), delta.split(sizes), strict=True):
                (layer(x) * d).sum().backward()
            walk.optimizer.step()
        found.append((grads(layer), walk.inverse()))
        walk.rule.detach()
    assert all(relative(two, one) < 1e-12 for one, two in zip(*found, strict=True))


def test_the_table_is_a_hand_count():
    """10 rows of 6 inputs and a bias, 4 outputs: P's correction, and G P by G's 4 rows."""
    layer = nn.Linear(6, 4)
    rule = pw.RLS().attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    (row,) = rule.explain(10).rows
    assert row.cost == pytest.approx((6 * 7**2 + 2 * 7**2 * 4) / (6 * 10 * 7 * 4), rel=1e-12)
    assert row.memory == 2 * 8 * 7**2  # P, and its rest
    assert row.treatment == "RLS"
