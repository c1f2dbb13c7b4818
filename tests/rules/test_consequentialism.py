"""Consequentialism weight updates against their definition (C1 to C17 of the method notes), in float64."""

import copy

import pytest
import torch
from algebra import move_of, relative
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

TINY = 1e-12


def cwu(eps: float | None = TINY, **settings: object) -> pw.Consequentialism:
    return pw.Consequentialism(eps, **{"reduction": "sum", **settings})


def without_bias(d: int, m: int) -> nn.Linear:
    return nn.Linear(d, m, bias=False)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def mlp() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4))
    return model, torch.randn(11, 7), torch.randint(4, (11,))


def gradients(model: nn.Module, x: Tensor, y: Tensor, rule: pw.Rule | None, reduction: str) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    if rule is not None:
        rule.attach(model)
    cross_entropy(model(x), y, reduction=reduction).backward()
    if rule is not None:
        rule.detach()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def test_c1_backpropagation_is_lms_on_virtual_targets():
    """What a rule sees as Δ is z - t, and LMS on t is backpropagation, in every layer."""
    model, x, y = mlp()
    plain = gradients(model, x, y, None, "sum")
    seen = {}
    rule = cwu(0.1).attach(model)
    with rule.observing(lambda ply, move, below: seen.update({ply.name: (ply.a, ply.delta)})):
        cross_entropy(model(x), y, reduction="sum").backward()
    rule.detach()
    for i, name in enumerate(("0", "2", "4")):
        a, z = seen[name][0], model[int(name)](seen[name][0])
        target = z - seen[name][1]
        assert relative((z - target).T @ a, plain[1 + 2 * i]) < 1e-12


@pytest.mark.parametrize("bias", ["append", "centre"])
def test_c2_c4_one_step_of_rate_one_lands_on_every_target(bias):
    """Also for one sample; no more samples than columns."""
    for n in (2, 5):
        x, delta = torch.randn(n, 8), torch.randn(n, 3)
        move = move_of(cwu(1e-9, bias=bias), nn.Linear(8, 3), x, delta)
        assert relative(with_ones(x) @ move.T, delta) < 1e-6
    for n in (1, 5):
        x, delta = torch.randn(n, 8), torch.randn(n, 3)
        assert relative(x @ move_of(cwu(), without_bias(8, 3), x, delta).T, delta) < 1e-10


def test_c3_posterior_error():
    """``(1 - η q/(q + ε))`` times the prior one; ε is relative to q."""
    x, target, layer = torch.randn(1, 6), torch.randn(1, 3), without_bias(6, 3)
    prior = (layer(x) - target).detach()
    move = move_of(cwu(0.25), layer, x, prior)
    for eta in (0.3, 1.0, 1.7):
        posterior = x @ (layer.weight - eta * move).T - target
        assert relative(posterior, (1 - eta / 1.25) * prior) < 1e-12


@pytest.mark.parametrize("n", [4, 20])
def test_c4c_append_is_damped_least_squares_on_ones(n):
    x, delta = torch.randn(n, 8) + 1, torch.randn(n, 3)
    A = with_ones(x)
    least = torch.linalg.lstsq(A, delta, driver="gelsd").solution.T
    assert relative(move_of(cwu(), nn.Linear(8, 3), x, delta), least) < 1e-8
    damping = 0.1 * A.square().sum() / min(A.shape)
    damped = torch.linalg.solve(A.T @ A + damping * torch.eye(9), A.T @ delta).T
    assert relative(move_of(cwu(None), nn.Linear(8, 3), x, delta), damped) < 1e-12


@pytest.mark.parametrize("n", [4, 20])
def test_centre_is_damped_least_squares_on_centred_rows(n):
    x, delta = torch.randn(n, 8) + 1, torch.randn(n, 3)
    A, D = x - x.mean(0), delta - delta.mean(0)
    damping = 1.0 * A.square().sum() / min(A.shape)
    weight = torch.linalg.solve(A.T @ A + damping * torch.eye(8), A.T @ D).T
    bias = delta.mean(0) - weight @ x.mean(0)
    expected = torch.cat([weight, bias[:, None]], 1)
    assert relative(move_of(cwu(None, bias="centre"), nn.Linear(8, 3), x, delta), expected) < 1e-11
    no_bias = torch.linalg.solve(x.T @ x + x.square().sum() / min(n, 8) * torch.eye(8), x.T @ delta).T
    assert relative(move_of(cwu(None, bias="centre"), without_bias(8, 3), x, delta), no_bias) < 1e-11


def test_c17c_both_treatments_of_the_bias_agree_without_damping():
    x, delta = torch.randn(20, 8) + 1, torch.randn(20, 3)
    append, centre = (move_of(cwu(bias=b), nn.Linear(8, 3), x, delta) for b in ("append", "centre"))
    assert relative(append, centre) < 1e-8


def test_c5_minimal_disturbance():
    x, delta = torch.randn(4, 9), torch.randn(4, 3)
    unseen = torch.linalg.qr(x.T, mode="complete").Q[:, 4:]  # directions that no sample of the batch has
    assert (move_of(cwu(0.1), without_bias(9, 3), x, delta) @ unseen).norm() < 1e-12


@pytest.mark.parametrize("n", [4, 20])
def test_c6_c7_emended_errors_through_plain_backpropagation(n):
    """``(AAᵀ + εI) Δ̃ = Δ``; the consequence of the move is the intention, where the plain one's is AAᵀΔ."""
    x, delta, layer = torch.randn(n, 8), torch.randn(n, 3), without_bias(8, 3)
    damping = 0.1 * x.square().sum() / min(n, 8)
    emended = torch.linalg.solve(x @ x.T + damping * torch.eye(n), delta)
    assert relative(move_of(cwu(0.1), layer, x, delta), move_of(pw.Backprop(), layer, x, emended)) < 1e-11
    if n < 8:
        assert relative(x @ move_of(cwu(), layer, x, delta).T, delta) < 1e-10
        assert relative(x @ move_of(pw.Backprop(), layer, x, delta).T, x @ x.T @ delta) < 1e-12


def test_c8_orthogonal_samples_do_not_interfere():
    x = torch.linalg.qr(torch.randn(8, 4)).Q.T * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    delta, layer = torch.randn(4, 3), without_bias(8, 3)
    alone = sum(move_of(cwu(), layer, x[i : i + 1], delta[i : i + 1]) for i in range(4))
    assert relative(move_of(cwu(), layer, x, delta), alone) < 1e-10


def test_c9_rescaled_inputs():
    x, delta, layer = torch.randn(4, 8), torch.randn(4, 3), without_bias(8, 3)
    assert relative(move_of(cwu(0.1), layer, 5 * x, delta), move_of(cwu(0.1), layer, x, delta) / 5) < 1e-12
    M = torch.randn(8, 8)
    before, after = (v @ move_of(cwu(1e-13), layer, v, delta).T for v in (x, x @ M))
    assert relative(after, before) < 1e-8


@pytest.mark.parametrize("bias", ["centre", "none"])
def test_c9c_c17_rescaled_networks(bias):
    """CWU is not equivariant: a step changes by ``∏_{k>l} c_k / ∏_{k<l} c_k``."""
    factors = [3.0, 0.1, 10 / 3]
    sizes = [(7, 9), (9, 6), (6, 4)]
    layers = [nn.Linear(a, b, bias=bias != "none") for a, b in sizes]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    x, y = torch.randn(11, 7), torch.randint(4, (11,))
    rule = cwu(0.1, bias="centre")
    _, *before = gradients(model, x, y, rule, "sum")
    product = 1.0
    with torch.no_grad():
        for layer, factor in zip(layers, factors, strict=True):
            product *= factor
            layer.weight.mul_(factor)
            if layer.bias is not None:
                layer.bias.mul_(product)
    _, *after = gradients(model, x, y, rule, "sum")
    per_layer = 1 if bias == "none" else 2
    for i in range(3):
        above = torch.tensor(factors[i + 1 :]).prod()
        below = torch.tensor(factors[:i]).prod()
        assert relative(after[per_layer * i], before[per_layer * i] * above / below) < 1e-10
        if bias != "none":  # its input, 1, is not rescaled
            assert relative(after[2 * i + 1], before[2 * i + 1] * above) < 1e-10


def test_c10_more_samples_than_inputs():
    """The realised change is the projection of the intention, and noise-free errors contract by η(2-η)."""
    x, layer = torch.randn(20, 6), without_bias(6, 3)
    projector = x @ torch.linalg.pinv(x)
    delta = torch.randn(20, 3)
    assert relative(x @ move_of(cwu(), layer, x, delta).T, projector @ delta) < 1e-10
    for n in (20, 4):
        best, rows = torch.randn(3, 6), x[:n]
        wrong = layer.weight.detach() - best
        move = move_of(cwu(), layer, rows, rows @ wrong.T)
        onto = torch.linalg.pinv(rows) @ rows
        for eta in (0.3, 1.0, 1.8):
            left = (wrong - eta * move).square().sum()
            assert left == pytest.approx(
                (wrong.square().sum() - eta * (2 - eta) * (wrong @ onto).square().sum()).item(), rel=1e-10
            )


@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2, "padding": 2}]
)
@pytest.mark.parametrize("n", [6, 1])
def test_c11_convolution_is_a_ridge_regression(geometry, n):
    """No patches here: the gradient of the ridge objective is zero at the move, by autograd."""
    conv = nn.Conv2d(4, 6, 3, **geometry)
    x = torch.randn(n, 4, 6, 5)
    delta = torch.randn_like(conv(x))
    move = move_of(cwu(0.1), conv, x, delta)
    weight, bias = move[:, :-1].reshape(conv.weight.shape), move[:, -1]
    ply = {}
    rule = cwu(0.1).attach(conv)
    with rule.observing(lambda p, *_: ply.update(rows=p.rows(p.dtype))):
        (conv(x) * delta).sum().backward()
    rule.detach()
    damping = 0.1 * ply["rows"].square().sum((1, 2)) / min(ply["rows"].shape[1:])
    damping = damping.repeat_interleave(6 // conv.groups)
    parts = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    misfit = (
        0.5
        * (conv2d(x, *parts, conv.stride, conv.padding, conv.dilation, conv.groups) - delta).square().sum()
    )
    penalty = 0.5 * (damping @ (parts[0].flatten(1).square().sum(1) + parts[1].square()))
    slope = torch.autograd.grad(misfit + penalty, parts)
    assert sum(s.norm() for s in slope) < 1e-11 * damping.max() * move.norm()


@pytest.mark.parametrize("bias", ["append", "centre"])
def test_c11b_pointwise_convolution_is_a_linear_layer(bias):
    x, delta = torch.randn(9, 5), torch.randn(9, 3)
    conv, linear = nn.Conv2d(5, 3, 1), nn.Linear(5, 3)
    rule = cwu(0.2, bias=bias)
    as_image = move_of(rule, conv, x[:, :, None, None], delta[:, :, None, None])
    assert relative(as_image, move_of(rule, linear, x, delta)) < 1e-12
    as_positions = move_of(rule, nn.Conv1d(5, 3, 1), x.T[None], delta.T[None])
    assert relative(as_positions, move_of(rule, linear, x, delta)) < 1e-12


def test_c12_composes_with_optimizers():
    layer, x, y = nn.Linear(6, 3), torch.randn(9, 6), torch.randint(3, (9,))
    move, start = gradients(layer, x, y, cwu(0.1), "sum")[1], copy.deepcopy(layer.state_dict())
    for make, step in [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 0.1 * move),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 0.1 * 1.9 * move),
        (lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-30), 0.1 * move.sign()),
    ]:
        layer.load_state_dict(start)
        optimizer = make(layer.parameters())
        rule = cwu(0.1).attach(layer, optimizer)
        optimizer.zero_grad()
        cross_entropy(layer(x), y, reduction="sum").backward()
        optimizer.step()
        rule.detach()
        assert relative(start["weight"] - layer.weight.detach(), step) < 1e-10


@pytest.mark.parametrize("bias", ["append", "centre"])
@pytest.mark.parametrize("n", [11, 4])
def test_c13_averaging_does_not_matter(bias, n):
    """A mean loss with reduction="mean" moves as a sum loss with reduction="sum"; also for convolutions."""
    net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 4))
    for model, x in [(mlp()[0], torch.randn(n, 7)), (net, torch.randn(n, 2, 5))]:
        y = torch.randint(4, (n,))
        _, *by_mean = gradients(model, x, y, pw.Consequentialism(bias=bias), "mean")
        _, *by_sum = gradients(model, x, y, cwu(None, bias=bias), "sum")
        for one, other in zip(by_mean, by_sum, strict=True):
            assert relative(one, other) < 1e-12


@pytest.mark.parametrize("n", [11, 4])
def test_c14_heavy_damping_is_backpropagation(n):
    x, delta, layer = torch.randn(n, 6), torch.randn(n, 3), nn.Linear(6, 3)
    A = with_ones(x)
    damping = 1e9 * A.square().sum() / min(A.shape)
    assert relative(damping * move_of(cwu(1e9), layer, x, delta), delta.T @ A) < 1e-6


def test_deltas_are_backpropagations():
    model, x, y = mlp()
    below = gradients(model, x, y, pw.Consequentialism(), "mean")[0]
    assert torch.equal(below, gradients(model, x, y, None, "mean")[0])
