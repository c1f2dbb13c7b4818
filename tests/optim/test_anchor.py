"""ProximalAnchor: the pull, its closed forms, the average, its state."""

import copy

import pytest
import torch

from plywise.errors import PlywiseError, StateError
from plywise.optim import ProximalAnchor


def parameters(*shapes, dtype=torch.float64):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def move(params):
    with torch.no_grad():
        for param in params:
            param.add_(torch.randn_like(param))


def reloaded(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def test_gradient_is_that_of_the_penalty():
    params = parameters((3, 4), (4,), (), (0, 2))
    anchor = ProximalAnchor(params)
    move(params)
    anchor.penalty(0.7).backward()
    of_penalty = [param.grad.clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    anchor.add_gradient(0.7)
    for param, expected in zip(params, of_penalty, strict=True):
        torch.testing.assert_close(param.grad, expected + 1, rtol=1e-14, atol=1e-14)


def test_penalty_is_half_the_squared_distance():
    params = parameters((3, 4), (4,))
    anchor = ProximalAnchor(params)
    start = torch.cat([param.detach().flatten() for param in params])
    move(params)
    now = torch.cat([param.detach().flatten() for param in params])
    torch.testing.assert_close(anchor.penalty(3.0).detach(), 1.5 * (now - start).square().sum())


def test_at_the_anchor_nothing_pulls():
    params = parameters((5,))
    anchor = ProximalAnchor(params)
    params[0].grad = torch.randn(5, dtype=torch.float64)
    before = params[0].grad.clone()
    anchor.add_gradient(10.0)
    assert torch.equal(params[0].grad, before)
    assert anchor.penalty(10.0).item() == 0


def test_a_fixed_anchor_at_zero_shrinks_the_minimum():
    """On ½‖w − t‖² with the pull 2λ(w − 0) the limit is t / (1 + 2λ)."""
    target, strength = torch.tensor([1.0, -3.0], dtype=torch.float64), 0.5
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    anchor = ProximalAnchor([weight])
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(100):
        weight.grad = (weight - target).detach()
        anchor.add_gradient(2 * strength)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), target / (1 + 2 * strength))


def test_proximal_point_ends_at_the_minimum_itself():
    """With an anchor that moves, the pull vanishes in the end: the fixed point is the loss's own."""
    target = torch.tensor([1.0, -3.0], dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    anchor = ProximalAnchor([weight])
    optimizer = torch.optim.SGD([weight], lr=0.3)
    for _ in range(60):
        for _ in range(20):
            weight.grad = (weight - target).detach()
            anchor.add_gradient(1.0)
            optimizer.step()
        anchor.refresh()
    torch.testing.assert_close(weight.detach(), target)


def test_a_gradient_that_is_none_stays_none_and_a_frozen_parameter_is_a_constant():
    unused, used, frozen = params = parameters((2,), (2,), (2,))
    frozen.requires_grad_(False)
    anchor = ProximalAnchor(params)
    move(params)
    used.grad = torch.zeros(2, dtype=torch.float64)
    anchor.add_gradient(1.0)
    assert unused.grad is None
    assert frozen.grad is None
    assert used.grad.abs().min() > 0
    anchor.penalty(1.0).backward()
    assert unused.grad is not None
    assert frozen.grad is None


def test_average_is_the_mean_of_what_was_accumulated():
    params = parameters((3,), (2, 2))
    anchor = ProximalAnchor(params)
    seen = []
    for _ in range(7):
        move(params)
        anchor.accumulate()
        seen.append([param.detach().clone() for param in params])
    means = [torch.stack(values).mean(0) for values in zip(*seen, strict=True)]
    torch.testing.assert_close(anchor.average(), means, rtol=1e-12, atol=1e-12)
    last = [param.detach().clone() for param in params]
    anchor.refresh_to_average()
    torch.testing.assert_close(anchor.anchors, means, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(param, value) for param, value in zip(params, last, strict=True))
    assert anchor.count == 0
    with pytest.raises(PlywiseError, match="accumulate"):
        anchor.refresh_to_average()


def test_average_of_half_precision_is_not_rounded_off():
    """In bfloat16 itself the steps of the mean would soon be too small to move it."""
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    anchor = ProximalAnchor([param])
    for value in [1.0] * 512 + [3.0] * 512:
        param.data.fill_(value)
        anchor.accumulate()
    assert anchor.average()[0].item() == 2.0
    assert anchor.average()[0].dtype == torch.bfloat16


def test_refresh_keeps_the_average_and_takes_no_view():
    params = parameters((3,))
    anchor = ProximalAnchor(params)
    anchor.accumulate()
    move(params)
    anchor.refresh()
    assert anchor.count == 1
    assert torch.equal(anchor.anchors[0], params[0].detach())
    move(params)
    assert not torch.equal(anchor.anchors[0], params[0].detach())


@pytest.mark.parametrize("accumulated", [0, 3])
def test_state_travels_and_goes_on_bit_for_bit(tmp_path, accumulated):
    params = parameters((3, 2), ())
    anchor = ProximalAnchor(params)
    for _ in range(accumulated):
        move(params)
        anchor.accumulate()
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = ProximalAnchor(others)
    other.load_state_dict(reloaded(anchor.state_dict(), tmp_path))
    for mine, theirs in ((anchor, params), (other, others)):
        torch.manual_seed(1)
        move(theirs)
        mine.accumulate()
        mine.refresh_to_average()
    assert all(torch.equal(a, b) for a, b in zip(anchor.anchors, other.anchors, strict=True))


def test_a_loaded_state_is_a_copy():
    params = parameters((3,))
    anchor = ProximalAnchor(params)
    anchor.accumulate()
    state = copy.deepcopy(anchor.state_dict())
    other = ProximalAnchor(parameters((3,)))
    other.load_state_dict(state)
    kept = copy.deepcopy(state)
    move(other.params)
    other.accumulate()
    other.refresh()
    assert torch.equal(state["anchors"][0], kept["anchors"][0])
    assert torch.equal(state["means"][0], kept["means"][0])


def test_a_state_of_other_parameters_is_refused_and_changes_nothing():
    anchor = ProximalAnchor(parameters((3,)))
    anchor.accumulate()
    before = copy.deepcopy(anchor.state_dict())
    other = ProximalAnchor(parameters((4,)))
    other.accumulate()
    broken = {**before, "means": other.state_dict()["means"]}
    for state in (other.state_dict(), broken, {**before, "anchors": []}):
        with pytest.raises(StateError, match="other parameters"):
            anchor.load_state_dict(state)
    assert torch.equal(anchor.anchors[0], before["anchors"][0])
    assert anchor.count == 1


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_wrong_strengths_are_refused(strength):
    anchor = ProximalAnchor(parameters((3,)))
    with pytest.raises(ValueError, match="strength"):
        anchor.add_gradient(strength)
    with pytest.raises(ValueError, match="strength"):
        anchor.penalty(strength)


def test_wrong_parameters_are_refused():
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="none"):
        ProximalAnchor([])
    with pytest.raises(ValueError, match="twice"):
        ProximalAnchor([param, param])
    with pytest.raises(ValueError, match="complex64"):
        ProximalAnchor([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="tuple"):
        ProximalAnchor(torch.nn.Linear(2, 2).named_parameters())


def test_a_sparse_gradient_is_refused_by_name():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    anchor = ProximalAnchor(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(PlywiseError, match="sparse"):
        anchor.add_gradient(1.0)
