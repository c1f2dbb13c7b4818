"""Passes that only trace a model while a rule is attached: they change nothing, or say what to do."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from plywise import Foof, ProxProp
from plywise.testing.contract.models import compute_loss, copy_weights, have_same_bits, make_batch, make_mlp

RULES = {"one batch": ProxProp, "memory": lambda: Foof(stats_every=2, refresh_every=2)}


def export(model: nn.Module) -> None:
    torch.export.export(model, (make_batch()[0],), strict=False)


def run_with_fake_tensors(model: nn.Module) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model(mode.from_tensor(make_batch()[0]))


class Product(nn.Module):
    """A module that is no leaf for torch.fx, so that its calls are traced."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def trace_symbolically(model: nn.Module) -> None:
    x = make_batch()[0]
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trace", [export, run_with_fake_tensors, trace_symbolically])
@pytest.mark.parametrize("when", [0, 3])
def test_tracing_changes_no_step(rule, trace, when):
    results = []
    for traces in (False, True):
        model = make_mlp()
        model[0] = Product(model[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        attached = RULES[rule]().attach(model, optimizer)
        for number in range(8):
            if traces and number == when:
                trace(model)
            optimizer.zero_grad()
            compute_loss(model, make_batch(seed=number)).backward()
            optimizer.step()
        assert attached.explain().share == 1
        results.append(copy_weights(model))
        attached.detach()
    assert have_same_bits(*results)


def test_the_error_of_a_scripted_model_says_what_to_do():
    model = make_mlp()
    rule = ProxProp().attach(model)
    compute_loss(model, make_batch()).backward()
    with pytest.raises(AttributeError, match=r"call rule\.detach\(\) first"):
        torch.jit.script(model)
    rule.detach()
    torch.jit.script(model)
