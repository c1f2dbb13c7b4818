"""One of two processes that train replicas under a rule with memory; started by test_memory_ddp.py."""

import copy
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from plywise import Precondition, Rule
from plywise.engine.contract import State as Memory
from plywise.engine.health import SKIPPED, Health
from plywise.testing.contract.ddp_worker import meet
from plywise.testing.contract.memories import KINDS, ROWS, Data, Run
from plywise.testing.contract.models import compute_loss, make_batch, make_mlp

HALF = ROWS // 2
STEPS = 8
SAVED = 5
"""The step before which a run is broken off and resumed: not the first of a cycle of two or three."""

Wrap = Callable[[Rule, nn.Module, Optimizer], nn.Module]


# ---- ways to say which processes train together -----------------------------------------------------


def attach_first(rule: Rule, model: nn.Module, optimizer: Optimizer) -> nn.Module:
    rule.attach(model, optimizer)
    return DistributedDataParallel(model)


def wrap_first(rule: Rule, model: nn.Module, optimizer: Optimizer) -> nn.Module:
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    rule.attach(model, optimizer)
    return net


def attach_wrapper(rule: Rule, model: nn.Module, optimizer: Optimizer) -> nn.Module:
    net = DistributedDataParallel(model)
    rule.attach(net, optimizer)
    return net


def attach_static_graph(rule: Rule, model: nn.Module, optimizer: Optimizer) -> nn.Module:
    rule.attach(model, optimizer)
    return DistributedDataParallel(model, static_graph=True)


def attach_by_hand(rule: Rule, model: nn.Module, optimizer: Optimizer) -> nn.Module:
    rule.attach(model, optimizer, process_group=dist.group.WORLD)
    return model


WAYS: dict[str, Wrap] = {
    "attach, wrap": attach_first,
    "wrap, attach": wrap_first,
    "wrap, attach to the wrapper": attach_wrapper,
    "static graph": attach_static_graph,
    "process_group": attach_by_hand,
}


def average(model: nn.Module) -> None:
    """Average gradients by hand, as DistributedDataParallel does."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def take_half(data: Data, rank: int) -> Data:
    rows = slice(rank * HALF, (rank + 1) * HALF)
    return data[0][rows], data[1][rows]


@dataclass
class Replica(Run):
    """A run of which this process has one half of each batch.

    Attributes:
        net: what is called: the model or its wrapper.
        averages: whether gradients are averaged by hand.
    """

    net: nn.Module = field(kw_only=True)
    averages: bool = False

    @classmethod
    def start(cls, rule: Rule, kind: str, way: str, seed: int = 1) -> "Replica":
        build, shape = KINDS[kind]
        model = build(torch.float64, seed=seed).eval()  # batch norm keeps its own numbers for each rank
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        net = WAYS[way](rule, model, optimizer)
        return cls(model, optimizer, rule, shape, way == "process_group", net=net)

    def make_data(self, number: int) -> Data:
        return take_half(super().make_data(number), dist.get_rank())

    def step_on(self, data: Data) -> None:
        self.optimizer.zero_grad()
        compute_loss(self.net, data).backward()
        if self.averages:
            average(self.model)
        self.optimizer.step()


# ---- what is run for every rule ---------------------------------------------------------------------

TRACES = [*(("mlp", way) for way in WAYS), ("mixed", "attach, wrap"), ("mixed", "wrap, attach")]


def stack_steps(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the tensors that were copied after each step, one stack for each name."""
    names = dict.fromkeys(name for seen in found for name in seen)
    return {name: torch.stack([seen[name] for seen in found if name in seen]) for name in names}


def record_steps(rule: Rule, kind: str, way: str) -> dict[str, Tensor]:
    # DistributedDataParallel makes unequal starts equal
    replica = Replica.start(rule, kind, way, seed=1 if way == "process_group" else 1 + dist.get_rank())
    found = replica.record(range(STEPS))
    rule.detach()
    return stack_steps(found)


def run_resumed(rule: Rule) -> dict[str, Any]:
    """Break off a run; each process continues with what the other process saved."""
    replica = Replica.start(rule, "mixed", "attach, wrap")
    replica.record(range(SAVED))
    saved: list[Any] = [None, None]
    dist.all_gather_object(saved, copy.deepcopy(replica.read_state()))
    rule.detach()
    rank = dist.get_rank()
    replica = Replica.start(rule, "mixed", "attach, wrap", seed=100 + rank)
    replica.load(saved[1 - rank])
    found = {"saved": saved[rank], "end": replica.record(range(SAVED, STEPS))[-1]}
    rule.detach()
    return found


def run_micro_batches(rule: Rule) -> dict[str, Tensor]:
    """Give each row its own backward pass; gradients are averaged in the last pass of a step."""
    replica = Replica.start(rule, "mixed", "attach, wrap")
    found = []
    for number in range(STEPS):
        replica.optimizer.zero_grad()
        x, y = replica.make_data(number)
        with replica.net.no_sync():
            for row in range(HALF - 1):
                (compute_loss(replica.net, (x[row : row + 1], y[row : row + 1])) / HALF).backward()
        (compute_loss(replica.net, (x[HALF - 1 :], y[HALF - 1 :])) / HALF).backward()
        replica.optimizer.step()
        found.append(replica.copy_state())
    rule.detach()
    return stack_steps(found)


class Branched(nn.Module):
    """A layer that only some rows pass through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.branch, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor, rows: list[int]) -> Tensor:
        h = self.trunk(x)
        if rows:
            h = h.index_add(0, torch.tensor(rows), self.branch(x[rows]))
        return self.head(torch.tanh(h))


USERS = [(0,), (1,), (0, 1), (1,), (), (0,), (0,), (0, 1), (1,), (0,)]
"""Which processes' rows pass through the branch, step by step."""


def run_branched(rule: Rule, whole: bool = False) -> dict[str, Tensor]:
    """Train while processes use different layers; with ``whole``, do the same in one process."""
    run = Run.begin(rule, Branched())
    net = run.model if whole else DistributedDataParallel(run.model, find_unused_parameters=True)
    found = []
    for number, ranks in enumerate(USERS):
        x, y = make_batch((6,), ROWS, torch.float64, 40 + number)
        rows = [rank * HALF + row for rank in ranks for row in range(HALF)]
        if not whole:
            x, y = take_half((x, y), dist.get_rank())
            rows = list(range(HALF)) if dist.get_rank() in ranks else []
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(net(x, rows), y).backward()
        run.optimizer.step()
        found.append(run.copy_state())
    rule.detach()
    return stack_steps(found)


def run_poisoned(rule: Rule) -> dict[str, Any]:
    """Put NaN into one process's rows, once."""
    replica = Replica.start(rule, "mlp", "attach, wrap")
    found: dict[str, Any] = {"before": replica.record(range(SAVED))[-1]}
    x, y = replica.make_data(SAVED)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        replica.step_on((x * float("nan") if dist.get_rank() else x, y))
    found["after"], found["skipped"] = replica.copy_state(), rule.health.total(SKIPPED)
    found["end"] = replica.record(range(SAVED, STEPS))[-1]
    rule.detach()
    return found


def run_alone(rule: Rule, group: Any) -> dict[str, Any]:
    """Let several processes train separately: without any group, or each with its own group."""
    model = make_mlp(torch.float64)
    net = model if group is None else DistributedDataParallel(model, process_group=group)
    replica = Replica(**vars(Run.begin(rule, model)), net=net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = replica.record(range(STEPS))[-1]
    warned = [(warning.category.__name__, str(warning.message)) for warning in caught]
    found = {"warnings": warned, "end": end}
    rule.detach()
    return found


# ---- what is run once -------------------------------------------------------------------------------

REFRESHED: list[str] = []


class Counted(Precondition):
    """Keeps a list of the layers that this process has refreshed."""

    def refresh(self, memory: Memory, name: str, health: Health) -> Memory:
        REFRESHED.append(name)
        return super().refresh(memory, name, health)


DEEP = 8


def run_shared_out(whole: bool = False) -> dict[str, Any]:
    """Train equal layers; after the first cycle, each step refreshes half of them."""
    torch.manual_seed(1)
    model = nn.Sequential(*(part for _ in range(DEEP) for part in (nn.Linear(6, 6), nn.Tanh()))).double()
    rule = Counted(left=0.5, right=0.5, stats_every=1, refresh_every=2)
    run = Run.begin(rule, model)
    if not whole:
        run = Replica(**vars(run), net=DistributedDataParallel(model))
    refreshed, found = [], []
    for number in range(STEPS):
        REFRESHED.clear()
        run.step(number)
        refreshed.append(sorted(REFRESHED))
        found.append(run.copy_state())
    rule.detach()
    return {"refreshed": refreshed, "seen": stack_steps(found)}


def main(rank: int, folder: Path, rules: dict[str, Rule]) -> None:
    """Run all of it; leave what this process saw in ``folder/rank.pt``."""
    meet(rank, folder)
    own_group = [dist.new_group([rank]) for rank in range(2)][rank]
    found: dict[str, Any] = {"shared out": run_shared_out()}
    for name, rule in rules.items():
        found[name] = {
            "alone": run_alone(rule, None),
            "a group of its own": run_alone(rule, own_group),
            "traces": {f"{kind} {way}": record_steps(rule, kind, way) for kind, way in TRACES},
            "resumed": run_resumed(rule),
            "micro-batches": run_micro_batches(rule),
            "branched": run_branched(rule),
            "poisoned": run_poisoned(rule),
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_script(rank: int, folder: Path, port: int) -> None:
    """Run ``folder/train.py`` in the place that torchrun would give it; a missing DDP is an error."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    warnings.filterwarnings("error", ".*no DistributedDataParallel was seen")
    sys.argv = ["train.py", str(folder)]
    runpy.run_path(str(folder / "train.py"), run_name="__main__")
