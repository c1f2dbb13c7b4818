"""Threshold neurons: estimators against their definition, and optima against slow ways to find them."""

import copy
import doctest
import itertools

import pytest
import torch
from torch import nn

import plywise.nn.threshold as module
from plywise.data.digits import load_digits
from plywise.errors import NonFiniteError, PlywiseError
from plywise.nn import Threshold, ThresholdNetwork
from plywise.nn.threshold import ESTIMATORS, draw_patterns, find_shattered_optimum, lasso, split_into_steps

X = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 0.5, 1.0, 1.5])
SLOPES = {
    "identity": [1, 1, 1, 1, 1, 1, 1],
    "relu": [0, 0, 1, 1, 1, 1, 1],
    "leaky_relu": [0.1, 0.1, 1, 1, 1, 1, 1],
    "clipped_relu": [0, 0, 1, 1, 1, 1, 0],
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_step_forward_and_the_estimators_slope_backward(estimator):
    x = X.clone().requires_grad_()
    y = Threshold(estimator=estimator, slope=0.1)(x)
    assert y.tolist() == [0, 0, 1, 1, 1, 1, 1]
    y.backward(torch.arange(7.0) + 1)
    torch.testing.assert_close(x.grad, torch.tensor(SLOPES[estimator]) * (torch.arange(7.0) + 1))
    assert y.dtype == x.dtype


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_forward_mode_and_vmap_take_the_same_slope(estimator):
    layer = Threshold(estimator=estimator, slope=0.1)
    tangent = torch.linspace(1, 2, 7)
    y, out = torch.func.jvp(layer, (X,), (tangent,))
    assert y.tolist() == [0, 0, 1, 1, 1, 1, 1]
    torch.testing.assert_close(out, torch.tensor(SLOPES[estimator]) * tangent)
    slopes = torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(X[:, None])
    torch.testing.assert_close(slopes[:, 0], torch.tensor(SLOPES[estimator], dtype=torch.float32))


def test_a_nan_is_not_passed_off_as_a_zero():
    y = Threshold()(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert y.isnan().tolist() == [True, False, False]
    assert y[1:].tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2)])
def test_amplitudes_belong_to_channels_and_learn(shape):
    layer = Threshold(3)
    with torch.no_grad():
        layer.amplitude.copy_(torch.tensor([1.0, -2.0, 0.5]))
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    scale = torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, *[1] * (len(shape) - 2))
    assert torch.equal(y, (x >= 0) * scale)
    assert torch.equal(x.grad, scale.expand(shape))
    assert torch.equal(layer.amplitude.grad, (x >= 0).transpose(0, 1).flatten(1).sum(1).float())


def test_amplitudes_travel_in_a_state_dict(tmp_path):
    layer, other = Threshold(3), Threshold(3)
    nn.init.normal_(layer.amplitude)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(X[:3][None]), layer(X[:3][None]))
    assert not Threshold().state_dict()
    assert torch.equal(copy.deepcopy(layer).amplitude, layer.amplitude)


def test_a_network_of_thresholds_learns_digits():
    torch.manual_seed(0)
    train, _, test = load_digits()
    model = nn.Sequential(nn.Linear(64, 100), Threshold(100, estimator="clipped_relu"), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.x), train.y).backward()
        optimizer.step()
    assert (model(test.x).argmax(1) == test.y).double().mean() > 0.85


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"estimator": "sign"}, "estimator"),
        ({"slope": 0.0}, "slope"),
        ({"slope": float("nan")}, "slope"),
        ({"features": 0}, "features"),
        ({"features": 2.0}, "features"),
    ],
)
def test_bad_settings_of_the_activation(settings, said):
    with pytest.raises(ValueError, match=f"Threshold: {said}"):
        Threshold(**settings)


# the LASSO


def objective(columns, y, w, beta):
    return 0.5 * (y - columns @ w).square().sum() + beta * w.abs().sum()


@pytest.mark.parametrize("beta", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("classes", [False, True])
def test_kkt_conditions_of_the_lasso(beta, classes):
    x = normal(60, 6)
    y = normal(60, seed=1)
    y = y.sign() if classes else y  # labels of ±1 make many exact ties
    columns, _, _ = draw_patterns(x, 1000, torch.Generator().manual_seed(0))
    w = lasso(columns, y, beta)
    pull = columns.T @ (y - columns @ w)
    assert (pull.abs() <= beta * (1 + 1e-8)).all()
    assert (w != 0).any()
    torch.testing.assert_close(pull[w != 0], beta * w.sign()[w != 0], rtol=0, atol=1e-8)


def test_lasso_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, y, beta = normal(80, 5), normal(80, seed=1).sign(), 1.0
    columns, _, _ = draw_patterns(x, 1000, torch.Generator().manual_seed(0))
    peer = linear_model.Lasso(alpha=beta / 80, fit_intercept=False, tol=1e-8, max_iter=100_000)
    theirs = torch.from_numpy(peer.fit(columns.numpy(), y.numpy()).coef_)
    ours = lasso(columns, y, beta)
    assert objective(columns, y, ours, beta) <= objective(columns, y, theirs, beta) + 1e-9
    torch.testing.assert_close(columns @ ours, columns @ theirs, rtol=0, atol=1e-3)


def test_lasso_of_orthogonal_columns_is_soft_thresholding():
    columns = torch.linalg.qr(normal(12, 7)).Q
    y = 3 * normal(12, seed=1)
    expected = nn.functional.softshrink(columns.T @ y, 0.8)
    torch.testing.assert_close(lasso(columns, y, 0.8), expected, rtol=0, atol=1e-10)


def test_a_price_above_every_correlation_leaves_nothing():
    columns, y = normal(20, 30), normal(20, seed=1)
    top = (columns.T @ y).abs().max().item()
    assert not lasso(columns, y, top).any()
    assert lasso(columns, y, 0.999 * top).count_nonzero() == 1


def test_more_columns_never_raise_the_optimum():
    columns, _, _ = draw_patterns(normal(30, 4), 300, torch.Generator().manual_seed(0))
    columns = columns[:, torch.randperm(columns.shape[1], generator=torch.Generator().manual_seed(0))]
    y = normal(30, seed=1)
    values = [
        objective(columns[:, :count], y, lasso(columns[:, :count], y, 0.1), 0.1).item()
        for count in (1, 5, 20, 60, columns.shape[1])
    ]
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(values))
    assert values[-1] < 0.8 * values[0]


def test_dependent_and_doubled_columns_end_at_the_optimum():
    one, two = normal(10).sign() > 0, normal(10, seed=1) > 0
    columns = torch.stack([one, ~one, two, ~two, one | ~one, one], 1).double()
    y = normal(10, seed=2)
    w = lasso(columns, y, 0.05)
    pull = columns.T @ (y - columns @ w)
    assert (pull.abs() <= 0.05 * (1 + 1e-6)).all()
    start = torch.zeros(6, dtype=torch.float64)
    for _ in range(20_000):  # proximal gradients, slow and sure
        start = nn.functional.softshrink(start + 0.02 * columns.T @ (y - columns @ start), 0.02 * 0.05)
    assert objective(columns, y, w, 0.05) <= objective(columns, y, start, 0.05) + 1e-9


@pytest.mark.parametrize("columns", [torch.zeros(5, 3), torch.zeros(5, 0)])
def test_columns_that_explain_nothing(columns):
    assert lasso(columns, torch.ones(5), 1.0).tolist() == [0.0] * columns.shape[1]


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), "1"])
def test_bad_prices(beta):
    for function in (
        lambda: lasso(torch.eye(2), torch.ones(2), beta),
        lambda: find_shattered_optimum(X, beta),
    ):
        with pytest.raises(ValueError, match="beta"):
            function()


def test_lasso_names_numbers_that_are_not_finite():
    with pytest.raises(NonFiniteError, match="NaN"):
        lasso(torch.eye(2), torch.tensor([1.0, float("nan")]), 1.0)


# three layers


def three_layer_objective(delta, y, beta):
    return 0.5 * (delta - y).square().sum(-1) + beta * (
        delta.clamp_min(0).amax(-1) + (-delta).clamp_min(0).amax(-1)
    )


def test_closed_form_is_the_numerical_optimum():
    y, beta = 2 * normal(3), 0.7
    grid = torch.linspace(-4, 4, 161, dtype=torch.float64)
    everywhere = torch.cartesian_prod(grid, grid, grid)
    best = three_layer_objective(everywhere, y, beta).min()
    ours = three_layer_objective(find_shattered_optimum(y, beta), y, beta)
    assert best - 0.01 < ours <= best + 1e-12


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_no_step_from_the_closed_form_goes_down(beta):
    y = 2 * normal(40, seed=3)
    delta = find_shattered_optimum(y, beta)
    here = three_layer_objective(delta, y, beta)
    for size in (1e-4, 1e-2, 1.0):
        steps = size * normal(2000, 40, seed=4)
        assert (three_layer_objective(delta + steps, y, beta) >= here - 1e-12).all()
        clipped = y.clamp(delta.min() - size, delta.max() + size)
        assert three_layer_objective(clipped, y, beta) >= here
        inside = y.clamp((delta.min() + size).clamp_max(0), (delta.max() - size).clamp_min(0))
        assert three_layer_objective(inside, y, beta) >= here


def test_levels_take_away_just_the_price():
    y = 2 * normal(40, seed=3)
    delta = find_shattered_optimum(y, 1.5)
    torch.testing.assert_close((y - delta).clamp_min(0).sum().item(), 1.5)
    torch.testing.assert_close((delta - y).clamp_min(0).sum().item(), 1.5)
    assert find_shattered_optimum(y, 1e6).abs().max() == 0
    assert torch.equal(
        find_shattered_optimum(y.abs(), 1e-3).clamp_max(0), torch.zeros(40, dtype=torch.float64)
    )


def test_staircase_adds_up_and_costs_the_two_extremes():
    delta = torch.tensor([0.0, 2.0, 2.0, -1.5, 0.25, -3.0, 0.0], dtype=torch.float64)
    patterns, heights = split_into_steps(delta)
    torch.testing.assert_close(patterns @ heights, delta)
    assert heights.abs().sum() == 5
    assert len(heights) == 4
    assert ((patterns == 0) | (patterns == 1)).all()
    assert split_into_steps(torch.zeros(3))[0].shape == (3, 0)


# the network


def test_patterns_are_what_their_neurons_answer_and_differ():
    x = normal(20, 3)
    patterns, weight, bias = draw_patterns(x, 500, torch.Generator().manual_seed(0))
    assert torch.equal(patterns, (x @ weight.T + bias >= 0).double())
    assert len({tuple(column.tolist()) for column in patterns.T}) == patterns.shape[1] < 500


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("outputs", [None, 3])
def test_network_has_the_objective_that_is_claimed(layers, outputs):
    x = normal(40, 6)
    y = normal(40, *([] if outputs is None else [outputs]), seed=1)
    fit = ThresholdNetwork(0.2, layers=layers, patterns=600).fit(x, y)
    assert sum(isinstance(part, Threshold) for part in fit.network) == layers - 1
    predicted = fit.predict(x)
    assert predicted.shape == y.shape
    price = 0.2 * fit.network[-1].weight.abs().sum().item()
    value = 0.5 * (y - predicted).square().sum().item() + price
    assert value == pytest.approx(fit.objective, rel=1e-9)
    again = ThresholdNetwork(0.2, layers=layers, patterns=600).fit(x, y)
    assert torch.equal(again.predict(x), predicted)


def test_three_layers_reach_the_closed_form_and_no_two_layers_are_better():
    x, y, beta = normal(30, 8), normal(30, seed=1), 0.5
    three = ThresholdNetwork(beta, layers=3, patterns=500).fit(x, y)
    torch.testing.assert_close(three.predict(x), find_shattered_optimum(y, beta))
    torch.testing.assert_close(
        three.objective, three_layer_objective(find_shattered_optimum(y, beta), y, beta).item()
    )
    two = ThresholdNetwork(beta, patterns=500).fit(x, y)
    assert three.objective <= two.objective


def test_no_training_by_straight_through_goes_below_the_optimum():
    x, y, beta = normal(25, 3), normal(25, seed=1).sign(), 0.5
    optimum = ThresholdNetwork(beta, patterns=20_000).fit(x, y)  # nearly all patterns of 25 points in 3d
    torch.manual_seed(0)
    for estimator in ESTIMATORS:
        model = nn.Sequential(
            nn.Linear(3, 50), Threshold(estimator=estimator), nn.Linear(50, 1, bias=False)
        ).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        lowest = float("inf")
        for _ in range(150):
            optimizer.zero_grad()
            loss = 0.5 * (model(x)[:, 0] - y).square().sum() + beta * model[2].weight.abs().sum()
            loss.backward()
            optimizer.step()
            lowest = min(lowest, loss.item())
        assert lowest >= optimum.objective


def test_a_high_price_gives_the_zero_network():
    x, y = normal(10, 2), normal(10, seed=1)
    for layers in (2, 3):
        fit = ThresholdNetwork(1e6, layers=layers, patterns=200).fit(x, y)
        assert not fit.predict(x).any()
        assert fit.objective == pytest.approx(0.5 * y.square().sum().item())


def test_network_is_an_ordinary_one(tmp_path):
    fit = ThresholdNetwork(0.1, patterns=100).fit(normal(20, 3), normal(20, seed=1))
    torch.save(fit.network.state_dict(), tmp_path / "network.pt")
    hidden = fit.network[0].out_features
    other = nn.Sequential(nn.Linear(3, hidden), Threshold(), nn.Linear(hidden, 1, bias=False)).double()
    other.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    x = normal(5, 3, seed=2)
    assert torch.equal(other(x)[:, 0], fit.predict(x))
    assert fit.predict(x.float()).dtype == torch.float32


def test_samples_that_cannot_be_told_apart_are_refused():
    x, y = normal(10, 2), normal(10, seed=1)
    with pytest.raises(PlywiseError, match="tell 10 samples apart"):
        ThresholdNetwork(0.1, layers=3, patterns=3).fit(x, y)
    with pytest.raises(PlywiseError, match="equal inputs with different targets"):
        ThresholdNetwork(0.1, layers=3).fit(x[[0, *range(9)]], y)


def test_wrong_data_and_order_are_refused():
    fit = ThresholdNetwork(patterns=10)
    with pytest.raises(PlywiseError, match="call fit"):
        fit.predict(X[:, None])
    for x, y in [(X, X), (X[:, None], X[:3]), (X[:, None], X[:, None, None]), (X[:0, None], X[:0])]:
        with pytest.raises(PlywiseError, match="needs inputs"):
            fit.fit(x, y)
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        fit.fit(X[:, None], X / 0)


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"beta": float("nan")}, {"layers": 1}, {"layers": 4}, {"patterns": 0}]
)
def test_bad_settings_of_the_network(settings):
    with pytest.raises(ValueError, match=f"ThresholdNetwork: {next(iter(settings))}"):
        ThresholdNetwork(**settings)


def test_worked_examples():
    assert doctest.testmod(module).failed == 0
