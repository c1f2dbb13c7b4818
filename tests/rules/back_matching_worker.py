"""One of two processes that train with back-matching's rate; started by test_back_matching_processes.py."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from backward_scales import collect_scales, read_kept
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import plywise as pw

STEPS = 7


class Skipping(nn.Module):
    """A network with a block that some passes leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, is_long: bool) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + self.block(h) if is_long else h)


def main(rank: int, folder: Path) -> None:
    """Train; leave each step's values, the kept ones and the weights in ``folder/rank.pt``."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)
    model = Skipping()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    rule = pw.BackMatching(measure_every=2, cap=None).attach(model, optimizer)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    steps: list[Any] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + rank)
        with collect_scales(rule) as scales:
            wrapped(torch.randn(12, 6, generator=generator), step > 2 or rank == 0).square().mean().backward()
        optimizer.step()
        steps.append([scales, read_kept(optimizer.state[model.first.weight])])
    torch.save({"steps": steps, "weights": model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()
