"""The slope recovery term against its formula, its gradient, and what becomes of it at the extremes."""

import math

import pytest
import torch
from torch import nn

from plywise.errors import PlywiseError
from plywise.losses import slope_recovery
from plywise.nn import AdaptiveActivation, adapt_activations


def network(*slopes):
    modules = []
    for values in slopes:
        module = AdaptiveActivation(nn.Tanh(), torch.tensor(values).shape)
        with torch.no_grad():
            module.slope.copy_(torch.tensor(values))
        modules.append(module)
    return nn.Sequential(*modules).double()


def by_definition(*slopes):
    means = [sum(values) / len(values) if isinstance(values, list) else values for values in slopes]
    return 1 / (sum(math.exp(a) for a in means) / len(means))


@pytest.mark.parametrize(("n", "expected"), [(1, 1 / math.e), (10, 0.904837), (2, math.exp(-0.5))])
@pytest.mark.parametrize("kind", ["global", "layer", "neuron"])
def test_at_the_start(kind, n, expected):
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    adapt_activations(model, kind, n=n, example=torch.zeros(1, 2))
    assert slope_recovery(model).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "slopes", [(0.3, 1.2, -0.5), ([0.1, 0.9], [2.0, -1.0, 0.4]), ([1.0, 2.0], 0.5), (0.2,)]
)
def test_the_formula(slopes):
    assert slope_recovery(network(*slopes)).item() == pytest.approx(by_definition(*slopes), rel=1e-6)


def test_steeper_is_less_and_the_gradient_says_how_much():
    model = network(0.3, [1.0, 2.0])
    slope_recovery(model).backward()
    step = 1e-6
    for place, index in [(0, ()), (1, (0,)), (1, (1,))]:
        gradient = model[place].slope.grad[index].item()
        assert gradient < 0
        before = slope_recovery(model).item()
        with torch.no_grad():
            model[place].slope[index] += step
        assert (slope_recovery(model).item() - before) / step == pytest.approx(gradient, rel=1e-4)
        with torch.no_grad():
            model[place].slope[index] -= step


@pytest.mark.parametrize("slope", [1000.0, -1000.0])
def test_extreme_slopes_give_no_nan(slope):
    model = network(slope, slope)
    term = slope_recovery(model)
    term.backward()
    assert not term.isnan()
    assert not any(module.slope.grad.isnan().any() for module in model)


def test_a_slope_that_goes_far_still_gets_a_gradient_of_zero_not_nan():
    model = network(200.0, 0.1)
    slope_recovery(model).backward()
    assert [module.slope.grad.item() for module in model] == pytest.approx([0, 0], abs=1e-30)


def test_a_plain_network_is_refused():
    with pytest.raises(PlywiseError, match="no adaptive activation"):
        slope_recovery(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
