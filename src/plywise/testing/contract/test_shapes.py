"""Dtypes, memory formats, batch shapes and ways to call a layer."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise import LinearCall, Rule, Update
from plywise.engine.health import Health
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    MODELS,
    Net,
    are_finite,
    assert_close,
    compute_gradients,
    compute_loss,
    copy_gradients,
    copy_weights,
    count_fallbacks,
    have_same_bits,
    make_batch,
    make_convnet,
    make_mlp,
    train,
)

KIND = pytest.mark.parametrize("kind", list(MODELS))


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(case: Case, rule: Rule, kind: str, dtype: torch.dtype) -> None:
    build, shape = MODELS[kind]
    model, data = build(dtype), make_batch(shape, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(rule, model, optimizer, warm=shape)
    found = compute_gradients(model, data)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert found[name].dtype == dtype, name
        assert found[name].shape == p.shape, name
    assert are_finite(found)
    if case.is_backprop:
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
        assert_close(found, compute_gradients(build(dtype), data), tolerance)
    train(model, optimizer, data, 2)
    assert are_finite(copy_weights(model))
    assert count_fallbacks(rule) == 0


@KIND
def test_low_precision_moves_resemble_full_ones(case: Case, rule: Rule, kind: str) -> None:
    # statistics and solves are float32 at least: half precision loses digits, never the direction
    build, shape = MODELS[kind]
    full, half = build(torch.float64), build(torch.bfloat16)
    full.load_state_dict(half.state_dict())
    x, y = make_batch(shape, dtype=torch.bfloat16)
    other = case.make()
    attach(other, full, torch.optim.SGD(full.parameters(), lr=0.1), warm=shape)
    attach(rule, half, torch.optim.SGD(half.parameters(), lr=0.1), warm=shape)
    expected, found = compute_gradients(full, (x.double(), y)), compute_gradients(half, (x, y))
    other.detach()
    for name, g in found.items():
        if name.endswith("weight"):
            alike = F.cosine_similarity(g.double().flatten(), expected[name].flatten(), dim=0)
            assert alike > 0.9, (name, alike)


@KIND
def test_autocast(case: Case, rule: Rule, kind: str) -> None:
    build, shape = MODELS[kind]
    data = make_batch(shape)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_loss(model, data)
        loss.backward()
        return copy_gradients(model)

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(rule, model, optimizer, warm=shape)
    found = gradients(model)
    assert all(g.dtype == torch.float32 for g in found.values())
    assert are_finite(found)
    if case.is_backprop:
        assert_close(found, gradients(build()), 0.02)
    optimizer.step()
    assert are_finite(copy_weights(model))


@KIND
def test_non_contiguous_inputs(case: Case, rule: Rule, kind: str) -> None:
    build, shape = MODELS[kind]
    x, y = make_batch(shape, dtype=torch.float64)
    model = build(torch.float64)
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=shape)
    expected = compute_gradients(model, (x, y))
    strided = torch.empty(*x.shape, 2, dtype=x.dtype)[..., 1].copy_(x)
    turned = x.mT.contiguous().mT if x.dim() > 2 else x.T.contiguous().T
    spread = x.new_empty(x.shape[0] * 3, *shape)[::3].copy_(x)
    for other in (strided, turned, spread):
        assert not other.is_contiguous()
        assert_close(compute_gradients(model, (other, y)), expected, 1e-10)
    shared = x[:1].expand_as(x)  # one row in memory for all
    assert_close(compute_gradients(model, (shared, y)), compute_gradients(model, (shared.clone(), y)), 1e-10)


def test_channels_last(case: Case, rule: Rule) -> None:
    data = make_batch((2, 6, 6), dtype=torch.float64)
    plain, model = (
        make_convnet(torch.float64),
        make_convnet(torch.float64).to(memory_format=torch.channels_last),
    )
    shape = (2, 6, 6)
    attach(case.make(), plain, torch.optim.SGD(plain.parameters(), lr=0.1), warm=shape)
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=shape)
    turned = (data[0].contiguous(memory_format=torch.channels_last), data[1])
    assert_close(compute_gradients(model, turned), compute_gradients(plain, data), 1e-10)
    assert model[0](turned[0]).is_contiguous(memory_format=torch.channels_last)


def test_leading_dimensions_are_rows(case: Case, rule: Rule) -> None:
    model = make_mlp(torch.float64)
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    x, y = make_batch(n=12, dtype=torch.float64)
    results = []
    for shape in ((12,), (12, 1), (1, 12), (3, 4), (2, 3, 2)):
        model.zero_grad()
        out = model(x.reshape(*shape, 6))
        assert out.shape == (*shape, 3)
        F.cross_entropy(out.flatten(0, -2), y).backward()
        results.append(copy_gradients(model))
    assert_close(results[1], results[0], 1e-10)
    for found in results[2:]:
        assert are_finite(found)
        for name, g in found.items():  # same rows; what counts as a sample may scale a layer's move
            assert F.cosine_similarity(g.flatten(), results[0][name].flatten(), dim=0) > 1 - 1e-9, name


def test_one_sample_without_a_batch(case: Case, rule: Rule) -> None:
    model = make_mlp(torch.float64)
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    x, y = make_batch(n=1, dtype=torch.float64)
    alone = compute_gradients(model, (x, y))
    assert_close(compute_gradients(model, (x[0], y[0])), alone, 1e-10)
    assert are_finite(alone)
    for dims, layer in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        rule.detach()
        conv = nn.Sequential(layer(2, 3, 2), nn.ReLU(inplace=True)).double()
        x = torch.randn(2, *[4] * dims, dtype=torch.float64)
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        attach(rule, conv, optimizer, warm=lambda conv=conv, x=x: conv(x[None]).square().sum())
        conv(x[None]).square().sum().backward()
        expected = copy_gradients(conv)
        conv.zero_grad()
        conv(x).square().sum().backward()
        assert_close(copy_gradients(conv), expected, 1e-10)


@KIND
def test_batch_sizes(case: Case, rule: Rule, kind: str) -> None:
    build, shape = MODELS[kind]
    model = build().eval()  # batch norm in training refuses some batches, with or without us
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(rule, model, optimizer, warm=shape)
    for n in (1, 12, 1, 3, 40):
        found = compute_gradients(model, make_batch(shape, n))
        assert are_finite(found), n
        assert any(g.any() for g in found.values())
        optimizer.step()
    assert are_finite(copy_weights(model))


@KIND
def test_empty_batch(rule: Rule, kind: str) -> None:
    build, shape = MODELS[kind]
    model = build().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(rule, model, optimizer, warm=shape)
    x = torch.zeros(0, *shape, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape
    assert len(copy_gradients(model)) == len(list(model.parameters()))
    assert not any(g.any() for g in copy_gradients(model).values())
    before = copy_weights(model)
    optimizer.step()
    assert have_same_bits(copy_weights(model), before)


def test_called_by_keyword(case: Case, rule: Rule) -> None:
    def call_by_keyword(net: nn.Module, x: Tensor) -> Tensor:
        for module in net.inner:
            x = module(input=x)
        return x

    data, results = make_batch((2, 6, 6), dtype=torch.float64), []
    for call in (lambda net, x: net.inner(x), call_by_keyword):
        model = Net(call, inner=make_convnet(torch.float64))
        attach(case.make(), model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(2, 6, 6))
        results.append(compute_gradients(model, data))
    assert have_same_bits(*results)


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, F.relu_),
    "add": (lambda h: h + 1, lambda h: h.add_(1)),
    "multiply": (lambda h: h * h.detach().sign(), lambda h: h.mul_(h.detach().sign())),
    "view": (lambda h: torch.cat([h[:, :1] * 2, h[:, 1:]], 1), lambda h: (h[:, :1].mul_(2), h)[1]),
    "fill": (lambda h: h * 0.0, lambda h: h.zero_()),
}


@pytest.mark.one_of_family
@pytest.mark.parametrize("what", list(IN_PLACE))
@pytest.mark.parametrize("kind", ["linear", "linear 3d", "conv", "conv unbatched"])
def test_in_place_after_a_layer(case: Case, what: str, kind: str) -> None:
    shape = {"linear": (5, 4), "linear 3d": (2, 5, 4), "conv": (3, 2, 5), "conv unbatched": (2, 5)}[kind]
    results = []
    for function in IN_PLACE[what]:
        torch.manual_seed(1)
        layer = (nn.Linear(4, 4) if "linear" in kind else nn.Conv1d(2, 4, 3)).double()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        start, optimizer = x.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.1)
        attach(case.make(), layer, optimizer, warm=lambda layer=layer, x=start: layer(x).sin().sum())
        function(layer(x)).sin().sum().backward()
        results.append({**copy_gradients(layer), "input": x.grad})
    assert_close(results[1], results[0])


@KIND
def test_the_rule_sees_the_layers_own_problem(case: Case, rule: Rule, kind: str) -> None:
    # A and Δ taken by plain torch hooks, the move computed by hand: what backward left in .grad
    build, shape = MODELS[kind]
    model = build(torch.float64)
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=shape)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    plies: dict[str, LinearCall] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            kept = args[0].detach().clone()
            output.register_hook(lambda delta: seen.__setitem__(name, (kept, delta.clone())))

        return hook

    handled = [row.name for row in rule.explain().rows if row.handled]
    for name in handled:
        model.get_submodule(name).register_forward_hook(watch(name))

    def observe(ply: LinearCall, move: Update, below: Tensor | None) -> None:
        plies[ply.name] = ply

    with rule.observing(observe):
        found = compute_gradients(model, make_batch(shape, dtype=torch.float64))
    assert set(plies) == set(seen) == set(handled)
    for name in handled:
        module, (a, delta) = model.get_submodule(name), seen[name]
        bias = module.bias is not None
        weight = module.weight.detach()
        if isinstance(module, nn.BatchNorm2d):  # its linear map reads the normalised input
            a, weight = nn.functional.batch_norm(a, None, None, training=True), weight.reshape(-1, 1)
        ply = replace(plies[name], a=a, delta=delta, weight=weight, has_bias=bias, health=Health())
        move = rule.update(ply)
        assert_close({"w": found[f"{name}.weight"]}, {"w": move.weight.reshape(module.weight.shape)})
        if bias:
            assert move.bias is not None, (
                f"the update of {name!r} has no bias, and the layer has one that trains"
            )
            assert_close({"b": found[f"{name}.bias"]}, {"b": move.bias})
