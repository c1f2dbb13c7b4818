"""wasserstein_proximal against closed forms: what its minimiser is, and what it bounds."""

import math

import pytest
import torch
from torch import Tensor, nn

from plywise.losses import wasserstein_proximal


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float32)


def proximal_step(generator, theta: Tensor, loss, step: float) -> Tensor:
    """The minimiser of ``loss + penalty``, from ``theta``."""
    anchor, at = generator(theta).detach(), theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at], max_iter=200, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        samples = generator(at)
        total = loss(samples) + wasserstein_proximal(samples, anchor, step)
        total.backward()
        return total

    optimizer.step(closure)
    closure()
    assert at.grad.norm() < 1e-6
    return at.detach()


def test_translation_is_the_ordinary_proximal_step():
    """``g(z) = z + θ``: the penalty is ``‖θ - θ_k‖²/2h``, whatever z is."""
    z, theta, before = torch.randn(7, 3), torch.randn(3), torch.randn(3)
    penalty = wasserstein_proximal(z + theta, z + before, 0.3)
    torch.testing.assert_close(penalty, (theta - before).square().sum() / 0.6)
    target = torch.randn(3)  # of F = ½‖mean of samples - target‖², whose proximal map is a formula
    moved = proximal_step(
        lambda t: z + t, before, lambda x: 0.5 * (x.mean(0) - target).square().sum(), step=0.3
    )
    expected = (before + 0.3 * (target - z.mean(0))) / 1.3
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def linear_problem():
    """Samples ``Z θ`` of a linear generator, and a loss that is not quadratic in them."""
    Z, target = torch.randn(40, 5), torch.randn(40)
    return Z, lambda x: (x.squeeze(1) - target).cosh().log().mean()


def test_small_steps_are_natural_gradient_steps():
    """``-h E[JᵀJ]⁻¹ ∇F``: J of a linear generator is z."""
    Z, loss = linear_problem()
    theta, h = torch.randn(5).requires_grad_(), 1e-3
    (gradient,) = torch.autograd.grad(loss((Z @ theta).unsqueeze(1)), theta)
    expected = -h * torch.linalg.solve(Z.T @ Z / len(Z), gradient)
    moved = proximal_step(lambda t: (Z @ t).unsqueeze(1), theta.detach(), loss, h)
    assert ((moved - theta.detach()) - expected).norm() < 5e-3 * expected.norm()


def test_the_step_does_not_depend_on_how_weights_are_written():
    """``θ = M φ``: the samples after the step are the same."""
    Z, loss = linear_problem()
    theta = torch.randn(5)
    M = torch.eye(5) + 0.3 * torch.randn(5, 5)
    phi = torch.linalg.solve(M, theta)
    one = proximal_step(lambda t: (Z @ t).unsqueeze(1), theta, loss, 0.5)
    other = proximal_step(lambda p: (Z @ M @ p).unsqueeze(1), phi, loss, 0.5)
    assert (one - theta).norm() > 0.1
    torch.testing.assert_close(M @ other, one, rtol=0, atol=1e-6)


def test_a_constant_loss_moves_nothing():
    Z, _ = linear_problem()
    theta = torch.randn(5)
    moved = proximal_step(lambda t: (Z @ t).unsqueeze(1), theta, lambda x: 0 * x.sum(), 0.1)
    assert torch.equal(moved, theta)


def test_it_is_a_bound_of_the_exact_distance():
    """On the line, W2² is that of the sorted samples."""
    now, before = torch.randn(50, 1), 2 * torch.randn(50, 1) + 1
    exact = (now.sort(0).values - before.sort(0).values).square().mean()
    assert 2 * wasserstein_proximal(now, before, 1.0) > 1.1 * exact
    torch.testing.assert_close(
        2 * wasserstein_proximal(now.sort(0).values, before.sort(0).values, 1.0), exact
    )  # a monotone plan is the best one


def test_mean_over_samples_sum_over_the_rest():
    samples, anchor = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    one_by_one = [((s - a) ** 2).sum() / (2 * 0.7) for s, a in zip(samples, anchor, strict=True)]
    torch.testing.assert_close(wasserstein_proximal(samples, anchor, 0.7), sum(one_by_one) / 4)
    twice = wasserstein_proximal(samples.repeat(2, 1, 1), anchor.repeat(2, 1, 1), 0.7)
    torch.testing.assert_close(twice, wasserstein_proximal(samples, anchor, 0.7))


def test_no_gradient_goes_to_the_anchor():
    generator = nn.Linear(2, 3)
    z = torch.randn(6, 2)
    samples, anchor = generator(z), generator(z)  # the caller forgot to detach
    wasserstein_proximal(samples + 1, anchor, 0.5).backward()
    through_both = [p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    wasserstein_proximal(generator(z) + 1, anchor.detach(), 0.5).backward()
    for got, expected in zip(through_both, [p.grad for p in generator.parameters()], strict=True):
        torch.testing.assert_close(got, expected)
        assert got.norm() > 0


def test_a_small_step_holds_a_network_back():
    """The same inner loop, with a tight and with a loose step."""
    moved = []
    for step in (1e-3, 1e3):
        torch.manual_seed(0)
        network, z = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(32, 4)
        anchor = network(z).detach()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(30):
            samples = network(z)
            loss = (samples - 3).square().mean() + wasserstein_proximal(samples, anchor, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved.append((network(z) - anchor).norm().item())
    assert moved[0] < 0.2 * moved[1]


@pytest.mark.parametrize("step", [0, -1.0, math.inf, math.nan, True, "small"])
def test_wrong_step(step):
    with pytest.raises(ValueError, match="step must be a finite number above 0, not"):
        wasserstein_proximal(torch.ones(2, 1), torch.ones(2, 1), step)


@pytest.mark.parametrize(("one", "other"), [((3, 2), (3, 1)), ((3,), (1,)), ((), ()), ((0, 2), (0, 2))])
def test_samples_that_do_not_match(one, other):
    """They would be broadcast, and the distance be that of something else."""
    with pytest.raises(ValueError, match="must have one shape"):
        wasserstein_proximal(torch.ones(one), torch.ones(other))
