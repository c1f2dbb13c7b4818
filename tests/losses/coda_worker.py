"""What each of two workers does; started by test_coda.py."""

import math
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plywise import PlywiseError
from plywise.data.digits import load_digits
from plywise.losses.auc_margin import AUCMargin
from plywise.losses.coda import CoDA

SHARE = 0.25
PLAN = {"lr": 0.05, "gamma": 20.0, "first_stage": 6}
GROWING = (3 + 2, 3 + 6 + 9 + 2, 3 + 6 + 9 + 5)
"""Steps after which workers with ``every=2`` and then 5 are looked at; after the second they differ."""

STEPS = 3 + 6 + 9 + 18 + 27 + 2  # two whole stages, and the beginning of a third


def network(seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 1)).double()


def batch(number: int, n: int = 16) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    y = torch.rand(n, generator=random) < SHARE
    x = torch.randn(n, 4, generator=random, dtype=torch.float64)
    return x + 0.7 * y[:, None], y


def share_of(numbers: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """The batches of these workers at one step, joined."""
    parts = [batch(1000 * number + step) for number in numbers]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def values(coda: CoDA) -> dict[str, Tensor]:
    """A copy of all that is trained or kept."""
    state = {**coda.model.state_dict(), **coda.loss.state_dict()}
    return {name: value.detach().clone() for name, value in state.items()}


def trained(numbers: tuple[int, ...], steps: int = STEPS, norm: bool = False, **plan: Any) -> CoDA:
    """A training on the batches of these workers."""
    loss = AUCMargin(positive_share=SHARE, floor=-math.inf).double()
    coda = CoDA(network(norm=norm), loss, **{**PLAN, "timeout_s": 30.0, **plan})
    for step in range(steps):
        coda.step(*share_of(numbers, step))
    return coda


def main(rank: int, folder: Path) -> None:
    """Do all jobs; leave what this rank saw in ``folder/rank.pt``."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)
    seen: dict[str, Any] = {
        "every 1": values(trained((rank,), every=1)),
        "every 3": values(trained((rank,), every=3)),
        "every grows": [values(trained((rank,), steps, every=2, every_growth=2.5)) for steps in GROWING],
        "same data": values(trained((0,), every=3)),
        "averaged": values(trained((rank,), 3 + 6, every=3, norm=True, first_stage=30)),
        "between": values(trained((rank,), 3 + 7, every=3, norm=True, first_stage=30)),
        "start": values(CoDA(network(seed=rank), AUCMargin().double(), timeout_s=30.0)),
        "digits": digits(rank),
        "other plan": refusal(lambda: trained((rank,), 0, every=3 + rank)),
        "late": late(rank),
    }
    lost = AUCMargin(positive_share=SHARE).double()
    coda = CoDA(network(), lost, **PLAN, every=1, timeout_s=30.0)
    if rank == 1:
        torch.save(seen, folder / "1.pt")
        os.kill(os.getpid(), signal.SIGKILL)
    seen["killed"] = refusal(lambda: [coda.step(*share_of((0,), step)) for step in range(4)])
    torch.save(seen, folder / "0.pt")


def refusal(job: Any) -> str:
    try:
        job()
    except PlywiseError as error:
        return str(error)
    return ""


def late(rank: int) -> str:
    """One worker stops calling `step`; the other must not wait for ever."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    answer = refusal(lambda: trained((rank,), 3 + 2 + 2 * (1 - rank), every=3, group=group, timeout_s=1.0))
    dist.barrier()
    return answer


def digits(rank: int) -> dict[str, Tensor]:
    """Each worker has half of the digits, of which eights are rare."""
    train, _, test = load_digits()
    kept = (train.y != 8) | ((train.y == 8).cumsum(0) <= 30)
    x, y = train.x[kept][rank::2], train.y[kept][rank::2] == 8
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    loss = AUCMargin(positive_share=30 / int(kept.sum()), floor=-math.inf)
    coda = CoDA(model, loss, lr=0.1, gamma=200.0, first_stage=60, every=8, timeout_s=30.0)
    random = torch.Generator().manual_seed(rank)
    before = model(test.x).detach().flatten()
    while coda.stage < 3:
        rows = torch.randint(len(y), (64,), generator=random)
        coda.step(x[rows], y[rows])
    return {"before": before, "after": model(test.x).detach().flatten(), "eights": test.y == 8}
