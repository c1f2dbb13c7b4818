"""A rule that takes no part in a step says so; detached or interrupted, it leaves nothing behind."""

import warnings
from typing import Any

import pytest
import torch
from small_nets import RULES, X, grads, net, sgd
from torch import Tensor, nn

import plywise as pw


@pytest.mark.parametrize("name", list(RULES))
def test_another_optimizer_is_said_once(name: str) -> None:
    model = net()
    rule, other = RULES[name](), sgd(model)
    rule.attach(model, sgd(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            other.zero_grad()
            model(X).square().sum().backward()
            other.step()
    said = [
        str(w.message) for w in caught if "the optimizer given to attach() has not stepped" in str(w.message)
    ]
    assert len(said) == 1
    assert rule.health.total("the rule took no part in a step") >= 1
    assert ", 0 steps seen" in str(rule.explain())


@pytest.mark.parametrize("name", list(RULES))
def test_gradients_assigned_by_hand_are_said_once(name: str) -> None:
    model = net()
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    said = [str(w.message) for w in caught if "took no part in the last 3 optimizer steps" in str(w.message)]
    assert len(said) == 1
    assert rule.health.total("the rule took no part in a step") == 6


def test_a_rule_whose_layers_are_all_used_otherwise_says_so() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x[:, None]

    model = Product()
    optimizer = sgd(model)
    rule = pw.Foof().attach(model, optimizer)

    def train() -> None:
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match="its parameters are of other kinds than it handles"):
        train()
    assert "used by mul" in str(rule.explain())


def train_by_autograd_grad(rule: pw.Rule | None, steps: int = 6) -> tuple[list[Tensor], list[str]]:
    """The weights after steps whose gradients come from ``torch.autograd.grad``, and what the rule said."""
    model = net()
    optimizer = sgd(model)
    if rule is not None:
        rule.attach(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(model(X).square().mean(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return [p.detach() for p in model.parameters()], [str(w.message) for w in caught]


@pytest.mark.parametrize("make", [pw.Foof, pw.RLS, pw.Coordinates])
def test_rules_with_statistics_say_that_autograd_grad_passes_them_by(make: type[pw.Rule]) -> None:
    rule = make()
    weights, said = train_by_autograd_grad(rule)
    plain, _ = train_by_autograd_grad(None)
    assert all(map(torch.equal, weights, plain))
    assert sum("took no part in the last 3 optimizer steps" in text for text in said) == 1
    assert rule.health.total("the rule took no part in a step") == 6


def test_a_rule_of_one_batch_acts_in_autograd_grad() -> None:
    model = net()
    optimizer = sgd(model)
    pw.ProxProp().attach(model, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    weights, said = train_by_autograd_grad(pw.ProxProp())
    assert all(map(torch.equal, weights, (p.detach() for p in model.parameters())))
    assert not said


def test_weights_that_the_optimizer_does_not_step_are_not_counted_as_handled() -> None:
    model = net()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    rule = pw.ProxProp().attach(model, optimizer)
    model(X).square().sum().backward()
    rows = {row.name: row for row in rule.explain().rows}
    assert rows["0"].handled
    assert not rows["2"].handled
    assert rows["2"].reason == "the optimizer given to attach() does not step it"


def test_spoilt_buffers_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = sgd(model)
    rule = pw.ProxProp().attach(model, optimizer)
    bad = X.clone()
    bad[0, 0] = float("nan")
    model(bad).sum().backward()
    with pytest.warns(RuntimeWarning) as caught:
        optimizer.step()
    assert any("1.running_mean" in str(w.message) and "reset_running_stats" in str(w.message) for w in caught)
    assert rule.health.of("1.running_var") == {"buffer is not finite": 1}


def test_wrappers_that_are_no_whole_optimizer_are_refused() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups = inner, inner.param_groups

    model = net()
    with pytest.raises(
        pw.AttachError, match=r"Lookahead is a torch.optim.Optimizer by name only.*that it wraps"
    ):
        pw.ProxProp().attach(model, Lookahead(sgd(model)))


def test_health_is_readable_after_detach() -> None:
    model = net()
    optimizer = sgd(model)
    rule = pw.ProxProp().attach(model, optimizer)
    model(X).sum().backward()
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning):
        optimizer.step()
    rule.detach()
    assert rule.health.total("step skipped") == 1


def test_an_interrupt_in_the_forward_leaves_no_mode_behind() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise KeyboardInterrupt
            return x

    model, plain = nn.Sequential(net(), Interrupted()), net()
    rule = pw.Backprop().attach(model)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.eval()
    for _ in range(2):
        model.zero_grad()
        model(X).square().sum().backward()
    plain(X).square().sum().backward()
    for name, value in grads(plain).items():
        assert torch.equal(grads(model)[f"0.{name}"], value)
    rule.detach()
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("make_rule", [pw.ProxProp, pw.Foof])
def test_other_layers_in_the_place_of_those_that_the_optimizer_stepped(make_rule: Any) -> None:
    """As many parameters as before, and others: a training that goes from layer to layer."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    optimizer = sgd(model[2])
    rule = make_rule().attach(model, optimizer)
    for layer in (model[2], model[0]):
        optimizer.param_groups[0]["params"] = list(layer.parameters())
        for _ in range(2):
            model.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    model.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()
    handled = [p.grad.clone() for p in model.parameters()]
    assert {row.name: row.handled for row in rule.explain().rows} == {"0": True, "2": False}
    rule.detach()
    model.zero_grad()
    model(X).square().sum().backward()
    same = [torch.allclose(g, p.grad) for g, p in zip(handled, model.parameters(), strict=True)]
    assert same == [False, False, True, True]


def test_a_skipped_step_that_fails_does_not_disturb_the_next() -> None:
    class Careless(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(1)  # fails where there is none
            return super().step(closure)

    model = net()
    optimizer = Careless(model.parameters(), lr=0.1)
    rule = pw.Foof(stats_every=1, refresh_every=1).attach(model, optimizer)
    for factor in (1.0, float("nan"), 1.0):
        optimizer.zero_grad()
        (model(X).square().sum() * factor).backward()
        if factor == 1:
            optimizer.step()
        else:
            with pytest.warns(RuntimeWarning, match="not finite"), pytest.raises(AttributeError):
                optimizer.step()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert rule.explain().steps == 2


def test_a_step_that_one_rule_skips_is_none_for_another() -> None:
    model = net()
    optimizer = sgd(model)
    rules = [
        pw.Foof().attach(model, optimizer, layers="0"),
        pw.ProxProp().attach(model, optimizer, layers="2"),
    ]
    for factor in (1.0, float("nan"), 1.0):
        optimizer.zero_grad()
        (model(X).square().sum() * factor).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        assert all(bool(p.grad.isfinite().all()) is (factor == 1) for p in model.parameters())
    for rule in rules:
        assert rule.explain().steps == 2
        assert rule.health.total("step skipped") == 1


class Parent(nn.Module):
    """Uses the weight of its layer a second time, by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(torch.tanh(self.layer(x)), self.layer.weight.t()))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("how", ["a parent", "a penalty"])
def test_a_weight_that_is_also_used_outside_of_the_models_forward_is_said_once(name: str, how: str) -> None:
    model = Parent() if how == "a parent" else net()
    optimizer = sgd(model)
    rule = RULES[name]().attach(model.layer if how == "a parent" else model, optimizer)
    said = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            loss = model(X).square().mean()
            if how == "a penalty":
                loss = loss + model[2].weight.square().sum()
            loss.backward()
            optimizer.step()
        said += [str(warning.message) for warning in caught]
    weight = "weight" if how == "a parent" else "2.weight"
    assert [f"a part of the gradient of '{weight}'" in text for text in said] == [True]
    assert rule.health.of(weight) == {"a part of the gradient came from outside of the model's forward": 1}
    row = rule.explain().rows[-1]
    assert row.handled
    assert "also used by code outside of the model's forward" in row.reason


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("begin", [4, 9, 26])
def test_a_penalty_that_begins_later_is_said_once(name: str, begin: int) -> None:
    model = net()
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer)
    said = []
    for step in range(1, 2 * begin + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            loss = model(X).square().mean()
            if step >= begin:
                loss = loss + model[0].weight.square().sum()
            loss.backward()
            optimizer.step()
        said += [(step >= begin, str(warning.message)) for warning in caught]
    assert [late and "a part of the gradient of '0.weight'" in text for late, text in said] == [True]
    rule.detach()
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_few_gradients_of_a_long_run_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(*_: Tensor) -> bool:
        compared.append(step)
        return False

    monkeypatch.setattr("plywise.engine.outside_uses._has_more", compare)
    model = nn.Linear(3, 2)
    pw.Backprop().attach(model)
    for step in range(1, 400):  # noqa: B007 - compare() reads it
        model(torch.ones(2, 3)).sum().backward()
    assert compared == [1, 2, 3, 5, 8, 13, 20, 31, 47, 71, 107, 161, 242, 364]


def test_whole_gradients_and_hooks_of_the_user_are_no_use_from_outside() -> None:
    model = net()
    optimizer = sgd(model)
    rule = pw.ProxProp().attach(model, optimizer)
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    for _ in range(4):
        optimizer.zero_grad()
        (model(X).square().mean() + model(-X).square().mean()).backward()  # two answers, one gradient
        optimizer.step()
    assert not rule.health.counts


def test_a_mapped_second_derivative_is_no_use_from_outside() -> None:
    """The exact trace of a Jacobian, as continuous flows train on it."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = sgd(model)
    rule = pw.ProxProp().attach(model, optimizer)
    basis = torch.eye(3).unsqueeze(1).expand(3, 5, 3)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.randn(5, 3, requires_grad=True)
        output = model(x)
        (rows,) = torch.autograd.grad(output, x, basis, create_graph=True, is_grads_batched=True)
        (output.square().sum() + torch.einsum("ini", rows).sum()).backward()
        optimizer.step()
    assert not rule.health.counts


def test_parts_of_a_weight_are_no_use_from_outside() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)  # its projections of queries, keys and values
    optimizer = sgd(model)
    rule = pw.Foof(stats_every=1, refresh_every=1).attach(model, optimizer)
    queries, keys = torch.randn(3, 2, 4), torch.randn(3, 5, 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(queries, keys, keys)[0].square().mean().backward()
        optimizer.step()
    assert not rule.health.counts
