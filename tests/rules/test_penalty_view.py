"""The penalty function of ProxProp's paper: sweeps of descent over it against its slopes by autograd."""

import copy

import pytest
import torch
from algebra import relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.rules.penalty_view import Lifted

pytestmark = pytest.mark.usefixtures("double")


def chain() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(8, 9), nn.Tanh()),
        nn.Linear(9, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.Sigmoid(),
        nn.Linear(5, 4),
    )
    return model, torch.randn(11, 2, 4), torch.randint(4, (11,))


def image_net() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, groups=1),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.LogSoftmax(1),
    )
    return model, torch.randn(7, 2, 8, 8), torch.randint(5, (7,))


def step(model: nn.Module, x: Tensor, y: Tensor, rate: float, rule: pw.Rule | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    if rule is not None:
        rule.attach(model, optimizer)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    if rule is not None:
        rule.detach()


def distance(model: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """How far the moves of two models from a common start are apart, for the worst parameter."""
    parts = zip(model.parameters(), other.parameters(), start.parameters(), strict=True)
    return max(relative(a.detach() - c, b.detach() - c) for a, b, c in parts)


@pytest.mark.parametrize("make", [chain, image_net])
@pytest.mark.parametrize("tau", [0.05, 3.0])
def test_a_sweep_is_a_step_of_backpropagation(make, tau):
    """Proposition 1: with ρ = γ = 1/τ, whatever τ."""
    model, x, y = make()
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    view = pw.PenaltyView(model, cross_entropy, tau)
    view.sweep(view.lift(x), y)
    step(plain, x, y, tau, None)
    assert distance(model, plain, start) < 1e-10
    assert all(p.grad is None for p in model.parameters())


RULES = {
    "exact": (pw.ProxProp(0.4), pw.ProxProp(0.4, last_layer="explicit")),
    "cg": (pw.ProxProp(2.0, "cg", 2), pw.ProxProp(2.0, "cg", 2, last_layer="explicit")),
    "cg_flat": (pw.ProxProp(2.0, "cg_flat", 3), pw.ProxProp(2.0, "cg_flat", 3, last_layer="explicit")),
}


@pytest.mark.parametrize("make", [chain, image_net])
@pytest.mark.parametrize("name", RULES)
def test_a_sweep_with_proximal_steps_is_a_step_of_proxprop(make, name):
    """Proposition 2: the implicit step (11) on each layer but the last."""
    model, x, y = make()
    start, trained = copy.deepcopy(model), copy.deepcopy(model)
    in_sweep, attached = RULES[name]
    view = pw.PenaltyView(model, cross_entropy, 0.3, rule=in_sweep)
    view.sweep(view.lift(x), y)
    step(trained, x, y, 0.3, attached)
    assert distance(model, trained, start) < 1e-9
    plain = copy.deepcopy(start)
    step(plain, x, y, 0.3, None)
    assert distance(model, plain, start) > 0.1


def test_rho_and_gamma_are_rates_of_layers():
    """A layer k below the last one takes a step of backpropagation times ``(τ²ργ)^k``."""
    model, x, y = chain()
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    tau, rho, gamma = 0.2, 3.0, 7.0
    view = pw.PenaltyView(model, cross_entropy, tau, rho=rho, gamma=gamma)
    view.sweep(view.lift(x), y)
    step(plain, x, y, tau, None)
    layers = [[m for m in net.modules() if isinstance(m, nn.Linear)] for net in (model, plain, start)]
    for depth, (ours, other, before) in enumerate(zip(*(reversed(part) for part in layers), strict=True)):
        factor = (tau**2 * rho * gamma) ** depth
        moved = (ours.weight - before.weight) / factor
        assert relative(moved, other.weight - before.weight) < 1e-9


def scatter(lifted: Lifted) -> Lifted:
    """Variables that no forward pass has made; the data stay."""
    far = [t + 0.3 * torch.randn_like(t) for t in (*lifted.z, *lifted.a[1:])]
    count = len(lifted.z)
    return Lifted(tuple(far[:count]), (lifted.a[0], *far[count:]))


@pytest.mark.parametrize("make", [chain, image_net])
def test_each_step_of_a_sweep_is_descent_on_the_energy(make):
    """From any variables: the slope of E by autograd, with the new values of what is above."""
    model, x, y = make()
    view = pw.PenaltyView(model, cross_entropy, 0.1, rho=2.0, gamma=5.0)
    before = scatter(view.lift(x))
    start = copy.deepcopy(model)
    after = view.sweep(before, y)
    old = pw.PenaltyView(start, cross_entropy, 0.1, rho=2.0, gamma=5.0)
    z, a = list(before.z), list(before.a)
    for layer in range(len(old.maps) - 1, -1, -1):
        if layer < len(z):
            z[layer] = z[layer].detach().requires_grad_()
            (slope,) = torch.autograd.grad(old.energy(Lifted(tuple(z), tuple(a)), y), z[layer])
            z[layer] = z[layer].detach() - 0.1 * slope
            assert relative(after.z[layer], z[layer]) < 1e-12
        a[layer] = a[layer].detach().requires_grad_()
        weight = old.maps[layer].weight
        slopes = torch.autograd.grad(old.energy(Lifted(tuple(z), tuple(a)), y), [a[layer], weight])
        a[layer] = a[layer].detach() - 0.1 * slopes[0] * (layer > 0)
        assert relative(after.a[layer], a[layer]) < 1e-12
        assert relative(view.maps[layer].weight, weight - 0.1 * slopes[1]) < 1e-12


def test_the_energy_is_the_loss_after_a_forward_pass_and_the_sum_of_the_definition_elsewhere():
    model, x, y = chain()
    view = pw.PenaltyView(model, cross_entropy, 0.5, rho=2.0, gamma=5.0)
    lifted = view.lift(x)
    assert view.energy(lifted, y).item() == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-12)
    far = scatter(lifted)
    first, second, third, last = model[1][0], model[2], model[4], model[6]
    expected = cross_entropy(last(far.a[3]), y)
    for layer, sigma, i in ((first, torch.tanh, 0), (second, torch.relu, 1), (third, torch.sigmoid, 2)):
        expected = expected + 1.0 * (layer(far.a[i]) - far.z[i]).square().sum()
        expected = expected + 2.5 * (sigma(far.z[i]) - far.a[i + 1]).square().sum()
    assert view.energy(far, y).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rule", [None, pw.ProxProp(0.5)], ids=str)
def test_small_sweeps_only_lower_the_energy(rule):
    model, x, y = chain()
    view = pw.PenaltyView(model, cross_entropy, 0.01, rho=1.0, gamma=1.0, rule=rule)
    lifted = scatter(view.lift(x))
    energies = [view.energy(lifted, y).item()]
    for _ in range(30):
        lifted = view.sweep(lifted, y)
        energies.append(view.energy(lifted, y).item())
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < 0.95 * energies[0]


def test_frozen_parameters_stay_and_gradients_at_hand_are_kept():
    model, x, y = chain()
    model[2].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = copy.deepcopy(model)
    view = pw.PenaltyView(model, cross_entropy, 0.3)
    view.sweep(view.lift(x), y)
    assert torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[1][0].weight, before[1][0].weight)
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))


def test_what_has_no_energy_is_refused():
    model, *_ = chain()
    with pytest.raises(ValueError, match="must be positive"):
        pw.PenaltyView(model, cross_entropy, 0.1, rho=0.0)
    with pytest.raises(ValueError, match="no module with parameters"):
        pw.PenaltyView(nn.Sequential(nn.ReLU()), cross_entropy, 0.1)
    with pytest.raises(ValueError, match="one value"):
        pw.PenaltyView(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), cross_entropy, 0.1)
    for rule in (pw.Foof(), pw.BackMatching("exact")):
        with pytest.raises(ValueError, match="rule of one batch"):
            pw.PenaltyView(model, cross_entropy, 0.1, rule=rule)
