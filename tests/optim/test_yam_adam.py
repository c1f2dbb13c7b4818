"""YamAdam: its recursion against the author's, its bounds, what its steps depend on."""

import math

import pytest
import torch

from plywise.optim import YamAdam


def start(shape=(4, 3)):
    return torch.nn.Parameter(
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )


def gradients(steps, shape=(4, 3)):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn((steps, *shape), dtype=torch.float64, generator=generator))


def run(weight, given, **settings):
    optimizer, path = YamAdam([weight], **settings), [weight.detach().clone()]
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return optimizer, path


def test_equals_the_recursion_number_by_number():
    """The author's update of one tensor, in plain Python."""
    weight, given, e = start(), gradients(25), 1e-6
    _, path = run(weight, given)
    w = start().detach().flatten().tolist()
    n = len(w)
    m, v, s, h, b = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n, 0.0
    for gradient, found in zip(given, path[1:], strict=True):
        g = gradient.flatten().tolist()
        v = [b * v[i] + (1 - b) * (g[i] - m[i]) ** 2 for i in range(n)]
        s = [b * s[i] + (1 - b) * h[i] ** 2 for i in range(n)]
        m = [b * m[i] + (1 - b) * g[i] for i in range(n)]
        before = sum(map(abs, h))
        h = [m[i] * math.sqrt((s[i] + e) / (v[i] + e)) for i in range(n)]
        b = 1 / (1 + math.exp(-(before + e) / (sum(map(abs, h)) + e))) - e
        w = [w[i] - h[i] for i in range(n)]
        assert found.flatten().tolist() == pytest.approx(w, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-2])
def test_first_step_goes_down_by_at_most_the_root_of_eps(eps):
    given = [torch.tensor([1e6, -3.0, 1e-3, 0.0], dtype=torch.float64)]
    _, (before, after) = run(start((4,)), given, eps=eps)
    step = before - after
    assert step.abs().max() <= math.sqrt(eps) * (1 + 1e-12)
    assert torch.equal(step.sign(), given[0].sign())


def test_decay_rate_is_between_one_half_and_one():
    weight = start()
    optimizer = YamAdam([weight])
    for scale, gradient in enumerate(gradients(60)):
        weight.grad = gradient * 10.0 ** (scale % 7 - 3)
        optimizer.step()
        assert 0.5 - 1e-6 <= optimizer.state[weight]["decay"].item() < 1


def test_steps_do_not_depend_on_the_scale_of_the_loss():
    """Up to ε beside the variance."""
    given = [100 * gradient for gradient in gradients(20)]
    _, path = run(start(), given)
    _, scaled = run(start(), [100 * gradient for gradient in given])
    for found, expected in zip(scaled[1:], path[1:], strict=True):
        torch.testing.assert_close(found - scaled[0], expected - path[0], rtol=1e-4, atol=1e-9)


def test_decay_rates_are_one_a_tensor():
    """Two tensors together move as each does alone."""
    left, right = start((3,)), start((2,))
    optimizer = YamAdam([left, right])
    for first, second in zip(gradients(10, (3,)), gradients(10, (2,)), strict=True):
        left.grad, right.grad = first.clone(), 1000 * second
        optimizer.step()
    _, alone = run(start((3,)), gradients(10, (3,)))
    assert torch.equal(left.detach(), alone[-1])


@pytest.mark.parametrize("steepest", [1.0, 100.0])
def test_solves_a_diagonal_quadratic(steepest):
    """Not monotonically: it swings. But never above where it began, and by orders in each 40 steps."""
    curvature = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64) * steepest
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, losses = YamAdam([weight]), []
    for _ in range(161):
        optimizer.zero_grad()
        loss = 0.5 * (curvature * weight.square()).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) == losses[0]
    assert max(losses[80:]) < 0.01 * losses[0]
    assert max(losses[120:]) < 1e-4 * losses[0]


def test_zero_gradients_move_nothing():
    _, path = run(start(), [torch.zeros(4, 3, dtype=torch.float64)] * 3)
    assert torch.equal(path[-1], path[0])
