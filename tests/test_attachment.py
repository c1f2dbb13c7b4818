"""What an attachment notices and does once, whatever the rule."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import plywise as pw


def test_hooks_that_change_an_output_keep_their_own_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    x, found = torch.randn(4, 3, dtype=torch.float64), []
    rule = pw.Backprop().attach(model)
    model[0].register_forward_hook(lambda module, args, output: output * 2, prepend=True)
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        rule.detach()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_shared_weight_and_both_biases_shrink_once_by_the_same_factor():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = 100 * torch.randn(5, 3)
    moves = []
    for cap in (None, 0.5):
        optimizer.zero_grad()
        rule = pw.BackMatching(cap=cap).attach(model, optimizer)
        (1e3 * model(x).square().mean()).backward()
        optimizer.step()
        moves.append([p.grad.clone() for p in (first.weight, first.bias, second.bias)])
        rule.detach()
    free, capped = moves
    factor = 0.5 * first.weight.norm() / free[0].norm()
    assert factor < 1
    for whole, part in zip(free, capped, strict=True):
        torch.testing.assert_close(part, factor * whole)


def test_the_error_names_what_is_not_finite():
    model = nn.Linear(3, 2)
    rule = pw.ProxProp().attach(model)
    with pytest.raises(pw.NonFiniteError, match="the input is not finite"):
        model(torch.full((4, 3), float("nan"))).sum().backward()
    with pytest.raises(pw.NonFiniteError, match="the gradient at its output is not finite"):
        (model(torch.randn(4, 3)).sum() * float("inf")).backward()
    rule.detach()


class Counting(pw.ProxProp):
    """Notes which of its two answers were asked for, by layer."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "asked", Counter())

    def update(self, ply):
        self.asked[ply.name, "move"] += 1
        return super().update(ply)

    def input_gradient(self, ply):
        self.asked[ply.name, "below"] += 1
        return super().input_gradient(ply)

    def taken(self):
        """The answers since the last call, as ``{"0": "update input_gradient"}``."""
        names = dict.fromkeys(name for name, _ in self.asked)
        found = {name: " ".join(w for w in ("move", "below") if self.asked[name, w]) for name in names}
        assert set(self.asked.values()) <= {1}
        self.asked.clear()
        return found


@pytest.fixture
def counted():
    """Three layers under a counting rule; the input wants a gradient as if a layer had made it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 4, requires_grad=True)
    rule = Counting().attach(model)
    yield model, x, rule
    rule.detach()


BOTH = dict.fromkeys("024", "move below")


def test_an_ordinary_backward_asks_for_everything(counted):
    model, x, rule = counted
    loss = model(x).square().sum()
    for keep in (True, False):
        loss.backward(retain_graph=keep)
        assert rule.taken() == BOTH
    model(x.detach()).square().sum().backward()
    assert rule.taken() == {**BOTH, "0": "move"}


def test_a_gradient_of_activations_makes_no_moves(counted):
    model, x, rule = counted
    weights = list(model.parameters())
    model(x).square().sum().backward()
    wanted = x.grad.clone()
    rule.taken()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(found, wanted)
    assert rule.taken() == {}  # plain: no weight learns from this backward
    hidden = model[:3](x)
    model[3:](hidden).square().sum().backward(inputs=[hidden])
    assert rule.taken() == {}
    assert [p.grad is not None for p in weights] == [True] * len(weights)  # of the first backward


@pytest.mark.parametrize("asked", ["2.weight", "4.bias", "0.weight"])
def test_a_gradient_of_some_parameters_makes_their_moves(counted, asked):
    """What is computed is what arrives, and it is what the whole backward makes of it."""
    model, x, rule = counted
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    rule.taken()
    parameter = model.get_parameter(asked)
    layer = asked[0]
    above = {name: "below" for name in "024" if name > layer}
    (found,) = torch.autograd.grad(model(x).square().sum(), parameter)
    assert torch.equal(found, wanted[asked])
    assert rule.taken() == {layer: "move", **above}
    model.zero_grad()
    model(x).square().sum().backward(inputs=[parameter])
    assert torch.equal(parameter.grad, wanted[asked])
    assert rule.taken() == {layer: "move", **above}
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [asked]


@pytest.mark.parametrize("reentrant", [True, False])
def test_moves_are_made_under_checkpoints(counted, reentrant):
    model, x, rule = counted
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    rule.taken()
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert rule.taken() == BOTH
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(p.grad, g)


def test_a_checkpoint_on_the_way_to_an_activation_makes_no_moves(counted):
    model, x, rule = counted
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    rule.taken()
    (found,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(found, wanted)
    assert rule.taken() == {}


def test_a_weight_computed_outside_of_the_model_keeps_its_plain_gradient(counted):
    """A hypernetwork's weight, put in place for one call: what has made it is none of the rule's layers."""
    model, x, rule = counted
    scale = torch.tensor(2.0, requires_grad=True)
    weight = model[2].weight.detach() * scale

    def find_gradient(asked):
        loss = functional_call(model, {"2.weight": weight}, (x,)).square().sum()
        return torch.autograd.grad(loss, asked, retain_graph=True)[0]

    for asked in (scale, weight):
        with rule.paused():
            plain = find_gradient(asked)
        assert torch.equal(find_gradient(asked), plain)
        assert rule.taken() == {}


@pytest.mark.parametrize(("pattern", "kept"), [("mix", "layer"), ("layer.weight", "mix"), ("layer", "mix")])
def test_patterns_name_modules_and_parameters(pattern: str, kept: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mix = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) @ self.mix

    for options, wanted in (({"exclude": pattern}, {kept}), ({"layers": pattern}, {pattern.split(".")[0]})):
        model = Mixed()
        rule = pw.ProxProp().attach(model, **options)
        model(torch.randn(5, 4)).sum().backward()
        assert {row.name for row in rule.explain().rows if row.handled} == wanted
