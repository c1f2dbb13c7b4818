"""One of two processes of a data-parallel run; started by test_ddp.py."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plywise import Rule
from plywise.engine.health import SKIPPED
from plywise.testing.contract.models import (
    compute_loss,
    copy_gradients,
    copy_weights,
    make_batch,
    make_convnet,
    make_mlp,
    train,
)

SHAPES = {"mlp": (6,), "convnet": (2, 6, 6)}
PLANS = [("mlp", "attach"), ("convnet", "wrap")]


def build(kind: str, seed: int = 1) -> nn.Module:
    # batch norm keeps its own numbers for each rank, with or without us
    return make_mlp(seed=seed) if kind == "mlp" else make_convnet(seed=seed).eval()


def meet(rank: int, folder: Path) -> None:
    """Let this process meet the other one, by a file in the folder."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)


def main(rank: int, folder: Path, rules: dict[str, Rule]) -> None:
    """Run every rule; leave what this rank saw in ``folder/rank.pt``."""
    meet(rank, folder)
    results: dict[str, Any] = {}
    for name, rule in rules.items():
        for kind, first in PLANS:
            results[f"{name} {kind} {first}"] = run_rule(rule, kind, first, rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_rule(rule: Rule, kind: str, first: str, rank: int) -> dict[str, Any]:
    """Run three steps of one rule, then one with a NaN on the second rank only."""
    model = build(kind, seed=1 + rank)  # DDP makes them equal
    wrapped = DistributedDataParallel(model) if first == "wrap" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rule.attach(model, optimizer)
    wrapped = wrapped or DistributedDataParallel(model)
    seen: dict[str, Any] = {"start": copy_weights(model), "rows": str(rule.explain())}
    compute_loss(wrapped, make_batch(SHAPES[kind], seed=30 + rank)).backward()
    seen["averaged"] = copy_gradients(model)
    for step in range(3):
        train(wrapped, optimizer, make_batch(SHAPES[kind], seed=40 + 2 * step + rank), 1)
    seen["weights"] = copy_weights(model)
    x, y = make_batch(SHAPES[kind])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        train(wrapped, optimizer, (x * float("nan") if rank else x, y), 1)
    seen["after NaN"], seen["skipped"] = copy_weights(model), rule.health.total(SKIPPED)
    train(wrapped, optimizer, make_batch(SHAPES[kind], seed=50 + rank), 1)
    seen["at the end"] = copy_weights(model)
    rule.detach()
    # what this rank alone would do
    alone = build(kind)
    alone.load_state_dict(seen["start"])
    rule.attach(alone, torch.optim.SGD(alone.parameters(), lr=0.01))
    compute_loss(alone, make_batch(SHAPES[kind], seed=30 + rank)).backward()
    seen["own"] = copy_gradients(alone)
    rule.detach()
    return seen
