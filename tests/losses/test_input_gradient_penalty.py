"""The input-gradient penalty: closed forms, its promise about attacks, and the version by differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plywise as pw
from plywise.errors import PlywiseError
from plywise.losses import input_gradient_difference, input_gradient_penalty


def smooth():
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 3)).double()


@pytest.fixture
def batch():
    return torch.randn(10, 6, dtype=torch.float64), torch.arange(10) % 3


def losses_of(model, y):
    return lambda x: F.cross_entropy(model(x), y, reduction="none")


def penalty_of(model, x, y, order=1.0):
    x = x.clone().requires_grad_()
    return input_gradient_penalty(losses_of(model, y)(x), x, order)


@pytest.mark.parametrize("order", [1, 2, 1.5, math.inf])
def test_a_linear_model_in_closed_form(order):
    model, x = nn.Linear(4, 1).double(), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    z = model(x).squeeze(1)
    penalty = input_gradient_penalty(F.softplus(-z), x, order)
    slope = torch.sigmoid(-z).abs()  # |∂ℓ/∂z|
    expected = (slope * torch.linalg.vector_norm(model.weight, order)).mean()
    torch.testing.assert_close(penalty, expected)


def test_it_is_what_a_small_attack_adds(batch):
    model, (x, y) = smooth(), batch
    at, epsilon = x.clone().requires_grad_(), 1e-5
    losses = losses_of(model, y)(at)
    penalty = input_gradient_penalty(losses, at)
    (gradient,) = torch.autograd.grad(losses.sum(), at)
    attacked = losses_of(model, y)(x + epsilon * gradient.sign())
    added = ((attacked - losses) / epsilon).mean()
    assert added.item() == pytest.approx(penalty.item(), rel=1e-4)


def test_no_direction_of_the_same_size_adds_more(batch):
    model, (x, y) = smooth(), batch
    penalty, epsilon = penalty_of(model, x, y).item(), 1e-5
    before = losses_of(model, y)(x)
    for _ in range(20):
        other = torch.randn_like(x).sign()
        assert ((losses_of(model, y)(x + epsilon * other) - before) / epsilon).mean().item() < penalty


def test_its_gradient_against_differences(batch):
    model, (x, y) = smooth(), batch
    penalty_of(model, x, y).backward()
    weight, step = model[0].weight, 1e-6
    for index in [(0, 0), (5, 3), (11, 5)]:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
            ends.append(penalty_of(model, x, y).item())
            with torch.no_grad():
                weight[index] -= sign * step
        assert weight.grad[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_a_weight_of_zero_is_the_plain_gradient_bit_for_bit(batch):
    model, (x, y) = smooth(), batch
    losses_of(model, y)(x).mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    at = x.clone().requires_grad_()
    losses = losses_of(model, y)(at)
    (losses.mean() + 0.0 * input_gradient_penalty(losses, at)).backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), plain, strict=True))


def test_training_on_it_makes_it_small(batch):
    x, y = batch
    ends = []
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        model = smooth()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            at = x.clone().requires_grad_()
            losses = losses_of(model, y)(at)
            (losses.mean() + weight * input_gradient_penalty(losses, at)).backward()
            optimizer.step()
        ends.append(penalty_of(model, x, y).item())
    assert ends[1] < 0.5 * ends[0]


def test_images_and_a_gradient_of_zero():
    x, weight = torch.randn(3, 1, 4, 4, requires_grad=True), torch.zeros(16, requires_grad=True)

    def loss_of(x):
        return x.flatten(1) @ weight

    for order in (1, 2):
        for penalty in (
            input_gradient_penalty(loss_of(x), x, order),
            input_gradient_difference(loss_of, x, order=order),
        ):
            penalty.backward()
            assert penalty.item() == 0
            assert not weight.grad.isnan().any()


@pytest.mark.parametrize("order", [1, 2])
def test_by_differences_it_is_the_same_to_first_order(batch, order):
    model, (x, y) = smooth(), batch
    exact = penalty_of(model, x, y, order)
    exact.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    errors = []
    for step in (1e-2, 1e-3):
        model.zero_grad()
        penalty = input_gradient_difference(losses_of(model, y), x, step, order)
        penalty.backward()
        grads = [p.grad for p in model.parameters()]
        errors.append(sum((g - e).norm() for g, e in zip(grads, expected, strict=True)).item())
        assert penalty.item() == pytest.approx(exact.item(), rel=step * 20)
    assert errors[1] < 0.15 * errors[0]


def test_by_differences_it_goes_with_a_rule(batch):
    x, y = batch
    ends = []
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        model = smooth()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = pw.ProxProp().attach(model, optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            losses = losses_of(model, y)
            (losses(x).mean() + weight * input_gradient_difference(losses, x)).backward()
            optimizer.step()
        rule.detach()
        ends.append(penalty_of(model, x, y).item())
    assert ends[1] < 0.7 * ends[0]


def test_the_callers_tensor_is_left_alone_by_differences(batch):
    model, (x, y) = smooth(), batch
    input_gradient_difference(losses_of(model, y), x).backward()
    assert x.grad is None
    assert not x.requires_grad


def test_what_is_wrong_is_said(batch):
    model, (x, y) = smooth(), batch
    losses = losses_of(model, y)
    with pytest.raises(PlywiseError, match="requires_grad_"):
        input_gradient_penalty(losses(x), x)
    at = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"one number for each of 10 samples.*reduction='none'"):
        input_gradient_penalty(losses(at).mean(), at)
    with pytest.raises(PlywiseError, match="do not depend on x"):
        input_gradient_penalty(losses(at.detach()), at)
    with pytest.raises(PlywiseError, match="do not depend on x"):
        input_gradient_penalty(torch.zeros(10), at)
    with torch.no_grad(), pytest.raises(PlywiseError, match="no_grad"):
        input_gradient_penalty(losses(at), at)


@pytest.mark.parametrize("order", [0.5, 0, -1, math.nan, "1", True])
def test_wrong_orders(batch, order):
    model, (x, y) = smooth(), batch
    with pytest.raises(ValueError, match="order must be"):
        penalty_of(model, x, y, order)
    if order is not True:
        with pytest.raises(ValueError, match="order must be 1 or 2"):
            input_gradient_difference(losses_of(model, y), x, order=order)


@pytest.mark.parametrize("step", [0, -0.1, math.inf, math.nan])
def test_wrong_steps(batch, step):
    model, (x, y) = smooth(), batch
    with pytest.raises(ValueError, match="step must be a finite number above 0"):
        input_gradient_difference(losses_of(model, y), x, step)
