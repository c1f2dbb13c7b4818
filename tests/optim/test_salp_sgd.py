"""SalpSGD: alone it is SGD, with company it is never higher than SGD on the batch."""

import math
from itertools import pairwise

import pytest
import torch

from plywise.errors import PlywiseError
from plywise.optim import SalpSGD
from plywise.optim.salp_sgd import compute_spread, find_lowest


def start(shape=(6,), seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double())


def quadratic(weight, curvature=1.0):
    def closure():
        weight.grad = None
        loss = 0.5 * curvature * weight.square().sum()
        loss.backward()
        return loss

    return closure


def bumpy(weight):
    """Many shallow minima on a bowl."""

    def closure():
        weight.grad = None
        loss = (weight.square() / 20 + torch.cos(6 * weight)).sum()
        loss.backward()
        return loss

    return closure


def test_alone_it_is_sgd_bit_for_bit_at_one_pass_a_step():
    ours, theirs, calls = start(), start(), []
    salp = SalpSGD([ours], 0.3, total_steps=30, salps=1, radius=0.5)
    sgd = torch.optim.SGD([theirs], 0.3)
    for _ in range(30):
        salp.step(lambda: (calls.append(1), bumpy(ours)())[1])
        bumpy(theirs)()
        sgd.step()
    assert torch.equal(ours, theirs)
    assert len(calls) == 30


def test_no_radius_and_a_rate_that_goes_down_is_sgd():
    """Leaders sit on the food and followers come from above: the food is the first of the lowest."""
    ours, theirs = start(), start()
    salp = SalpSGD([ours], 0.3, total_steps=30, salps=5, radius=0.0)
    sgd = torch.optim.SGD([theirs], 0.3)
    for _ in range(30):
        salp.step(quadratic(ours))
        quadratic(theirs)()
        sgd.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("curvature", [1.0, 30.0])
@pytest.mark.parametrize("salps", [2, 4, 7])
def test_each_step_is_at_most_as_high_as_a_step_of_sgd(salps, curvature):
    """Also where SGD's own step goes up: lr · curvature is 3 in one case."""
    weight = start()
    salp = SalpSGD([weight], 0.1, total_steps=20, salps=salps, radius=0.3)
    for _ in range(20):
        alone = torch.nn.Parameter(weight.detach().clone())
        quadratic(alone, curvature)()
        torch.optim.SGD([alone], 0.1).step()
        salp.step(quadratic(weight, curvature))
        assert quadratic(weight, curvature)().item() <= quadratic(alone, curvature)().item()


def test_loss_of_the_whole_batch_never_rises_at_a_rate_that_goes_down():
    weight, losses = start((20,), seed=3), []
    salp = SalpSGD([weight], 0.02, total_steps=100, salps=6, radius=0.3)
    for _ in range(100):
        losses.append(salp.step(bumpy(weight)).item())
    assert all(after <= before for before, after in pairwise(losses))


def test_with_company_it_ends_lower_in_a_bumpy_bowl():
    ends = {}
    for salps in (1, 8):
        weight = torch.nn.Parameter(torch.tensor([4.1, 5.2], dtype=torch.float64))
        salp = SalpSGD([weight], 0.02, total_steps=200, salps=salps, radius=1.0)
        for _ in range(200):
            salp.step(bumpy(weight))
        ends[salps] = bumpy(weight)().item()
    assert ends[8] < ends[1] - 0.5


def test_quadratic_is_solved():
    weight = start((30,))
    salp = SalpSGD([weight], 0.3, total_steps=200, radius=0.1)
    for _ in range(200):
        salp.step(quadratic(weight))
    assert quadratic(weight)().item() < 1e-20


def test_spread_is_two_then_a_fiftieth_then_nothing():
    assert compute_spread(0.0) == 2
    assert compute_spread(0.5) == pytest.approx(2 * math.exp(-4))
    assert compute_spread(1.0) < 1e-6


def test_a_step_costs_salps_plus_one_evaluations_at_as_many_points():
    weight, points = start(), []

    def closure():
        points.append(weight.detach().clone())
        return quadratic(weight)()

    SalpSGD([weight], 0.1, total_steps=10, salps=6, radius=0.2).step(closure)
    assert len(points) == 7
    assert len({tuple(point.tolist()) for point in points}) == 7
    food = points[1]
    torch.testing.assert_close(food, 0.9 * points[0])
    for leader in points[2:5]:
        assert 0 < (leader - food).abs().max() <= 2 * 0.2
    torch.testing.assert_close(points[5], (points[0] + points[4]) / 2)
    torch.testing.assert_close(points[6], (points[0] + points[5]) / 2)
    assert any(torch.equal(weight, point) for point in points[1:])


def test_seed_alone_decides_what_leaders_draw():
    ends = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        weight = start()
        salp = SalpSGD([weight], 0.02, total_steps=10, radius=0.5, seed=seed)
        for _ in range(5):
            salp.step(bumpy(weight))
        ends.append(weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_closure_that_fails_midway_leaves_no_trace():
    weight, calls = start(), []
    salp = SalpSGD([weight], 0.1, total_steps=10, salps=6, radius=0.2)
    salp.step(quadratic(weight))
    before = weight.detach().clone()
    state = {name: value.clone() for name, value in salp.state[weight].items()}
    steps = salp.param_groups[0]["steps"]

    def closure():
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("out of data")
        return quadratic(weight)()

    with pytest.raises(KeyError):
        salp.step(closure)
    assert torch.equal(weight, before)
    assert salp.param_groups[0]["steps"] == steps
    assert all(torch.equal(salp.state[weight][name], value) for name, value in state.items())


def test_points_without_a_finite_loss_are_never_chosen():
    weight = torch.nn.Parameter(torch.ones(1))
    points = [torch.tensor([value]) for value in (1.0, 2.0, 3.0)]
    losses = {1.0: float("nan"), 2.0: float("inf"), 3.0: 5.0}
    best = find_lowest([[point] for point in points], [weight], lambda: losses[weight.item()])
    assert best[0] is points[2]
    assert weight.item() == 1.0


def test_groups_share_one_chain():
    left, right = start(), start()
    with pytest.raises(ValueError, match="salps must be the same"):
        SalpSGD([{"params": [left], "salps": 2}, {"params": [right], "salps": 3}], total_steps=5)
    with pytest.raises(ValueError, match="seed must be the same"):
        SalpSGD([{"params": [left], "seed": 2}, {"params": [right], "seed": 3}], total_steps=5)


def test_a_step_without_closure_is_refused():
    with pytest.raises(PlywiseError, match="closure"):
        SalpSGD([start()], total_steps=5).step()
