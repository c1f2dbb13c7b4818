"""A rule with memory on weights that are computed or used in several ways: closed forms in float64.

Its update stands for the gradient of one use, and autograd carries it on to whatever the weight is made of.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.utils import parametrizations, parametrize, prune
from uses_apart_worker import REPLICATED, RULES, main, train

import plywise as pw
from processes import run_two_ranks

EACH = pytest.mark.parametrize("name", RULES)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def sgd(model: nn.Module, lr: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, parts: int = 1) -> dict[str, Tensor]:
    """What the optimizer sees as gradients."""
    optimizer.zero_grad()
    for part in x.chunk(parts):
        (model(part).sin() * torch.linspace(1, 2, 3)).sum().backward()
    optimizer.step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def halve(layer: nn.Module) -> None:
    prune.custom_from_mask(layer, "weight", (torch.rand(3, 5) > 0.4).double())


class Rounding(torch.autograd.Function):
    """Rounds, and lets gradients through as they are: what networks of few bits train by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return (weight * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Rounded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return Rounding.apply(weight)


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "rounded": lambda layer: parametrize.register_parametrization(layer, "weight", Rounded()),
    "weight norm": parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "pruned": halve,
}


@EACH
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_the_first_update_of_a_computed_weight_is_that_of_a_plain_one(name: str, kind: str) -> None:
    layer = nn.Linear(5, 3)
    COMPUTED[kind](layer)
    optimizer = sgd(layer)
    rule = RULES[name]().attach(layer, optimizer)
    plain = nn.Linear(5, 3)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    plain_optimizer = sgd(plain)
    other = RULES[name]().attach(plain, plain_optimizer)
    x = torch.randn(7, 5)
    found, update = step(layer, optimizer, x), step(plain, plain_optimizer, x)
    rule.detach()
    other.detach()
    torch.testing.assert_close(found["bias"], update["bias"])
    sources = {key: p for key, p in layer.named_parameters() if key != "bias"}
    layer(x)  # a hook of torch's older functions makes the weight
    carried = torch.autograd.grad(layer.weight, list(sources.values()), update["weight"])
    for key, expected in zip(sources, carried, strict=True):
        torch.testing.assert_close(found[key], expected)


def test_later_updates_are_by_what_was_learned_before_them() -> None:
    layer = parametrizations.weight_norm(nn.Linear(5, 3, bias=False))
    optimizer = sgd(layer)
    rule = RULES["foof"]().attach(layer, optimizer)
    first, second = torch.randn(7, 5), torch.randn(4, 5)
    step(layer, optimizer, first)
    (root,) = optimizer.state[layer.parametrizations.weight.original1]["plywise.Foof.input.root"].clone()

    def gradient(x: Tensor) -> Tensor:
        weight = layer.weight.detach()
        return (torch.linspace(1, 2, 3) * (x @ weight.T).cos()).T @ x

    kept = gradient(first).norm() / (gradient(first) @ root).norm()
    found = step(layer, optimizer, second)
    sources = dict(layer.named_parameters())
    rule.detach()
    expected = torch.autograd.grad(layer.weight, list(sources.values()), kept * gradient(second) @ root)
    for key, value in zip(sources, expected, strict=True):
        torch.testing.assert_close(found[key], value)


def test_rls_divides_by_the_calls_own_energy() -> None:
    layer = parametrizations.weight_norm(nn.Linear(5, 3, bias=False))
    optimizer = sgd(layer)
    rule = pw.RLS(gain=0.7, forgetting=0.9).attach(layer, optimizer)
    inverse = torch.eye(5)
    for rows in (7, 4, 6):
        x = torch.randn(rows, 5) + 1
        weight, mean = layer.weight.detach(), x.mean(0)
        gradient = (torch.linspace(1, 2, 3) * (x @ weight.T).cos()).T @ x
        h = 0.9 + 0.7 * mean @ inverse @ mean
        found = step(layer, optimizer, x)
        sources = dict(layer.named_parameters())
        with rule.paused():
            carried = torch.autograd.grad(layer.weight, list(sources.values()), gradient @ inverse / h)
        for key, value in zip(sources, carried, strict=True):
            torch.testing.assert_close(found[key], value)
        image = inverse @ mean
        inverse = (inverse - 0.7 / h * torch.outer(image, image)) / 0.9
        inverse *= min(1.0, 5 / float(inverse.trace()))


class Tied(nn.Module):
    """An autoencoder whose decoder has the encoder's weight, transposed; or a copy of it."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encode = nn.Linear(3, 4)
        self.decode = nn.Parameter(self.encode.weight.detach().t().clone()) if apart else None
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.encode.weight.t() if self.decode is None else self.decode
        return F.linear(torch.tanh(self.encode(x)), weight, self.bias)


@EACH
def test_each_use_of_a_tied_weight_is_a_problem_of_its_own(name: str) -> None:
    x, seen = torch.randn(8, 3), []
    for apart in (False, True):
        model = Tied(apart)
        optimizer = sgd(model)
        rule = RULES[name]().attach(model, optimizer)
        seen.append(step(model, optimizer, x))
        assert not rule.health.counts
        assert all(row.handled for row in rule.explain().rows)
        rule.detach()
    tied, apart = seen
    torch.testing.assert_close(tied["encode.weight"], apart["encode.weight"] + apart["decode"].t())
    for key in ("encode.bias", "bias"):
        torch.testing.assert_close(tied[key], apart[key])


class Shared(nn.Module):
    """A weight of two modules; used as an embedding too, if asked."""

    def __init__(self, looked_up: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Embedding(3, 3) if looked_up else nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.looked_up = looked_up

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.argmax(1) if self.looked_up else x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "computed": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)
    ),
    "transposed": lambda: Tied(False),
    "two modules": lambda: Shared(False),
    "embedding and head": lambda: Shared(True),
}


Dicts = tuple[dict[str, Any], dict[str, Any]]


def save(model: nn.Module, optimizer: torch.optim.Optimizer, how: str) -> Dicts:
    if how == "plain":
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flattened")
    return copy.deepcopy(get_state_dict(model, optimizer, options=options))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, states: Dicts, how: str) -> None:
    if how == "plain":
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        return
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flattened")
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=options)


@EACH
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["plain", "nested", "flattened"])
def test_a_resumed_run_takes_the_same_steps(name: str, kind: str, how: str) -> None:
    batches = [torch.randn(6, 3) for _ in range(5)]

    def start() -> tuple[nn.Module, torch.optim.Optimizer, pw.Rule]:
        torch.manual_seed(5)
        model = MODELS[kind]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, RULES[name]().attach(model, optimizer, kinds="all")

    model, optimizer, rule = start()
    for x in batches[:3]:
        step(model, optimizer, x)
    states = save(model, optimizer, how)
    other, other_optimizer, _ = start()
    if how == "flattened":
        other(batches[0])  # such a load finds the uses that have been seen
    load(other, other_optimizer, states, how)
    for x in batches[3:]:
        mine, its = step(model, optimizer, x), step(other, other_optimizer, x)
        for key, value in mine.items():
            assert torch.equal(value, its[key]), key
    assert all(row.handled for row in rule.explain().rows), rule.explain()
    assert not rule.health.counts


@pytest.mark.parametrize("kind", MODELS)
def test_micro_batches_agree_with_one_batch_once_something_is_learned(kind: str) -> None:
    seen = []
    for parts in (1, 3):
        torch.manual_seed(5)
        model, batches = MODELS[kind](), [torch.randn(6, 3) for _ in range(3)]
        optimizer = sgd(model)
        RULES["kfac"]().attach(model, optimizer, kinds="all")
        step(model, optimizer, batches[0])
        seen.append([step(model, optimizer, x, parts) for x in batches[1:]])
    for one, several in zip(*seen, strict=True):
        for key, value in one.items():
            torch.testing.assert_close(several[key], value, rtol=1e-6, atol=1e-9)


def test_a_use_that_comes_later_takes_its_part_from_then_on() -> None:
    model = Tied(False)
    optimizer = sgd(model)
    rule = RULES["foof"]().attach(model, optimizer)
    hidden = torch.randn(8, 3)
    for _ in range(2):
        optimizer.zero_grad()
        model.encode(hidden).square().sum().backward()
        optimizer.step()
    found = step(model, optimizer, torch.randn(8, 3))
    keys = optimizer.state[model.encode.weight].keys()
    assert sum(key.endswith(".input.root") for key in keys) == 2
    assert all(value.isfinite().all() for value in found.values())
    assert not rule.health.counts


@EACH
def test_what_was_never_more_than_zero_is_no_division_by_zero(name: str) -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    optimizer = sgd(layer, 0.1)
    rule = RULES[name]().attach(layer, optimizer)
    for factor in (0.0, 0.0, 1.0, 1.0):
        optimizer.zero_grad()
        (layer(torch.randn(4, 3)).sin().sum() * factor).backward()
        optimizer.step()
    assert not rule.health.counts
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.slow
def test_replicas_take_the_steps_of_one_process(tmp_path: Path) -> None:
    first, second = run_two_ranks(main, tmp_path)
    for name in REPLICATED:
        whole = train(name, slice(0, 8))
        for mine, its, expected in zip(first[name], second[name], whole, strict=True):
            assert torch.equal(mine, its)
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
    for name in RULES:
        for replicated, sharded in zip(first[name], first[f"{name} sharded"], strict=True):
            torch.testing.assert_close(sharded, replicated, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["foof", "rls"])
def test_a_computed_weight_of_a_kind_that_is_left_alone_has_its_reason(name: str) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Embedding(9, 6)), nn.Linear(6, 3))
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    rows = {key: row for row in rule.explain().rows for key in row.keys}
    for key, _ in parametrizations.weight_norm(nn.Embedding(9, 6)).named_parameters():
        assert not rows[f"0.{key}"].handled
        assert "its kind, 'embedding'" in rows[f"0.{key}"].reason
    assert rows["1.weight"].handled


@EACH
def test_rows_that_are_left_out_do_not_count_for_a_computed_weight(name: str) -> None:
    """Neither in the first step, which learns from the call itself, nor in the energy of RLS."""
    found = []
    mask = torch.arange(6) < torch.tensor([[6], [3], [2], [5]])
    for padding in (0.0, 50.0):
        torch.manual_seed(0)
        layer = parametrizations.weight_norm(nn.Linear(5, 3))
        optimizer = sgd(layer)
        rule = RULES[name]().attach(layer, optimizer)
        for _ in range(3):
            x = torch.where(mask.unsqueeze(2), torch.randn(4, 6, 5), padding)
            optimizer.zero_grad()
            with pw.rows(mask):
                output = layer(x)
            output[mask].sin().sum().backward()
            optimizer.step()
            found.append([p.grad.clone() for p in layer.parameters()])
        rule.detach()
    for one, two in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, two)
