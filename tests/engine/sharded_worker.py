"""One of two processes that train the same models under DistributedDataParallel and under fully_shard.

Started by test_sharded.py, and left by what it saw in ``folder/rank.pt``.
"""

import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import plywise as pw
from plywise import Rule

STEPS = 5
ROWS = 6

RULES: dict[str, Callable[[], Rule]] = {
    "Backprop": pw.Backprop,
    "ProxProp": lambda: pw.ProxProp(tau=2.0),
    "NLMS": pw.NLMS,
    "BackMatching": lambda: pw.BackMatching(measure_every=2, cap=0.05),
    "BackMatching exact": lambda: pw.BackMatching(mode="exact"),
    "Foof": lambda: pw.Foof(stats_every=1, refresh_every=2),
    "KFAC": lambda: pw.KFAC(stats_every=1, refresh_every=2),
    "RLS": pw.RLS,
    "Coordinates": lambda: pw.Coordinates(stats_every=1, refresh_every=2, rank=4),
    "Coordinates of both sides": lambda: pw.Coordinates(
        output_power=0.25, sides="both", stats_every=1, refresh_every=2, keep_norm=False
    ),
}

FEW = ("ProxProp", "BackMatching", "KFAC", "RLS", "Coordinates")
"""One rule of each kind."""

FOLLOWED = ("mlp", "attention")
"""The models that are also sharded after the rule has been attached."""

# ---- models -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """A transformer's layer and a head; norms without weights, for a rule that can leave none alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder.norm1, self.encoder.norm2 = (nn.LayerNorm(8, elementwise_affine=False) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def make_mlp() -> nn.Module:
    """Odd sizes; the second process has nothing of the layer with one output."""
    sizes = (6, 7, 1, 8, 3)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def make_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def make_blocks() -> nn.Module:
    """Two blocks of two layers each: backward meets several layers while one block is whole."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (make_mlp, (6,)),
    "convnet": (make_convnet, (2, 6, 6)),
    "attention": (Attention, (4, 8)),
    "blocks": (make_blocks, (6,)),
}


def make_model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[kind][0]().to(dtype)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard each module that owns parameters apart; a last layer belongs to the root."""
    parts = [m for m in model.children() if any(True for _ in m.parameters())]
    if not any(True for _ in parts[-1].children()):
        del parts[-1]
    for part in parts:
        fully_shard(part, **options)
    return fully_shard(model, **options)


# ---- training ---------------------------------------------------------------------------------------


def make_batch(kind: str, number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """This process's rows of a batch."""
    generator = torch.Generator().manual_seed(100 + 2 * number + dist.get_rank())
    x = torch.randn(ROWS, *MODELS[kind][1], generator=generator, dtype=dtype)
    return x, torch.randint(3, (ROWS,), generator=generator)


def make_optimizer(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(
    model: nn.Module, optimizer: Optimizer, kind: str, steps: range, dtype: torch.dtype = torch.float64
) -> None:
    for number in steps:
        optimizer.zero_grad()
        x, y = make_batch(kind, number, dtype)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def gather(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def see(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All weights, and all that the optimizer keeps, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = gather(parameter)
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = gather(value)
    return found


def describe_error(act: Callable[[], Any]) -> str:
    """What plywise refuses to do."""
    try:
        act()
    except pw.PlywiseError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def attach_after(rule: Rule, model: nn.Module) -> tuple[nn.Module, Optimizer]:
    shard(model)
    optimizer = make_optimizer(model)
    rule.attach(model, optimizer)
    return model, optimizer


def attach_before(rule: Rule, model: nn.Module) -> tuple[nn.Module, Optimizer]:
    """Attach, shard, and then exchange the optimizer's parameters, as accelerate does it."""
    optimizer = make_optimizer(model)
    rule.attach(model, optimizer)
    shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return model, optimizer


def attach_ddp(rule: Rule, model: nn.Module) -> tuple[nn.Module, Optimizer]:
    optimizer = make_optimizer(model)
    rule.attach(model, optimizer)
    return DistributedDataParallel(model), optimizer


WAYS = {"ddp": attach_ddp, "after": attach_after, "before": attach_before}


def run(way: str, kind: str, name: str) -> dict[str, Any]:
    """A few steps of one rule on one model; two backward passes in one of them."""
    rule = RULES[name]()
    net, optimizer = WAYS[way](rule, make_model(kind))
    train(net, optimizer, kind, range(STEPS))
    found: dict[str, Any] = {"end": see(net, optimizer)}
    explanation = rule.explain()
    found["share"] = explanation.share
    found["handled"] = [(row.name, row.handled, row.passes) for row in explanation.rows]
    found["health"] = {f"{who} {what}": n for (who, what), n in rule.health.counts.items()}
    rule.detach()
    return found


def start_process(rank: int, folder: Path) -> None:
    """Meet the other process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)


def main(rank: int, folder: Path) -> None:
    """Run all of it; leave what this process saw in ``folder/rank.pt``."""
    start_process(rank, folder)
    found: dict[str, Any] = {}
    for kind in MODELS:
        for name in RULES:
            for way in WAYS if kind in FOLLOWED else ("ddp", "after"):
                found[f"{way} {kind} {name}"] = run(way, kind, name)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
