"""Adaptive activations: what they compute, whose place they take, and the benchmark's problems."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import plywise as pw
from benchmark_scripts import import_script
from plywise.errors import PlywiseError
from plywise.nn import AdaptiveActivation, adapt_activations
from plywise.nn.adaptive_activation import ACTIVATIONS


def mlp(activation=nn.Tanh, depth=3, width=7):
    hidden = [m for k in range(depth) for m in (nn.Linear(2 if k == 0 else width, width), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, 1)).double()


class Twice(nn.Module):
    """One activation module for two layers, or for none."""

    def __init__(self, used):
        super().__init__()
        self.first, self.second, self.act, self.used = nn.Linear(2, 4), nn.Linear(4, 4), nn.Tanh(), used

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x)))) if self.used else self.second(self.first(x))


@pytest.mark.parametrize("n", [1, 2, 5, 10, 49, 2.5])
@pytest.mark.parametrize("kind", ["global", "layer", "neuron"])
def test_the_network_begins_as_what_it_was(kind, n):
    model, x = mlp(), torch.randn(6, 2, dtype=torch.float64)
    before = model(x)
    adapt_activations(model, kind, n=n, example=x)
    torch.testing.assert_close(model(x), before, rtol=1e-14, atol=1e-15)


def test_the_equation():
    tanh, z = AdaptiveActivation(nn.Tanh(), (3,), n=5), torch.randn(4, 3)
    with torch.no_grad():
        tanh.slope.copy_(torch.tensor([0.1, -0.3, 2.0]))
    expected = [
        [math.tanh(5 * a * v) for a, v in zip((0.1, -0.3, 2.0), row, strict=True)] for row in z.tolist()
    ]
    torch.testing.assert_close(tanh(z), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(), (5,), (4, 5)])
def test_gradients_against_differences(shape):
    module = AdaptiveActivation(nn.Softplus(), shape, n=2).double()
    z = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def output(slope, z):
        return torch.func.functional_call(module, {"slope": slope}, (z,))

    slope = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (slope, z))
    assert torch.autograd.gradgradcheck(output, (slope, z))


def test_for_relu_a_slope_is_a_scale_of_the_output():
    relu, z = AdaptiveActivation(nn.ReLU(), n=2), torch.randn(50)
    before = relu(z)
    with torch.no_grad():
        relu.slope.mul_(3)
    torch.testing.assert_close(relu(z), 3 * before)


@pytest.mark.parametrize(("kind", "extra"), [("global", 1), ("layer", 3), ("neuron", 21)])
def test_how_many_slopes_there_are(kind, extra):
    model = mlp()
    before = sum(p.numel() for p in model.parameters())
    adapt_activations(model, kind, example=torch.zeros(1, 2, dtype=torch.float64))
    assert sum(p.numel() for p in model.parameters()) == before + extra


def test_a_global_slope_stays_one_through_copies_and_state_dicts():
    model = mlp()
    adapt_activations(model, "global", n=5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].slope.fill_(0.7)
    assert [twin[k].slope.item() for k in (1, 3, 5)] == [0.7] * 3
    assert model[1].slope.item() == 0.2

    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert model[1].slope is model[5].slope
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(model(x), twin(x))


def test_convolutions_get_a_slope_a_channel_and_pixel():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    (adapted,) = adapt_activations(model, "neuron", example=torch.zeros(2, 1, 8, 8))
    assert adapted.slope.shape == (3, 3, 3)


def test_slopes_train_with_any_optimizer_and_a_rule():
    model, x = mlp().float(), torch.randn(16, 2)
    adapted = adapt_activations(model, "neuron", n=5, example=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    rule.detach()
    assert all((module.slope != 0.2).any() for module in adapted)


def test_the_example_leaves_no_trace():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 1))
    model[1].eval()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(8, 2)
    modes, seed = [m.training for m in model.modules()], torch.get_rng_state()
    adapt_activations(model, "layer", example=x)
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [m.training for m in model.modules() if not isinstance(m, AdaptiveActivation)] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_of_several_arguments_and_activations_of_ones_own():
    class Sine(nn.Module):
        def forward(self, x):
            return x.sin()

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([Sine()])

        def forward(self, a, b):
            return self.inner[0](a + b)

    model = Sum()
    (adapted,) = adapt_activations(
        model, "neuron", example=(torch.ones(2, 3), torch.ones(3)), types=(*ACTIVATIONS, Sine)
    )
    assert model.inner[0] is adapted
    assert adapted.slope.shape == (3,)


def test_one_module_at_two_places_gets_a_slope_at_each():
    tanh = nn.Tanh()
    model = nn.Sequential(nn.Linear(2, 3), tanh, nn.Linear(3, 4), tanh)
    first, second = adapt_activations(model, "neuron", example=torch.zeros(1, 2))
    assert (first.slope.shape, second.slope.shape) == ((3,), (4,))
    assert model(torch.ones(5, 2)).shape == (5, 4)


@pytest.mark.parametrize("used", [True, False])
def test_a_module_that_stands_for_several_layers_or_none_is_refused(used):
    model = Twice(used)
    with pytest.raises(
        PlywiseError, match=r"'act' ran (2|0) times on the example, not once.*module of its own"
    ):
        adapt_activations(model, "neuron", example=torch.zeros(1, 2))
    assert type(model.act) is nn.Tanh
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapt_activations(model, "neuron", example=torch.zeros(1, 5))
    assert type(model.act) is nn.Tanh


def test_a_shared_block_is_refused_by_the_example():
    block = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model = nn.Sequential(block, block)
    with pytest.raises(PlywiseError, match=r"ran 2 times"):
        adapt_activations(model, example=torch.zeros(1, 2))
    (only,) = adapt_activations(model)
    assert block[1] is only


def test_what_cannot_be_adapted_says_so():
    with pytest.raises(PlywiseError, match=r"no activation module.*F\.relu"):
        adapt_activations(nn.Linear(2, 2))
    with pytest.raises(PlywiseError, match="single activation"):
        adapt_activations(nn.Tanh())
    with pytest.raises(PlywiseError, match="example="):
        adapt_activations(mlp(), "neuron")
    model = mlp()
    adapt_activations(model)
    with pytest.raises(PlywiseError, match="already"):
        adapt_activations(model)


@pytest.mark.parametrize("n", [0, 0.5, -1, math.inf, math.nan, "5", True])
def test_wrong_factors(n):
    with pytest.raises(ValueError, match=r"n must be a finite number of at least 1"):
        AdaptiveActivation(nn.Tanh(), n=n)
    with pytest.raises(ValueError, match=r"n must be a finite number of at least 1"):
        adapt_activations(mlp(), n=n)


def test_wrong_shapes_and_kinds():
    with pytest.raises(ValueError, match="shape must be whole numbers"):
        AdaptiveActivation(nn.Tanh(), (3, 0))
    with pytest.raises(ValueError, match="'global', 'layer' or 'neuron', not 'channel'"):
        adapt_activations(mlp(), "channel")


# The benchmark


@pytest.fixture(scope="module")
def benchmark():
    return import_script("physics_informed")


def spectral_burgers(nu, points, end, step):
    """Burgers by a Fourier method: nothing in it but the equation itself."""
    x = -1 + 2 * np.arange(points) / points
    k = np.pi * np.fft.fftfreq(points, 1 / points)
    low = np.abs(k) < np.pi * points / 3
    decay = np.exp(-nu * k**2 * step / 2)

    def push(v):
        return -0.5j * k * low * np.fft.fft(np.fft.ifft(v * low).real ** 2) * step

    u = np.fft.fft(-np.sin(np.pi * x))
    for _ in range(round(end / step)):
        a = push(u)
        b = push(decay * (u + a / 2))
        c = push(decay * u + b / 2)
        d = push(decay**2 * u + decay * c)
        u = decay**2 * u + (decay**2 * a + 2 * decay * (b + c) + d) / 6
    return x, np.fft.ifft(u).real


@pytest.mark.parametrize("end", [0.2, 0.6])
def test_cole_hopf_against_a_spectral_solver(benchmark, end):
    x, u = spectral_burgers(benchmark.NU, 2048, end, 5e-4)
    np.testing.assert_allclose(benchmark.solve_by_cole_hopf(x, np.full_like(x, end)), u, atol=1e-6)


def test_the_source_makes_the_coefficient_and_the_potential_a_solution(benchmark):
    x = torch.rand(200, 2, dtype=torch.float64, requires_grad=True)
    exact = torch.stack([benchmark.compute_potential(x), benchmark.compute_coefficient(x)], 1)
    assert benchmark.compute_poisson_residual(x, exact).abs().max() < 1e-12


def test_the_data_are_points_of_the_solutions(benchmark):
    generator = torch.Generator().manual_seed(0)
    x, targets = benchmark.draw_poisson_data(generator)
    exact = torch.stack([benchmark.compute_potential(x), benchmark.compute_coefficient(x)], 1)
    known = ~targets.isnan()
    torch.testing.assert_close(targets[known], exact[known], atol=1e-6, rtol=1e-6)
    x, targets = benchmark.draw_burgers_data(generator)
    exact = benchmark.solve_by_cole_hopf(*x.double().numpy().T)
    np.testing.assert_allclose(targets[:, 0], exact, atol=1e-6)


@pytest.mark.parametrize("kind", ["fixed", "global", "layer", "neuron"])
def test_seeds_side_by_side_are_those_one_by_one(benchmark, kind):
    problem = benchmark.PROBLEMS["poisson"]
    _, many = benchmark.train(problem, kind, 2, 3)
    _, one = benchmark.train(problem, kind, 1, 3)
    for name, value in one.items():
        torch.testing.assert_close(many[name][:1], value, rtol=1e-4, atol=1e-5)
