"""Every rule with every optimizer trains; an interrupted run goes on bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from plywise import Rule
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach, count_warm_steps, learn
from plywise.testing.contract.models import (
    MODELS,
    Finding,
    are_finite,
    compute_loss,
    copy_weights,
    have_same_bits,
    make_batch,
    make_mlp,
    save_and_load,
    train,
)

Make = Callable[[float, nn.Module], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda rate, net: SGD(net.parameters(), lr=rate),
    "sgd-fused": lambda rate, net: SGD(net.parameters(), lr=rate, fused=True),
    "momentum": lambda rate, net: SGD(net.parameters(), lr=rate / 4, momentum=0.8),
    "nag": lambda rate, net: SGD(net.parameters(), lr=rate / 4, momentum=0.8, nesterov=True),
    "rmsprop": lambda rate, net: RMSprop(net.parameters(), lr=rate / 2),
    "rmsprop-foreach": lambda rate, net: RMSprop(net.parameters(), lr=rate / 2, foreach=True),
    "adam": lambda rate, net: Adam(net.parameters(), lr=rate),
    "adam-fused": lambda rate, net: Adam(net.parameters(), lr=rate, fused=True),
    "adamw-foreach": lambda rate, net: AdamW(net.parameters(), lr=rate, foreach=True),
    "adamw-fused": lambda rate, net: AdamW(net.parameters(), lr=rate, fused=True),
}
EVERY_RULE = ("sgd", "momentum", "adam")
"""Optimizers that are tried with every rule; each of the others is tried with one rule of each family."""


def choose_rates(case: Case, optimizer_name: str) -> tuple[float, ...]:
    return case.adaptive_rates if optimizer_name.startswith(("adam", "rmsprop")) else case.rates


def trains(case: Case, optimizer_name: str, kind: str, steps: int, down_to: float) -> Finding:
    """Tell whether one of the rule's rates brings the loss below a fraction of the first in these steps."""
    build, shape = MODELS[kind]
    for rate in choose_rates(case, optimizer_name):
        model = build()
        optimizer = OPTIMIZERS[optimizer_name](rate, model)
        rule = case.make().attach(model, optimizer)
        data = make_batch(shape, n=32)
        losses = train(model, optimizer, data, 1)
        while len(losses) < steps and losses[-1] >= down_to * losses[0]:
            losses += train(model, optimizer, data, 1)
        assert are_finite(copy_weights(model))
        assert not rule.health.counts
        rule.detach()
        if losses[-1] < down_to * losses[0]:
            return Finding(True, "the loss is down")
    rates = choose_rates(case, optimizer_name)
    return Finding(
        False,
        f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in {steps} steps at lr={rates[-1]}, and no "
        f"lower at any rate of {rates}; a Case can state other rates",
    )


SHARED_OUT = [
    pytest.param(name, marks=pytest.mark.one_of_family) for name in OPTIMIZERS if name not in EVERY_RULE
]


@pytest.mark.parametrize("optimizer_name", [*EVERY_RULE, *SHARED_OUT])
def test_the_loss_goes_down(case: Case, optimizer_name: str) -> None:
    assert trains(case, optimizer_name, "mlp", 30, 0.7)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_the_loss_of_a_convolutional_network_goes_down(case: Case, optimizer_name: str) -> None:
    assert trains(case, optimizer_name, "convnet", 25, 0.9)


def test_schedulers_and_parameter_groups(case: Case, rule: Rule) -> None:
    model, data = make_mlp(), make_batch(n=32)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}]
    optimizer = SGD(groups, lr=case.rates[0])
    rule.attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    before = copy_weights(model)
    losses = []
    for _ in range(30):
        losses += train(model, optimizer, data, 1)
        scheduler.step()
    after = copy_weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert losses[-1] < losses[0]  # a rule may be slow at the rates of its case


@pytest.mark.one_of_family
@pytest.mark.parametrize(("optimizer_name", "kind"), [("momentum", "convnet"), ("adamw-foreach", "mlp")])
def test_resuming_is_bit_exact(case: Case, optimizer_name: str, kind: str) -> None:
    build, shape = MODELS[kind]

    def start(seed: int) -> tuple[nn.Module, Optimizer, Rule]:
        model = build(seed=seed)
        optimizer = OPTIMIZERS[optimizer_name](choose_rates(case, optimizer_name)[0], model)
        return model, optimizer, case.make().attach(model, optimizer)

    def run(model: nn.Module, optimizer: Optimizer, leg: int) -> list[float]:
        return [train(model, optimizer, make_batch(shape, seed=20 + 2 * leg + i), 1)[0] for i in range(2)]

    model, optimizer, rule = start(1)
    unbroken = [loss for leg in range(4) for loss in run(model, optimizer, leg)]
    expected = copy_weights(model)
    rule.detach()

    model, optimizer, rule = start(1)
    found = run(model, optimizer, 0)
    for leg in range(1, 4):
        state = save_and_load({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        rule.detach()
        model, optimizer, rule = start(100 + leg)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        found += run(model, optimizer, leg)
    assert found == unbroken
    assert have_same_bits(copy_weights(model), expected)
    rule.detach()


def test_loading_into_an_attached_model(case: Case, rule: Rule) -> None:
    data, other, model = make_batch(), make_mlp(seed=5), make_mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(rule, model, optimizer if rule.remembers else None)
    model.load_state_dict(other.state_dict())
    learn(model, optimizer, (6,), count_warm_steps(rule))
    attach(case.make(), other, warm=(6,))
    for net in (model, other):
        compute_loss(net, data).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
