"""Torch's default device and dtype are for the user's tensors: rules on a model do not depend on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plywise
from plywise import Rule
from plywise.testing.contract.models import copy_weights, have_same_bits

EVERY = {"stats_every": 2, "refresh_every": 2}

RULES: dict[str, Callable[[], Rule]] = {
    "backprop": plywise.Backprop,
    "nlms": plywise.NLMS,
    "proxprop": plywise.ProxProp,
    "proxprop, conjugate gradients": lambda: plywise.ProxProp(solver="cg"),
    "consequentialism": plywise.Consequentialism,
    "back-matching": plywise.BackMatching,
    "exact back-matching": lambda: plywise.BackMatching(mode="exact"),
    "rls": plywise.RLS,
    "foof": lambda: plywise.Foof(**EVERY),
    "kfac": lambda: plywise.KFAC(**EVERY),
    "adabk of low rank": lambda: plywise.AdaBK(rank=3, **EVERY),
    "coordinates": lambda: plywise.Coordinates(**EVERY),
    "coordinates of low rank": lambda: plywise.Coordinates(rank=3, sides="both", **EVERY),
    "gradient amplification": plywise.GradientAmplification,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.wide, self.norm = nn.Conv1d(1, 3, 3, padding=1), nn.Linear(18, 8), nn.LayerNorm(8)
        self.mix, self.last = nn.Bilinear(8, 8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.wide(self.conv(x.unsqueeze(1)).flatten(1))))
        return self.last(self.mix(h, h))


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "device": lambda: torch.device("meta"),  # what is made there has no numbers
    "dtype": default_dtype,
}


def train(rule: Rule, default: str, optimizer: type[torch.optim.Optimizer]) -> dict[str, Tensor]:
    model = Net()
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(20, 6, generator=generator) for _ in range(7)]
    with DEFAULTS[default]():
        steps = optimizer(model.parameters(), lr=0.01)
        rule.attach(model, steps, kinds="all")
        rule.record(every=3)
        for x in batches:
            steps.zero_grad()
            model(x).square().mean().backward()
            steps.step()
        assert str(rule.explain())
        rule.detach()
    return copy_weights(model)


@cache
def train_by_torchs_own(name: str, optimizer: type[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return train(RULES[name](), "none", optimizer)


@pytest.mark.parametrize("default", ["device", "dtype"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("name", RULES)
def test_rules_do_not_depend_on_defaults(
    name: str, optimizer: type[torch.optim.Optimizer], default: str
) -> None:
    assert have_same_bits(train(RULES[name](), default, optimizer), train_by_torchs_own(name, optimizer))
