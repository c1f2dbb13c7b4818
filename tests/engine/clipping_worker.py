"""One of two processes that train with a cap; started by test_clipping.py."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import plywise as pw

CAP, RATE = 0.01, 0.5


class Skipping(nn.Module):
    """A network with a layer, and a bare weight, that some passes leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bare, self.shift = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, is_long: bool) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.addmm(self.shift, h + self.block(h), self.bare) if is_long else h)


def main(rank: int, folder: Path, mode: str) -> None:
    """Take one step; leave the weights before and after it in ``folder/rank.pt``."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)
    model = Skipping()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rule = pw.BackMatching(mode, cap=CAP).attach(model, optimizer)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(rank))
    (100 * wrapped(x, rank == 0).square().mean()).backward()
    optimizer.step()
    rule.detach()
    torch.save({"before": before, "after": model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()
