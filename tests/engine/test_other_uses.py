"""Uses of a weight that look like a layer's and are none, and backward passes that no step follows."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from written_forwards import Forward, Net, draw

import plywise as pw

RULES: dict[str, Callable[[], pw.Rule]] = {
    "Backprop": pw.Backprop,
    "ProxProp": pw.ProxProp,
    "NLMS": pw.NLMS,
    "Foof": lambda: pw.Foof(stats_every=1, refresh_every=1),
    "exact back-matching": lambda: pw.BackMatching(mode="exact"),
}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of the parameters and of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return [*(p.grad for p in model.parameters()), x.grad]


def generate(s: Net, x: Tensor) -> Tensor:
    """A hypernetwork: the weight of a layer is an activation of another one."""
    weight = s.made_by(x[0]).view(5, 6)
    return torch.func.functional_call(s.layer, {"weight": weight, "bias": s.bias}, (x,))


PLAIN: dict[str, tuple[Forward, dict[str, Any], tuple[int, ...]]] = {
    "an axis of size 1 that einsum repeats": (
        lambda s, x: torch.einsum("bi,io->bo", x, s.w),
        {"w": (1, 5)},
        (7, 4),
    ),
    "an input of size 1 that einsum repeats": (
        lambda s, x: torch.einsum("bi,io->bo", x, s.w),
        {"w": (4, 5)},
        (7, 1),
    ),
    "three operands": (
        lambda s, x: torch.einsum("bi,io,o->bo", x, s.w, s.v),
        {"w": (6, 5), "v": (5,)},
        (7, 6),
    ),
    "a sum over rows": (lambda s, x: torch.einsum("bti,io->bo", x, s.w), {"w": (6, 5)}, (7, 3, 6)),
    "by keyword": (
        lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.w, alpha=0.5),
        {"w": (6, 5), "b": (5,)},
        (7, 6),
    ),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, dims=1), {"w": (6, 5)}, (7, 2, 6)),
    "no rows at all": (
        lambda s, x: F.linear(x, s.w[:0]).sum() + F.linear(x, s.w).sin(),
        {"w": (5, 6)},
        (7, 6),
    ),
}


@pytest.mark.parametrize("use", PLAIN)
def test_what_is_no_linear_map_is_left_to_autograd_with_a_reason(use: str) -> None:
    run, parts, shape = PLAIN[use]
    model, x = Net(run, head=nn.Linear(5, 3), **parts), draw(*shape)
    model.run = lambda s, x: s.head(run(s, x))
    plain = copy.deepcopy(model)
    rule = pw.ProxProp().attach(model, sgd(model), kinds="all")
    ours, theirs = gradients(model, x), gradients(plain, x)
    assert torch.equal(ours[-1], theirs[-1])
    for row in rule.explain().rows:
        if not row.handled:
            assert "is used by" in row.reason or "adds it to the output of a weight that" in row.reason
    left = {key for row in rule.explain().rows if not row.handled for key in row.keys}
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=False):
        assert name not in left or torch.equal(one, other), name


EMPTY: dict[str, Callable[[], nn.Module]] = {
    "no outputs": lambda: Net(lambda s, x: s.l(x).sum() + s.k(x), l=nn.Linear(6, 0), k=nn.Linear(6, 2)),
    "no inputs": lambda: Net(lambda s, x: s.l(x[:, :0]) + s.k(x), l=nn.Linear(0, 2), k=nn.Linear(6, 2)),
    "an adaptive softmax whose last projection is empty": lambda: Net(
        lambda s, x: s.l(x, torch.tensor([0, 5, 9, 3, 2])).output,
        l=nn.AdaptiveLogSoftmaxWithLoss(6, 10, [3, 6]),
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("what", EMPTY)
def test_weights_without_entries(what: str, name: str) -> None:
    model, rule = EMPTY[what](), RULES[name]()
    optimizer = sgd(model)
    rule.attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(draw(5, 6)).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_weight_whose_last_column_is_its_bias_is_in_the_table() -> None:
    model = Net(lambda s, x: F.linear(x, s.w[:, :6], s.w[:, 6]), w=(5, 7)).double()
    x = draw(4, 6).double()
    rule = pw.ProxProp(tau=2.0).attach(model)
    rows = torch.cat([x, torch.ones(4, 1).double()], 1)
    delta = 2 * model(x).detach()
    model(x).square().sum().backward()
    solved = torch.linalg.solve(rows.T @ rows + 0.5 * torch.eye(7).double(), rows.T @ delta).T
    torch.testing.assert_close(model.w.grad, solved)
    assert rule.explain().share == 1


@pytest.mark.parametrize("name", RULES)
def test_a_weight_that_is_an_activation_keeps_the_plain_gradient(name: str) -> None:
    parts = {"layer": nn.Linear(6, 5), "made_by": nn.Linear(6, 30), "bias": (5,)}
    if name == "exact back-matching":
        pytest.skip("it refuses a bias that no captured call adds")
    model, x = Net(generate, **parts), draw(7, 6)
    for unused in model.layer.parameters():
        unused.requires_grad_(False)
    plain, seen = copy.deepcopy(model), []
    rule = RULES[name]().attach(model, sgd(model))
    with rule.observing(lambda call, update, below: seen.append(call)):
        ours, theirs = gradients(model, x), gradients(plain, x)
    assert {call.name for call in seen} == {"made_by"}
    assert torch.equal(ours[-1], theirs[-1])
    delta = torch.autograd.grad(plain(x).square().sum(), plain.made_by.bias)[0]
    torch.testing.assert_close(seen[0].delta, delta)


@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_jacobian_at_once_are_autograds(name: str) -> None:
    def run(s: Net, x: Tensor) -> Tensor:
        features = s.norm(s.conv(x).flatten(1))
        return s.out(F.relu(torch.einsum("bi,io->bo", features, s.w)))

    parts = {"conv": nn.Conv1d(1, 2, 3), "norm": nn.LayerNorm(8), "w": (8, 4), "out": nn.Linear(4, 3)}
    model, x = Net(run, **parts), draw(5, 1, 6)
    plain = copy.deepcopy(model)
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer, kinds="all")
    found = [
        torch.autograd.grad(
            network(x).sum(0), list(network.parameters()), torch.eye(3), is_grads_batched=True
        )
        for network in (model, plain)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert not rule.health.counts


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_get_plain_gradients(layout: torch.layout) -> None:
    ends = []
    for attaches in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        if attaches:
            rule = pw.ProxProp().attach(model, sgd(model), kinds="all")
        nested = torch.nested.nested_tensor([draw(5, 6)[:3], draw(5, 6)], layout=layout)
        torch.nested.to_padded_tensor(model(nested), 0.0).square().sum().backward()
        ends.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)
    model(nested)
    assert "nested" in str(rule.explain()).lower()


@pytest.mark.parametrize("name", [*RULES, "back-matching's rate"])
def test_a_model_on_the_meta_device_takes_steps_that_change_nothing(name: str) -> None:
    """As programs do that only want to know shapes and memory."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = sgd(model)
    rule = RULES.get(name, pw.BackMatching)().attach(model, optimizer, kinds="all")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.empty(5, 6, device="meta")).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
    assert "steps seen" in str(rule.explain())
    model.zero_grad()
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    model[1].reset_running_stats()
    optimizer = sgd(model)
    rule.detach()
    rule.attach(model, optimizer, kinds="all")
    model(draw(5, 6)).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_weight_that_has_been_cut_meets_no_statistics_of_another_shape() -> None:
    """Pruning by ``.data``, which torch allows."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = pw.Foof(stats_every=1, refresh_every=1).attach(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(draw(7, 6)).square().mean().backward()
        optimizer.step()

    step()
    with torch.no_grad():
        model[0].weight.data, model[0].bias.data = model[0].weight[:5].clone(), model[0].bias[:5].clone()
        model[2].weight.data = model[2].weight[:, :5].clone()
    with pytest.raises(pw.StateError, match=r"layer '2' does not fit.*rule\.reset\(\) begins a new memory"):
        step()
    rule.reset()
    before = model[2].weight.detach().clone()
    step()
    assert not torch.equal(model[2].weight, before)


def test_a_captured_call_is_no_other_use() -> None:
    def run(s: Net, x: Tensor) -> Tensor:
        return s.head(s.norm(s.g * x)) + s.head.weight.sum()

    model = Net(run, norm=nn.LayerNorm(6), head=nn.Linear(6, 6), g=(6,))
    rule = pw.ProxProp().attach(model, kinds="all")
    model(draw(5, 6)).square().mean().backward()
    reasons = {row.name: row.reason for row in rule.explain().rows}
    assert reasons["norm"] == reasons["g"] == "linear in its weights"
    assert reasons["head"] == "linear in its weights; also used by sum, whose part stays a plain gradient"


@pytest.mark.parametrize("begin", ["evaluation", "blocks"])
def test_uses_are_noted_in_forwards_with_a_graph_of_each_outermost_module(begin: str) -> None:
    def add_places(s: Net, x: Tensor) -> Tensor:
        return s.layer(x) + s.places.weight[: len(x)]

    parts = [Net(add_places, layer=nn.Linear(6, 6), places=nn.Embedding(9, 6)) for _ in range(5)]
    model, x = nn.Sequential(*parts), draw(5, 6)
    rule = pw.ProxProp().attach(model, kinds="all")
    if begin == "evaluation":
        with torch.no_grad():
            for _ in range(5):
                model(x)
        model(x).square().mean().backward()
    else:
        for part in parts:  # each is the outermost module of its own run
            x = part(x)
        x.square().mean().backward()
    left = {row.name: row.reason for row in rule.explain().rows if not row.handled}
    assert left.keys() == {f"{number}.places" for number in range(5)}
    assert set(left.values()) == {"its weight is used by add, which is not read as a linear map"}


@pytest.mark.parametrize("name", ["Backprop", "ProxProp", "Foof"])
def test_a_use_by_hand_in_a_checkpointed_function_is_left_to_the_optimizer(name: str) -> None:
    def use(s: Net, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(s.layer(x)), s.w)

    def run(s: Net, x: Tensor) -> Tensor:
        run_again = s.training and partial(checkpoint, use, use_reentrant=False)
        return s.head((run_again or use)(s, x))

    model = Net(run, layer=nn.Linear(6, 6), w=(6, 6), head=nn.Linear(6, 3))
    plain, rule = copy.deepcopy(model), RULES[name]().attach(model, sgd(model))
    for trains in (False, True, True):  # a call without the checkpoint is seen first
        model.train(trains), plain.train(trains)
        ours, theirs = gradients(model, draw(5, 6)), gradients(plain, draw(5, 6))
    assert torch.equal(ours[0], theirs[0])
    rows = {row.name: row for row in rule.explain().rows}
    assert rows["layer"].handled
    assert not rows["w"].handled
    assert "by hand in a checkpointed function" in rows["w"].reason
