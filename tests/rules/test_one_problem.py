"""One local problem, three papers: the rules differ in damping and averaging only."""

import pytest
import torch
from algebra import move_of, relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


def linear(n: int, bias: bool) -> tuple[nn.Module, Tensor]:
    return nn.Linear(8, 4, bias=bias), torch.randn(n, 8)


def conv(n: int, bias: bool) -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(2, 4, 3, stride=2, bias=bias), torch.randn(n, 2, 7, 7)


CASES = [(linear, 20), (linear, 5), (conv, 6), (conv, 1)]


def problem(make, n: int, bias: bool) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Layer, input, Δ, and the rows A that its parameters see (from the columns of the Jacobian)."""
    layer, x = make(n, bias)
    out = layer(x)
    first = out.movedim(1, -1)[..., 0].flatten()
    rows = [torch.autograd.grad(o, list(layer.parameters()), retain_graph=True) for o in first]
    A = torch.stack([torch.cat([part[0].flatten() for part in row]) for row in rows])
    return layer, x, torch.randn_like(out), A


@pytest.mark.parametrize(("make", "n"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_cwu_is_proxprop_with_a_relative_damping(make, n, bias):
    """ε = eps ‖A‖²/min(n, d) is 1/τ; a mean loss is a sum loss over the number of samples."""
    layer, x, delta, A = problem(make, n, bias)
    damping = 0.3 * A.square().sum().item() / min(A.shape)
    prox = move_of(pw.ProxProp(tau=1 / damping), layer, x, delta)
    assert relative(move_of(pw.Consequentialism(0.3, reduction="sum"), layer, x, delta), prox) < 1e-11
    assert relative(move_of(pw.Consequentialism(0.3), layer, x, delta / n), prox) < 1e-11
    many = move_of(pw.ProxProp(1 / damping, "cg", 40), layer, x, delta)
    assert relative(many, prox) < 1e-8
    by_mean = move_of(pw.ProxProp(len(A) / damping, gram="mean"), layer, x, delta)
    assert relative(by_mean, len(A) * prox) < 1e-11


@pytest.mark.parametrize(("make", "n"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_c16_exact_back_matching_is_cwu(make, n, bias):
    """The same step for the weights; they differ in what the layer below receives."""
    layer, x, delta, _ = problem(make, n, bias)
    for reduction in ("mean", "sum"):
        cwu = pw.Consequentialism(0.3, bias="centre", reduction=reduction)
        exact = pw.BackMatching("exact", eps=0.3, cap=None, reduction=reduction)
        assert relative(move_of(exact, layer, x, delta), move_of(cwu, layer, x, delta)) < 1e-14


@pytest.mark.parametrize(("make", "n"), CASES)
def test_all_three_are_least_squares_without_damping(make, n):
    layer, x, delta, A = problem(make, n, False)
    least = (torch.linalg.pinv(A) @ delta.movedim(1, -1).reshape(len(A), -1)).T
    for rule in (
        pw.ProxProp(tau=1e11),
        pw.Consequentialism(1e-11, reduction="sum"),
        pw.BackMatching("exact", eps=1e-11, cap=None, reduction="sum"),
    ):
        assert relative(move_of(rule, layer, x, delta), least) < 1e-7, rule


def test_one_sample_is_nlms_for_all():
    layer, x, delta = nn.Linear(8, 4, bias=False), torch.randn(1, 8), torch.randn(1, 4)
    nlms = move_of(pw.NLMS(0.3), layer, x, delta)
    for rule in (
        pw.ProxProp(1 / (0.3 * x.square().sum().item())),
        pw.Consequentialism(0.3),
        pw.BackMatching("exact", eps=0.3, cap=None),
    ):
        assert relative(move_of(rule, layer, x, delta), nlms) < 1e-12, rule
    undamped = move_of(pw.NLMS(1e-12), layer, x, delta)
    assert relative(move_of(pw.BackMatching(scalar="rank", cap=None), layer, x, delta), undamped) < 1e-11


def test_all_but_exact_back_matching_send_down_what_backpropagation_does():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 4))
    x, y = torch.randn(6, 2, 7, 7).requires_grad_(), torch.randint(4, (6,))
    plain = torch.autograd.grad(cross_entropy(model(x), y), x)[0]
    same = []
    for rule in (
        pw.Backprop(),
        pw.NLMS(),
        pw.ProxProp(),
        pw.Consequentialism(),
        pw.BackMatching(),
        pw.BackMatching("exact"),
    ):
        x.grad = None
        rule.attach(model)
        cross_entropy(model(x), y).backward()
        rule.detach()
        same.append(torch.equal(x.grad, plain))
    assert same == [True, True, True, True, True, False]
