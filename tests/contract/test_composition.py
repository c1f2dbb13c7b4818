"""Every rule with every optimizer trains; an interrupted run goes on bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from plywise import Rule

from .models import all_finite, batch, convnet, loss_of, mlp, same_bits, train, weights
from .registry import Case

Make = Callable[[Case, nn.Module], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda case, net: SGD(net.parameters(), lr=case.rate),
    "sgd-fused": lambda case, net: SGD(net.parameters(), lr=case.rate, fused=True),
    "momentum": lambda case, net: SGD(net.parameters(), lr=case.rate / 4, momentum=0.8),
    "nag": lambda case, net: SGD(net.parameters(), lr=case.rate / 4, momentum=0.8, nesterov=True),
    "rmsprop": lambda case, net: RMSprop(net.parameters(), lr=case.adaptive_rate / 2),
    "rmsprop-foreach": lambda case, net: RMSprop(net.parameters(), lr=case.adaptive_rate / 2, foreach=True),
    "adam": lambda case, net: Adam(net.parameters(), lr=case.adaptive_rate),
    "adam-fused": lambda case, net: Adam(net.parameters(), lr=case.adaptive_rate, fused=True),
    "adamw-foreach": lambda case, net: AdamW(net.parameters(), lr=case.adaptive_rate, foreach=True),
    "adamw-fused": lambda case, net: AdamW(net.parameters(), lr=case.adaptive_rate, fused=True),
}


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
def test_the_loss_goes_down(case: Case, rule: Rule, optimizer_name: str) -> None:
    model, data = mlp(), batch(n=32)
    optimizer = OPTIMIZERS[optimizer_name](case, model)
    rule.attach(model, optimizer)
    losses = train(model, optimizer, data, 30)
    assert losses[-1] < 0.7 * losses[0], losses[::6]
    assert all_finite(weights(model))
    assert not rule.health.counts


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_the_loss_of_a_convolutional_network_goes_down(case: Case, rule: Rule, optimizer_name: str) -> None:
    model, data = convnet(), batch((2, 6, 6), n=24)
    optimizer = OPTIMIZERS[optimizer_name](case, model)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    rule.attach(model, optimizer)
    losses = train(model, optimizer, data, 30)
    assert losses[-1] < 0.9 * losses[0], losses[::5]
    assert not rule.health.counts


def test_schedulers_and_parameter_groups(case: Case, rule: Rule) -> None:
    model, data = mlp(), batch(n=32)
    optimizer = SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}], lr=case.rate
    )
    rule.attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    before = weights(model)
    losses = []
    for _ in range(30):
        losses += train(model, optimizer, data, 1)
        scheduler.step()
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw-foreach"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_resuming_is_bit_exact(case: Case, tmp_path: Path, optimizer_name: str, kind: str) -> None:
    build, shape = {"mlp": (mlp, (6,)), "convnet": (convnet, (2, 6, 6))}[kind]
    path = tmp_path / "state.pt"

    def start(seed: int) -> tuple[nn.Module, Optimizer, Rule]:
        model = build(seed=seed)
        optimizer = OPTIMIZERS[optimizer_name](case, model)
        return model, optimizer, case.make().attach(model, optimizer)

    def run(model: nn.Module, optimizer: Optimizer, leg: int) -> list[float]:
        return [train(model, optimizer, batch(shape, seed=20 + 2 * leg + i), 1)[0] for i in range(2)]

    model, optimizer, rule = start(1)
    unbroken = [loss for leg in range(4) for loss in run(model, optimizer, leg)]
    expected = weights(model)
    rule.detach()

    model, optimizer, rule = start(1)
    found = run(model, optimizer, 0)
    for leg in range(1, 4):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        rule.detach()
        model, optimizer, rule = start(100 + leg)
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        found += run(model, optimizer, leg)
    assert found == unbroken
    assert same_bits(weights(model), expected)
    rule.detach()


def test_loading_into_an_attached_model(case: Case, rule: Rule) -> None:
    data, other, model = batch(), mlp(seed=5), mlp()
    rule.attach(model)
    model.load_state_dict(other.state_dict())
    case.make().attach(other)
    for net in (model, other):
        loss_of(net, data).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
