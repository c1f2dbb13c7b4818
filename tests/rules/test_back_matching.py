"""Back-matching's update of a layer against its definition (B1 to B13 of the method notes), in float64."""

import math
from itertools import pairwise

import pytest
import torch
from algebra import relative
from backward_scales import find_scales, find_trace
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.functional import cross_entropy

import plywise as pw
from plywise.engine.call import LinearCall

pytestmark = pytest.mark.usefixtures("double")

SCALARS = ["mean", "rank", "cauchy"]
TINY = 1e-13


def rate(scalar: str = "mean", **settings: object) -> pw.BackMatching:
    return pw.BackMatching(scalar=scalar, **{"cap": None, **settings})


def exact(eps: float = TINY, **settings: object) -> pw.BackMatching:
    return pw.BackMatching("exact", **{"eps": eps, "cap": None, **settings})


def backward(model: nn.Module, x: Tensor, y: Tensor, rule: pw.Rule | None = None) -> dict[str, Tensor]:
    """All that the backward of a mean (or, if the rule says so, sum) loss leaves."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    reduction = getattr(rule, "reduction", "mean")
    if rule is not None:
        rule.attach(model)
    if y.is_floating_point():
        loss = 0.5 * (model(x) - y).square().sum() / (len(x) if reduction == "mean" else 1)
    else:
        loss = cross_entropy(model(x), y, reduction=reduction)
    loss.backward()
    if rule is not None:
        rule.detach()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"input": x.grad}


def collect_calls(model: nn.Module, x: Tensor, rule: pw.Rule) -> dict[str, LinearCall]:
    calls = {}
    rule.attach(model)
    with rule.observing(lambda call, update, below: calls.update({call.name: call})):
        model(x).square().sum().backward()
    rule.detach()
    return calls


def mlp() -> tuple[nn.Sequential, Tensor, Tensor]:
    widths = [6, 9, 8, 9, 4]
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(13, 6), torch.randint(4, (13,))


# ---- exact least squares ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [20, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_b1_one_exact_step_of_rate_one_solves_the_layer(n, bias, reduction):
    layer, x, y = nn.Linear(6, 3, bias=bias), torch.randn(n, 6) + 1, torch.randn(n, 3)
    # fewer rows than columns, centred: the Gram has a null vector, so the damping must outweigh rounding
    eps, tolerance = (1e-8, 1e-5) if bias and n < 6 else (TINY, 1e-10)
    update = backward(layer, x, y, exact(eps, reduction=reduction))
    A = torch.cat([x, torch.ones(n, 1)], 1) if bias else x
    fitted = x @ (layer.weight - update["weight"]).T + (layer.bias - update["bias"] if bias else 0)
    assert relative(fitted, A @ torch.linalg.lstsq(A, y, driver="gelsd").solution) < tolerance
    if not bias:  # B1b: from autograd's mean gradient; among many solutions the smallest change
        plain = backward(layer, x, y)["weight"]
        assert relative(update["weight"], plain @ torch.linalg.pinv(x.T @ x / n)) < 1e-9


def test_b2_b11_every_layer_alone_realises_the_target():
    """Linear net with narrowing layers, B ≤ n: matched values reach down without loss."""
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in [(9, 8), (8, 7), (7, 6), (6, 3)]])
    x, y = torch.randn(5, 9), torch.randn(5, 3)
    updates, before = backward(model, x, y, exact()), model(x).detach()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.sub_(updates[name])
            assert relative(model(x), y) < 1e-8
            parameter.add_(updates[name])
    with torch.no_grad():  # all four together: four times the target, to first order
        step = 1e-7
        for name, parameter in model.named_parameters():
            parameter.sub_(step * updates[name])
        assert relative((model(x) - before) / step, 4 * (y - before)) < 1e-4


def test_b3_backpropagation_is_a_gradient_step_on_the_back_matching_loss():
    layer, x, T = nn.Linear(5, 4), torch.randn(7, 5).requires_grad_(), torch.randn(7, 4)
    pw.Backprop().attach(layer)
    (layer(x) * -T).sum().backward()  # Δ = -T
    W, z = layer.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    wanted = (z @ W.T + layer.bias).detach() + T
    slopes = torch.autograd.grad(0.5 * (z @ W.T + layer.bias.detach() - wanted).square().sum(), [W, z])
    assert relative(layer.weight.grad, slopes[0]) < 1e-13
    assert relative(x.grad, slopes[1]) < 1e-13


@pytest.mark.parametrize("track", [True, False])
def test_b8_batch_norm_exactly(track):
    """The pseudo-inverse is sent down, (σ/γ)² of backpropagation's value; γ and β move by least squares."""
    norm, top = nn.BatchNorm1d(3, eps=1e-20, track_running_stats=track), nn.Linear(3, 5)
    norm.weight.data, norm.bias.data = torch.tensor([0.5, -2.0, 3.0]), torch.randn(3)
    model, x, y = nn.Sequential(norm, top), 3 * torch.randn(8, 3) + 1, torch.randn(8, 5)
    got = backward(model, x, y, exact())
    T = (model(x) - y).detach() / 8 @ torch.linalg.pinv(top.weight.detach()).T
    J = jacrev(lambda v: nn.functional.batch_norm(v, None, None, norm.weight, norm.bias, True, eps=1e-20))(x)
    pinv = torch.linalg.pinv(J.detach().reshape(24, 24), rtol=1e-9)
    assert relative(got["input"].flatten(), pinv @ T.flatten()) < 1e-8
    x_hat = (x - x.mean(0)) / x.std(0, correction=0)
    assert relative(got["0.weight"], (x_hat * 8 * T).mean(0)) < 1e-9
    assert relative(got["0.bias"], (8 * T).mean(0)) < 1e-9


def test_b9_pooling_relu_and_dropout_exactly():
    """Below the top, each value is the pseudo-inverse's: compare with a dense one of the same forward."""
    x = torch.randn(3, 2, 6)
    for part in (nn.AvgPool1d(3), nn.AdaptiveAvgPool1d(2), nn.MaxPool1d(2), nn.ReLU(), nn.Dropout(0.4)):
        top = nn.Linear(part(x).shape[-1], 4)
        model = nn.Sequential(part, top)
        torch.manual_seed(5)
        y = torch.randn(3, 2, 4)
        torch.manual_seed(6)
        got = backward(model, x, y, exact())["input"]
        torch.manual_seed(6)
        hidden = part(x)
        T = (top(hidden) - y).detach() / 3 @ torch.linalg.pinv(top.weight.detach()).T
        torch.manual_seed(6)
        point = x.clone().requires_grad_()
        out = part(point).flatten()
        J = torch.stack([torch.autograd.grad(o, point, retain_graph=True)[0].flatten() for o in out])
        expected = torch.linalg.pinv(J) @ T.flatten()
        assert relative(got.flatten(), expected) < 1e-8, part


# ---- rates: scalars instead of Gram matrices ---------------------------------------------------------------


def test_b4_scalars_are_exact_for_orthogonal_factors():
    layer, X, y = nn.Linear(6, 8, bias=False), 2 * torch.linalg.qr(torch.randn(12, 6)).Q, torch.randn(12, 8)
    matched = backward(layer, X, y, exact())["weight"]
    for scalar in SCALARS:
        assert relative(backward(layer, X, y, rate(scalar))["weight"], matched) < 1e-10


def test_b4_the_backward_value_is_exact_for_an_orthogonal_layer_above():
    """``Δ/E`` is the matched value: ``E`` of an orthogonal W on narrower inputs is its one eigenvalue."""
    above = 3 * torch.linalg.qr(torch.randn(8, 5)).Q
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 8, bias=False))
    model[1].weight.data = above
    rule = rate()
    calls = collect_calls(model, torch.randn(2000, 6), rule)
    T = calls["1"].delta @ torch.linalg.pinv(above).T
    assert relative(rule.backward_value(calls["0"]), T) < 0.05
    assert relative(rule.backward_value(calls["0"]) * calls["0"].energy / 9, T) < 1e-12


def test_b4_one_sample():
    """B4e, B4f: by rank it is NLMS; by the mean eigenvalue n times as long."""
    layer, x, y = nn.Linear(6, 3, bias=False), torch.randn(1, 6), torch.randn(1, 3)
    nlms = (layer(x) - y).T @ x / x.square().sum()
    assert relative(backward(layer, x, y, rate("rank"))["weight"], nlms) < 1e-12
    assert relative(backward(layer, x, y, rate("mean"))["weight"], 6 * nlms) < 1e-12
    assert relative(backward(layer, x, y, rate("cauchy"))["weight"], nlms) < 1e-12


@pytest.mark.parametrize("scalar", ["mean", "cauchy"])
def test_b4g_repeating_the_batch_changes_nothing(scalar):
    layer, x, y = nn.Linear(6, 3), torch.randn(13, 6), torch.randint(3, (13,))
    once, thrice = (backward(layer, x.repeat(k, 1), y.repeat(k), rate(scalar)) for k in (1, 3))
    for name in ("weight", "bias"):
        assert relative(thrice[name], once[name]) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scalar", SCALARS)
def test_b5_recursion(scalar, reduction):
    """The updates are plain gradients over ``m_W`` and ``E`` (eq. 7), with ``E`` as measured."""
    model, x, y = mlp()
    got = backward(model, x, y, rate(scalar, reduction=reduction))
    E = {
        name: call.energy for name, call in collect_calls(model, x, rate()).items()
    }  # the same random vector
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    inputs = [x]
    for layer in linear[:-1]:
        inputs.append(torch.relu(layer(inputs[-1])).detach())
    B = len(x)
    T = (linear[-1](inputs[-1]).softmax(1) - nn.functional.one_hot(y, 4)).detach()
    for i in reversed(range(len(linear))):
        X, W = inputs[i], linear[i].weight.detach()
        G = T.T @ X
        m_W = {
            "mean": X.square().sum() / (B * X.shape[1]),
            "rank": X.square().sum() / (B * min(X.shape)),
            "cauchy": (X @ G.T).square().sum() / (B * G.square().sum()),
        }[scalar]
        assert relative(got[f"{2 * i}.weight"], G / B / m_W / E[f"{2 * i}"]) < 1e-12
        assert relative(got[f"{2 * i}.bias"], T.mean(0) / E[f"{2 * i}"]) < 1e-12
        T = (inputs[i] > 0) * (T @ W)


def test_b5_product_of_scalars():
    """The scalars of the layers above, ``‖W‖²_F/d`` each, multiply to ``E`` where nothing is between them.

    One hop is exact but for the one random vector; over several, the product is that of wide random layers.
    """
    widths = [6, 40, 60, 50, 30]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])
    scales, product = find_scales(model, torch.randn(1000, 6)), 1.0
    for i in reversed(range(4)):
        assert scales[f"{i}"][0] == pytest.approx(product, rel=0.03 if i > 1 else 0.15)
        product *= find_trace(model[i])


def test_b7_linear_in_the_loss():
    model, x, _ = mlp()
    for rule in (*map(rate, SCALARS), exact(0.1)):
        rule.attach(model)
        updates = []
        for factor in (1, 5):
            model.zero_grad()
            (factor * model(x).square().sum()).backward()
            updates.append([p.grad.clone() for p in model.parameters()])
        rule.detach()
        assert all(relative(five, 5 * one) < 1e-12 for one, five in zip(*updates, strict=True))


def test_b13_cauchy_is_a_line_search():
    layer, x, y = nn.Linear(6, 3, bias=False), torch.randn(9, 6), torch.randn(9, 3)
    T = (y - layer(x)).detach()
    left = T + x @ backward(layer, x, y, rate("cauchy"))["weight"].T
    along = x @ (T.T @ x).T
    assert (left * along).sum().abs() < 1e-10 * T.norm() * along.norm()
    assert left.norm() < T.norm()


def test_cap():
    """‖D‖ ≤ cap ‖W‖, the bias made smaller alike; on accumulated gradients if the optimizer is known."""
    model, x, y = mlp()
    free, capped = backward(model, x, y, rate()), backward(model, x, y, rate(cap=0.01))
    for i in (0, 2, 4, 6):
        size, limit = free[f"{i}.weight"].norm(), 0.01 * model[i].weight.norm()
        shrink = min(1.0, (limit / size).item())
        assert shrink < 1
        assert relative(capped[f"{i}.weight"], shrink * free[f"{i}.weight"]) < 1e-12
        assert relative(capped[f"{i}.bias"], shrink * free[f"{i}.bias"]) < 1e-12
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), model[0].weight.detach().clone()
    rule = rate(cap=0.01).attach(model, optimizer)
    model.zero_grad()
    for _ in range(2):
        cross_entropy(model(x), y).backward()
    assert relative(model[0].weight.grad, 2 * free["0.weight"]) < 1e-12
    optimizer.step()
    rule.detach()
    assert (model[0].weight - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-12)


def test_dead_layers_make_no_zero_division():
    model, x, y = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(-1.0)
    for scalar in SCALARS:
        updates = backward(model, x, y, rate(scalar))
        assert all(torch.isfinite(update).all() for update in updates.values())
        for name in ("0.weight", "2.weight", "4.weight"):
            assert updates[name].norm() == 0
        assert updates["6.bias"].norm() > 0


def test_samples_not_rows():
    """Sequences: the loss is a mean over samples, whose positions add up, as in a convolution."""
    layer, x, y = nn.Linear(4, 3), torch.randn(5, 7, 4), torch.randn(5, 7, 3)
    sequence = backward(layer, x, y, rate())
    pointwise = nn.Conv1d(4, 3, 1)
    pointwise.weight.data, pointwise.bias.data = layer.weight.data[:, :, None], layer.bias.data
    conv = backward(pointwise, x.mT, y.mT, rate())
    assert relative(conv["weight"][:, :, 0], sequence["weight"]) < 1e-12
    assert relative(conv["bias"], sequence["bias"]) < 1e-12
    assert math.isclose(sequence["bias"][0], (layer(x) - y).mean((0, 1))[0].item(), rel_tol=1e-9)


@pytest.mark.parametrize("padding", [None, 2])
def test_a_line_search_on_an_embedding_is_that_on_its_one_hot_rows(padding: int | None) -> None:
    table = nn.Embedding(5, 3, padding_idx=padding)
    indices, target = torch.tensor([[0, 2, 2], [4, 1, 0]]), torch.randn(2, 3, 3)
    rule = pw.BackMatching(scalar="cauchy", cap=None).attach(table, kinds="all")
    (table(indices) - target).square().mean().backward()
    layer = nn.Linear(5, 3, bias=False)
    layer.weight.data.copy_(table.weight.data.t())
    one_hot = nn.functional.one_hot(indices, 5).to(target)
    if padding is not None:
        one_hot[..., padding] = 0
    pw.BackMatching(scalar="cauchy", cap=None).attach(layer)
    delta = (table(indices).detach() - target) * 2 / target.numel()
    layer(one_hot).backward(delta)
    assert rule.explain().share == 1
    assert relative(table.weight.grad.t(), layer.weight.grad) < 1e-9
