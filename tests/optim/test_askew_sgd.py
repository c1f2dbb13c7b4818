"""ASkewSGD: free where feasible, K where not, quantized in the end, and the hold that it needs."""

import math

import pytest
import torch

from plywise.optim import ASkewSGD
from plywise.optim.askew_sgd import find_interval, make_velocity

BINARY = torch.tensor([-1.0, 1.0], dtype=torch.float64)


def room(weight, epsilon):
    """φ for levels ±1."""
    return epsilon - (weight.square() - 1).square()


def to_target(weight, target):
    weight.grad = (weight - target).detach()


def test_free_weights_are_those_of_sgd_bit_for_bit():
    """All are inside while ε is 1, and no target lies beyond the levels."""
    ours = torch.nn.Parameter(torch.linspace(-0.9, 0.9, 7))
    theirs = torch.nn.Parameter(ours.detach().clone())
    target = torch.linspace(0.8, -0.8, 7)
    mine, sgd = ASkewSGD([ours], 0.1, steps_per_epoch=10), torch.optim.SGD([theirs], 0.1)
    for _ in range(40):
        to_target(ours, target)
        to_target(theirs, target)
        mine.step()
        sgd.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 1e-3])
def test_velocity_is_minus_the_gradient_inside_and_skewed_outside(epsilon):
    weight = torch.linspace(-0.99, 0.99, 100, dtype=torch.float64)
    gradient = torch.zeros_like(weight)
    velocity = make_velocity(weight, gradient, BINARY, epsilon, alpha=0.7, rate=1e-6)
    inside = room(weight, epsilon) >= 0
    assert inside.any()
    assert (~inside).any()
    assert (velocity[inside] == 0).all()
    k = 0.7 * room(weight, epsilon) / (4 * weight * (weight.square() - 1))
    torch.testing.assert_close(velocity[~inside], k[~inside])
    # the boundary is approached at the rate α: ∇φ · v = −α φ
    slope = -4 * weight * (weight.square() - 1)
    torch.testing.assert_close((slope * velocity)[~inside], -0.7 * room(weight, epsilon)[~inside])


def test_gradients_that_lead_in_faster_are_kept_and_those_that_lead_out_are_not():
    weight = torch.full((3,), 0.5, dtype=torch.float64)
    k = make_velocity(weight, torch.zeros_like(weight), BINARY, 0.1, 1.0, 0.1)[0]
    assert k > 0
    faster, slower, outward = -2 * k, -0.5 * k, k
    gradient = torch.stack([faster, slower, outward])
    velocity = make_velocity(weight, gradient, BINARY, 0.1, 1.0, 0.1)
    torch.testing.assert_close(velocity, torch.stack([2 * k, k, k]))


def test_a_weight_on_a_level_or_halfway_is_free():
    levels = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    weight = torch.tensor([-1.0, 0.0, 2.0, -0.5, 1.0], dtype=torch.float64)
    gradient = torch.randn(5, dtype=torch.float64)
    assert torch.equal(make_velocity(weight, gradient, levels, 1e-4, 1.0, 0.1), -gradient)


def test_close_to_halfway_a_step_is_at_most_a_quarter_of_the_interval():
    weight = torch.tensor([1e-9, -1e-9], dtype=torch.float64)
    step = 0.1 * make_velocity(weight, torch.zeros_like(weight), BINARY, 0.01, 1.0, 0.1)
    torch.testing.assert_close(step, torch.tensor([0.5, -0.5], dtype=torch.float64))


def test_levels_may_be_scaled_and_shifted():
    """The same problem in other units: weights follow, since ε is relative to the interval."""
    weight = torch.linspace(-0.95, 0.95, 20, dtype=torch.float64)
    gradient = torch.linspace(1, -1, 20, dtype=torch.float64)
    velocity = make_velocity(weight, gradient, BINARY, 0.2, 1.0, 0.1)
    scaled = make_velocity(3 * weight + 7, 3 * gradient, 3 * BINARY + 7, 0.2, 1.0, 0.1)
    torch.testing.assert_close(scaled, 3 * velocity)


def test_infeasibility_shrinks_by_one_minus_rate_times_alpha():
    """To first order in the rate: φ(w + lr K) = (1 − lr α) φ(w)."""
    weight = torch.tensor([0.3, 0.5, -0.7], dtype=torch.float64)
    rate = 1e-5
    moved = weight + rate * make_velocity(weight, torch.zeros_like(weight), BINARY, 0.05, 2.0, rate)
    torch.testing.assert_close(room(moved, 0.05), (1 - 2 * rate) * room(weight, 0.05), rtol=1e-8, atol=0)


def anneal(target, hold, epochs, steps_per_epoch=10, decay=0.9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    begin = 0.2 * torch.randn(target.shape, dtype=torch.float64, generator=generator)
    weight = torch.nn.Parameter(begin)
    settings = {"steps_per_epoch": steps_per_epoch, "hold": hold, "decay": decay}
    optimizer = ASkewSGD([weight], 0.1, **settings)
    for _ in range(epochs * steps_per_epoch):
        to_target(weight, target)
        optimizer.step()
    return weight.detach(), optimizer


def test_annealed_weights_are_within_the_bound_and_quantize_finishes():
    target = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, optimizer = anneal(target, hold=30, epochs=170)
    epsilon = optimizer.param_groups[0]["epsilon"]
    assert epsilon == pytest.approx(0.9**139)
    bound = 1 - math.sqrt(1 - math.sqrt(epsilon))
    # the intervals of the steps before were a little wider: K follows ε, it does not lead
    assert bound / 2 < (weight.abs() - 1).abs().max() < 1.2 * bound
    optimizer.quantize()
    assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), weight.sign())


def test_hold_is_essential():
    """With a hold weights first go where the loss wants them; annealed at once, they stay."""
    target = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    held, _ = anneal(target, hold=30, epochs=130)
    at_once, _ = anneal(target, hold=0, epochs=130, steps_per_epoch=1)
    assert (held.sign() == target.sign()).all()
    assert (at_once.sign() == target.sign()).double().mean() < 0.75


def test_more_levels():
    levels = tuple(float(level) for level in range(-3, 4))
    target = 4 * torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 2
    weight = torch.nn.Parameter(torch.zeros(300, dtype=torch.float64))
    optimizer = ASkewSGD([weight], 0.1, steps_per_epoch=10, levels=levels, hold=30, decay=0.9)
    for _ in range(1500):
        to_target(weight, target)
        optimizer.step()
    nearest = weight.detach().round()
    assert (weight.detach() - nearest).abs().max() < 0.02
    # one with its target about halfway may end at either side
    clear = (target - target.floor() - 0.5).abs() > 0.1
    assert torch.equal(nearest[clear], target.round()[clear])
    optimizer.quantize()
    assert torch.equal(weight.detach(), nearest)


def test_weights_never_leave_the_range_of_the_levels():
    weight = torch.nn.Parameter(torch.tensor([-7.0, 0.5, 1.0]))
    optimizer = ASkewSGD([weight], 1.0, steps_per_epoch=1, hold=1)
    weight.grad = torch.tensor([0.0, -100.0, 100.0])
    optimizer.step()
    assert torch.equal(weight.detach(), torch.tensor([-1.0, 1.0, -1.0]))


def test_schedule_is_one_in_the_hold_and_then_falls_by_epoch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = ASkewSGD([weight], 0.1, steps_per_epoch=3, hold=2, decay=0.5)
    seen = []
    for _ in range(12):
        weight.grad = torch.zeros(1)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["epsilon"])
    assert seen == [1.0] * 9 + [0.5] * 3


def test_a_group_without_levels_is_plain_sgd():
    ours, theirs = torch.nn.Parameter(torch.full((3,), 5.0)), torch.nn.Parameter(torch.full((3,), 5.0))
    groups = [{"params": [ours], "levels": None}]
    mine = ASkewSGD(groups, 0.1, steps_per_epoch=1, hold=0, decay=0.5)
    sgd = torch.optim.SGD([theirs], 0.1)
    for _ in range(10):
        to_target(ours, 0.2)
        to_target(theirs, 0.2)
        mine.step()
        sgd.step()
    mine.quantize()
    assert torch.equal(ours, theirs)


def test_interval_takes_the_outer_two_beyond_the_levels():
    low, high = find_interval(torch.tensor([-5.0, -1.0, -0.1, 3.0]), torch.tensor([-1.0, 0.0, 2.0]))
    assert low.tolist() == [-1.0, -1.0, -1.0, 0.0]
    assert high.tolist() == [0.0, 0.0, 0.0, 2.0]
