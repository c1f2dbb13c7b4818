"""Tokens flattened on the way are not samples: a network and its flattened twin move equally.

GPT-2's Conv1D multiplies with a view of its input as (N · T, d). All calls of a backward pass have the
samples of the topmost call.
"""

from collections.abc import Callable

import pytest
import torch
from algebra import relative
from torch import Tensor, nn
from torch.optim import SGD

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

RULES: dict[str, Callable[[], pw.Rule]] = {
    "rate mean": lambda: pw.BackMatching(cap=None),
    "rate rank": lambda: pw.BackMatching(scalar="rank", cap=None),
    "rate cauchy": lambda: pw.BackMatching(scalar="cauchy", cap=None),
    "rate sum": lambda: pw.BackMatching(reduction="sum"),
    "exact": lambda: pw.BackMatching("exact"),
    "NLMS sum": lambda: pw.NLMS(reduction="sum"),
    "Consequentialism": pw.Consequentialism,
    "ProxProp": pw.ProxProp,
}


class Conv1D(nn.Module):
    """A linear layer as GPT-2 calls it, with the weight of another one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().T.clone()), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


def make_network(is_flat: bool) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)]
    if is_flat:
        layers[:4] = [Conv1D(layer) if isinstance(layer, nn.Linear) else layer for layer in layers[:4]]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", list(RULES))
def test_a_network_and_its_flattened_twin_move_equally(name: str) -> None:
    ends = []
    for is_flat in (False, True):
        model = make_network(is_flat)
        optimizer = SGD(model.parameters(), lr=1e-2)
        rule = RULES[name]().attach(model, optimizer)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(5, 8, 4, generator=generator)
            loss = model(x).square().sum()
            (loss if "sum" in name else loss / 5).backward()
            optimizer.step()
        rule.detach()
        ends.append(
            [
                p.detach().T if isinstance(m, Conv1D) and p.dim() == 2 else p.detach()
                for m in model
                for p in m.parameters()
            ]
        )
    start = list(make_network(False).parameters())
    for first, plain, flat in zip(start, *ends, strict=True):
        assert relative(flat, plain) < 1e-10
        assert relative(plain, first) > 1e-4


def test_every_call_of_a_pass_has_the_samples_of_the_topmost_one() -> None:
    model, seen = make_network(True), {}
    rule = pw.Backprop().attach(model)
    with rule.observing(lambda call, *_: seen.update({call.name: (call.samples, call.row_count)})):
        for count in (5, 2):
            model(torch.randn(count, 8, 4)).sum().backward()
            assert seen == dict.fromkeys(("0", "2", "4"), (count, 8 * count))
