"""A rule that makes its update at the step says so if nobody clears gradients, and only then."""

import warnings
from typing import Any

import pytest
import torch
from small_nets import X, net, sgd
from torch import Tensor, nn

import plywise as pw

UNCLEARED = "gradients were not cleared before a step"


def take_steps(rule: Any, model: nn.Module, optimizer: torch.optim.Optimizer, clear: str) -> list[str]:
    """Attach a rule, take ten steps of two micro-batches, and return what is said about gradients."""
    rule.attach(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            if clear == "to None":
                optimizer.zero_grad()
            if clear == "to zero":
                optimizer.zero_grad(set_to_none=False)
            if clear == "below autograd":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.data.zero_()  # which no version counts
            model(X).square().mean().backward()
            if clear == "between the micro-batches":  # as a generator's loss fills its discriminator's .grad
                optimizer.zero_grad()
            if clear == "by a new tensor" and step:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            if clear == "as momentum":
                for p in model.parameters():
                    p.grad.mul_(0.9)
            model(-X).square().mean().backward()
            optimizer.step()
    return [str(w.message) for w in caught if "not cleared" in str(w.message)]


ACTING_AT_STEPS = {
    "Foof": lambda: pw.Foof(stats_every=5, refresh_every=5),
    "KFAC": pw.KFAC,
    "BackMatching": lambda: pw.BackMatching(cap=0.1),
}
WAYS_TO_CLEAR = ("to None", "to zero", "below autograd", "between the micro-batches", "by a new tensor")


@pytest.mark.parametrize("name", ACTING_AT_STEPS)
def test_gradients_that_nobody_clears_are_said_once(name: str) -> None:
    model = net()
    rule = ACTING_AT_STEPS[name]()
    said = take_steps(rule, model, sgd(model), "never")
    assert len(said) == 1
    assert "Call optimizer.zero_grad()" in said[0]
    assert rule.health.of("optimizer") == {UNCLEARED: 3}
    rule.detach()
    assert all(not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("name", ACTING_AT_STEPS)
@pytest.mark.parametrize("clear", [*WAYS_TO_CLEAR, "as momentum"])
def test_gradients_that_are_cleared_in_any_way_are_not_said(name: str, clear: str) -> None:
    model = net()
    rule = ACTING_AT_STEPS[name]()
    assert not take_steps(rule, model, sgd(model), clear)
    assert UNCLEARED not in rule.health.of("optimizer")


@pytest.mark.parametrize("rule", [pw.Backprop(), pw.ProxProp(), pw.NLMS(), pw.Coordinates()], ids=str)
def test_sums_of_answers_or_of_gradients_are_not_said(rule: pw.Rule) -> None:
    model = net()
    assert not take_steps(rule, model, sgd(model), "never")


def test_a_closure_that_clears_gradients_is_not_said() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    rule = pw.Foof().attach(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert UNCLEARED not in rule.health.of("optimizer")
