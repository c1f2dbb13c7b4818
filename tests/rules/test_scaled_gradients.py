"""Gradients far from 1 give moves of their size: squares of them leave the range of float32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import plywise as pw

EVERY = {"stats_every": 1, "refresh_every": 1}
RULES: dict[str, Callable[[], pw.Rule]] = {
    "ProxProp": pw.ProxProp,
    "ProxProp, flat conjugate gradients": lambda: pw.ProxProp(solver="cg"),
    "Consequentialism": pw.Consequentialism,
    "NLMS": pw.NLMS,
    "RLS": pw.RLS,
    "Foof": lambda: pw.Foof(**EVERY),
    "FeatureWhitening": lambda: pw.FeatureWhitening(**EVERY),
    "BackMatching without a cap": lambda: pw.BackMatching(cap=None),
}


def move(rule: pw.Rule, factor: float) -> list[Tensor]:
    """What the optimizer gets in the second step of a loss times ``factor``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule.attach(model, optimizer)
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        found[:] = [p.grad.double() / factor for p in model.parameters()]

    optimizer.register_step_pre_hook(keep)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).sin().sum() * factor).backward()
        optimizer.step()
    assert not rule.health.counts
    return found


@pytest.mark.parametrize("power", [-80, 80])
@pytest.mark.parametrize("name", RULES)
def test_moves_are_proportional_to_the_loss(name: str, power: int) -> None:
    for small, usual in zip(move(RULES[name](), 2.0**power), move(RULES[name](), 1.0), strict=True):
        torch.testing.assert_close(small, usual, rtol=1e-4, atol=1e-6)


def test_a_cap_holds_for_moves_of_any_size() -> None:
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pw.BackMatching(cap=0.5).attach(model, optimizer)
    before = model.weight.detach().clone()
    (model(torch.randn(12, 6, generator=torch.Generator().manual_seed(1))).sum() * 2.0**80).backward()
    optimizer.step()
    moved = torch.linalg.vector_norm(model.weight - before) / torch.linalg.vector_norm(before)
    torch.testing.assert_close(moved, torch.tensor(0.5))
