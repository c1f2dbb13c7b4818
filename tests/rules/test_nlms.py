"""NLMS against its definition, sample by sample, in float64."""

import pytest
import torch
from algebra import move_of, relative
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


def slow(A: Tensor, delta: Tensor, eps: float) -> Tensor:
    """``Σ δ_i a_iᵀ / (‖a_i‖² + eps · mean ‖a‖²)``."""
    damping = eps * sum((a @ a).item() for a in A) / len(A)
    return sum(torch.outer(d, a) / (a @ a + damping) for a, d in zip(A, delta, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [9, 4, 1])
def test_definition(n, bias):
    x, delta = torch.randn(n, 6), torch.randn(n, 3)
    A = torch.cat([x, torch.ones(n, 1)], 1) if bias else x
    got = move_of(pw.NLMS(0.2), nn.Linear(6, 3, bias=bias), x, delta)
    assert relative(got, slow(A, delta, 0.2)) < 1e-13
    folded = move_of(pw.NLMS(0.2), nn.Linear(6, 3, bias=bias), x[None], delta[None])
    assert relative(folded, got) < 1e-13


def test_convolution():
    """Each output position is a row; two groups are two layers side by side."""
    conv = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 0), groups=2)
    x = torch.randn(3, 4, 5, 6)
    delta = torch.randn_like(conv(x))
    got = move_of(pw.NLMS(0.2), conv, x, delta)
    taps = torch.eye(2 * 2 * 3).reshape(12, 2, 2, 3)  # each filter picks one entry of the patch
    for g in range(2):
        patches = conv2d(x[:, 2 * g : 2 * g + 2], taps, None, (2, 1), (1, 0)).movedim(1, -1).reshape(-1, 12)
        A = torch.cat([patches, torch.ones(len(patches), 1)], 1)
        deltas = delta[:, 3 * g : 3 * g + 3].movedim(1, -1).reshape(-1, 3)
        assert relative(got[3 * g : 3 * g + 3], slow(A, deltas, 0.2)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_one_step_of_rate_one_lands_on_the_target(bias):
    """For one sample, and for several that are orthogonal to one another."""
    layer, x, y = nn.Linear(6, 3, bias=bias), torch.randn(1, 6), torch.randn(1, 3)
    move = move_of(pw.NLMS(1e-12), layer, x, (layer(x) - y).detach())
    A = torch.cat([x, torch.ones(1, 1)], 1) if bias else x
    assert relative(layer(x) - A @ move.T, y) < 1e-10
    if not bias:
        x, y = torch.linalg.qr(torch.randn(6, 4)).Q.T * 3, torch.randn(4, 3)
        move = move_of(pw.NLMS(1e-12), layer, x, (layer(x) - y).detach())
        assert relative(layer(x) - x @ move.T, y) < 1e-10


def test_posterior_error():
    """``(1 - η q/(q + ε))`` of the prior one."""
    layer, x, y = nn.Linear(6, 3, bias=False), torch.randn(1, 6), torch.randn(1, 3)
    prior = (layer(x) - y).detach()
    move = move_of(pw.NLMS(0.25), layer, x, prior)
    for eta in (0.3, 1.0, 1.7):
        assert relative(prior - eta * x @ move.T, (1 - eta / 1.25) * prior) < 1e-12


def test_averaging_does_not_matter():
    """The move is a mean over the samples, whether the loss is a mean or a sum."""
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x, y = torch.randn(7, 2, 6), torch.randn(7, 4)
    found = []
    for reduction in ("mean", "sum"):
        model.zero_grad()
        rule = pw.NLMS(reduction=reduction).attach(model)
        loss = mse_loss(model(x), y, reduction="sum") / (7 if reduction == "mean" else 1)
        loss.backward()
        rule.detach()
        found.append([p.grad.clone() for p in model.parameters()])
    for mean, total in zip(*found, strict=True):
        assert relative(total, mean) < 1e-13
    once = move_of(pw.NLMS(), nn.Linear(6, 3), x[:, 0], y[:, :3] / 7)
    twice = move_of(pw.NLMS(), nn.Linear(6, 3), x[:, 0].repeat(2, 1), y[:, :3].repeat(2, 1) / 14)
    assert relative(twice, once) < 1e-13


def test_zero_rows():
    """A sample without input moves nothing (but the bias), and disturbs no other."""
    x, delta, layer = torch.randn(5, 6), torch.randn(5, 3), nn.Linear(6, 3, bias=False)
    x[2] = 0
    damping = 0.2 * x.square().sum() / 5
    others = [i for i in range(5) if i != 2]
    expected = sum(torch.outer(delta[i], x[i]) / (x[i] @ x[i] + damping) for i in others)
    assert relative(move_of(pw.NLMS(0.2), layer, x, delta), expected) < 1e-13
    assert move_of(pw.NLMS(0.2), layer, 0 * x, delta).norm() == 0
    with_bias = move_of(pw.NLMS(1e-12), nn.Linear(6, 3), 0 * x, delta)
    assert with_bias[:, :6].norm() == 0
    assert relative(with_bias[:, 6], delta.sum(0)) < 1e-10


def test_size_of_the_input_does_not_matter():
    x, delta, layer = torch.randn(5, 6), torch.randn(5, 3), nn.Linear(6, 3, bias=False)
    assert relative(move_of(pw.NLMS(), layer, 7 * x, delta), move_of(pw.NLMS(), layer, x, delta) / 7) < 1e-13


def test_the_layer_below_hears_backpropagation():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(4, 6).requires_grad_()
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    rule = pw.NLMS().attach(model)
    model(x).square().sum().backward()
    rule.detach()
    assert torch.equal(x.grad, plain)
