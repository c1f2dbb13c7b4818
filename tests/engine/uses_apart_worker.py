"""One of two replicas of a model whose weights are computed or used in several ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded_worker import start_process
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import plywise as pw

RULES: dict[str, Callable[[], pw.Rule]] = {
    "foof": lambda: pw.Foof(rank=None, sample=1, stats_every=1, refresh_every=1),
    "kfac": lambda: pw.KFAC(stats_every=1, refresh_every=1),
    "no kept norm": lambda: pw.Precondition(
        left=0.5, right=0.5, keep_norm=False, stats_every=1, refresh_every=1
    ),
    "rls": pw.RLS,
}
REPLICATED = ("foof", "kfac", "no kept norm")
STEPS = 4


class Mixed(nn.Module):
    """A weight norm, then a layer whose weight is used from both sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 4))
        self.both = nn.Linear(4, 5)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.both(torch.tanh(self.normed(x))))
        return F.linear(hidden, self.both.weight.t(), self.bias)


def make_batch(number: int) -> Tensor:
    """Both halves of the first batch are alike: then each process alone learns what both learn."""
    generator = torch.Generator().manual_seed(number)
    half = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    other = half if number == 0 else torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return torch.cat([half, other])


def train(name: str, rows: slice, wrap: Callable[[nn.Module], object] = lambda model: model) -> list[Tensor]:
    """The weights after each step."""
    model = Mixed()
    if wrap is fully_shard:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = RULES[name]().attach(model, optimizer)
    net: Any = model if wrap is fully_shard else wrap(model)
    seen = []
    for number in range(STEPS):
        optimizer.zero_grad()
        net(make_batch(number)[rows]).sin().square().mean().backward()
        optimizer.step()
        parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        seen.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert not rule.health.counts
    return seen


def main(rank: int, folder: Path) -> None:
    """Train each rule on this process's half of the rows."""
    start_process(rank, folder)
    torch.set_default_dtype(torch.float64)
    rows = slice(4 * rank, 4 * rank + 4)
    seen = {name: train(name, rows, DistributedDataParallel) for name in RULES}
    seen |= {f"{name} sharded": train(name, rows, fully_shard) for name in RULES}
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()
