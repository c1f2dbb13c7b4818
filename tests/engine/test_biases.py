"""Biases belong to the calls that add them, however they come into the call."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plywise as pw

RULES: dict[str, Callable[[], pw.Rule]] = {"ProxProp": pw.ProxProp, "NLMS": pw.NLMS, "Backprop": pw.Backprop}
EACH = pytest.mark.parametrize("name", RULES)


def make_mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def find_handled(rule: pw.Rule) -> set[str]:
    return {key for row in rule.explain().rows if row.handled for key in row.keys}


class Fused(nn.Module):
    """Three layers in one call: weights and biases are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        return F.linear(x, torch.cat([f.weight for f in layers]), torch.cat([f.bias for f in layers]))


@EACH
def test_concatenated_biases_are_handled_with_their_weights(name: str) -> None:
    model, wide = Fused(), nn.Linear(6, 12)
    rules = [RULES[name]().attach(network) for network in (model, wide)]
    wide.load_state_dict(
        {key: torch.cat([getattr(f, key) for f in model.children()]) for key in ("weight", "bias")}
    )
    x = torch.randn(5, 6)
    for network in (model, wide):
        network(x).sin().sum().backward()
    for key in ("weight", "bias"):
        found = torch.cat([getattr(f, key).grad for f in model.children()])
        torch.testing.assert_close(found, getattr(wide, key).grad)
    assert find_handled(rules[0]) == {key for key, _ in model.named_parameters()}


@EACH
def test_biases_of_a_functional_call_stand_for_the_models_own(name: str) -> None:
    model = make_mlp()
    rule = RULES[name]().attach(model)
    others = {key: p.detach().clone().requires_grad_() for key, p in model.named_parameters()}
    torch.func.functional_call(model, others, (torch.randn(5, 6),)).sin().sum().backward()
    assert find_handled(rule) == others.keys()


@EACH
def test_biases_that_are_replaced_are_found_again(name: str) -> None:
    model = make_mlp()
    rule = RULES[name]().attach(model)
    x = torch.randn(5, 6)
    for _ in range(2):
        model(x).sin().sum().backward()
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    model(x).sin().sum().backward()
    assert find_handled(rule) == {key for key, _ in model.named_parameters()}


MEMORIES: dict[str, Callable[[], pw.Rule]] = {
    "Foof": pw.Foof,
    "AdaBK": lambda: pw.AdaBK(stats_every=1, refresh_every=1),
    "RLS": pw.RLS,
    "Coordinates": pw.Coordinates,
}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_bias_that_is_frozen_and_thawed_leaves_and_joins_its_layers_problem(
    name: str, to_none: bool
) -> None:
    model, other = make_mlp(), make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = MEMORIES[name]().attach(model, optimizer)
    x = torch.randn(5, 6)

    def step(network: nn.Module, sgd: torch.optim.SGD) -> None:
        sgd.zero_grad(set_to_none=to_none)
        network(x).sin().sum().backward()
        sgd.step()

    for trains in (True, False, False, True, True):
        before = model[0].bias.detach().clone()
        model[0].bias.requires_grad_(trains)
        step(model, optimizer)
        assert torch.equal(model[0].bias, before) is not trains
        columns = {statistic.shape[-1] for key, statistic in rule.statistics["0"].items() if key == "input"}
        assert columns <= {6 + trains}
    other.load_state_dict(model.state_dict())
    rule.reset()  # a new memory, as that of a rule just attached
    sgd = torch.optim.SGD(other.parameters(), lr=0.01)
    MEMORIES[name]().attach(other, sgd)
    step(model, optimizer)
    step(other, sgd)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


EVERY: dict[str, Callable[[], pw.Rule]] = {
    **RULES,
    **MEMORIES,
    "CWU": pw.Consequentialism,
    "rate": pw.BackMatching,
    "KFAC": lambda: pw.KFAC(stats_every=1, refresh_every=1),
}
LEFT = {
    "excluded": {"exclude": "*.bias"},
    "not asked for": {"layers": "*.weight"},
    "stepped by another optimizer": {},
}


@pytest.mark.parametrize("how", LEFT)
@pytest.mark.parametrize("name", EVERY)
def test_a_bias_that_is_left_to_the_optimizer_is_a_constant(name: str, how: str) -> None:
    """It has its plain gradient, and the weight has the update that it has beside a frozen bias."""
    model, beside, plain = make_mlp(), make_mlp(), make_mlp()
    named = dict(model.named_parameters())
    weights = [p for key, p in named.items() if key.endswith("weight")]
    stepped = weights if how == "stepped by another optimizer" else list(named.values())
    optimizer = torch.optim.SGD(stepped, lr=0.01)
    rule = EVERY[name]().attach(model, optimizer, **LEFT[how])  # type: ignore[arg-type]
    for layer in beside[::2]:
        layer.bias.requires_grad_(False)
    reference = torch.optim.SGD(beside.parameters(), lr=0.01)
    EVERY[name]().attach(beside, reference)
    x = torch.randn(5, 6)
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        beside.load_state_dict(model.state_dict())
        for network in (model, beside, plain):
            network.zero_grad()
            network(x).sin().sum().backward()
        before = model[0].bias.detach().clone()
        optimizer.step()
        reference.step()
        assert torch.equal(model[0].bias, before) is (how == "stepped by another optimizer")
        for one, two, three in zip(model[::2], beside[::2], plain[::2], strict=True):
            torch.testing.assert_close(one.weight, two.weight)
            torch.testing.assert_close(one.bias.grad, three.bias.grad)
    assert find_handled(rule) == {"0.weight", "2.weight"}


def test_a_bias_left_below_altered_values_is_refused() -> None:
    model = make_mlp()
    rule = pw.BackMatching(mode="exact").attach(model, exclude="0.bias")
    with pytest.raises(pw.PlywiseError, match=r"'0\.bias', which it leaves.*would get a wrong gradient"):
        model(torch.randn(5, 6)).sin().sum().backward()
    rule.detach()


def test_the_cap_leaves_an_excluded_bias_alone() -> None:
    model, plain = make_mlp(), make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pw.BackMatching(cap=1e-3).attach(model, optimizer, exclude="0.bias")
    x = torch.randn(5, 6)
    for network in (model, plain):
        network(x).sin().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    assert model[2].bias.grad.norm() < 0.1 * plain[2].bias.grad.norm()


class Shared(nn.Module):
    """Two layers that add one bias, each as its own or from outside."""

    def __init__(self, is_own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6, bias=is_own), nn.Linear(6, 6, bias=is_own)
        self.bias = self.first.bias if is_own else nn.Parameter(torch.randn(6))
        if is_own:
            self.second.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.second, self.call(self.first, x).tanh())

    def call(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x) if layer.bias is self.bias else F.linear(x, layer.weight, self.bias)


def assert_plain_gradients(
    model: nn.Module, plain: nn.Module, optimizer: torch.optim.Optimizer, name: str
) -> None:
    """Train three steps; assert that a parameter gets the gradient that it gets in a model without a rule."""
    x = torch.randn(5, 6)
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        for network in (model, plain):
            network.zero_grad()
            network(x).sin().sum().backward()
        optimizer.step()
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_bias_of_two_layers_belongs_to_neither(name: str, is_own: bool) -> None:
    """Its gradient is a sum, of which the step could not tell the parts."""
    model, plain = Shared(is_own), Shared(is_own)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = MEMORIES[name]().attach(model, optimizer)
    assert_plain_gradients(model, plain, optimizer, "bias")
    assert all(rule.statistics[key] for key in ("first", "second"))


class Shifted(nn.Module):
    """A layer with one number for all outputs in the place of a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.shift = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.shift)


@pytest.mark.parametrize("name", EVERY)
def test_one_number_for_all_outputs_is_a_constant(name: str) -> None:
    model, plain = Shifted(), Shifted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = EVERY[name]().attach(model, optimizer)
    assert_plain_gradients(model, plain, optimizer, "shift")
    assert "weight" in find_handled(rule)
