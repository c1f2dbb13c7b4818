"""One of two processes whose statistics are saved and agreed on; started by test_state_processes.py."""

import copy
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from state_runs import OPTIMIZERS, RULES, Run, Stacked, Transposed, Varied
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from plywise import AttachError, BackMatching, StateError

SAVED, STEPS = 4, 8
"""The step before which runs are broken off, and the number of all steps."""

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Replica:
    """A run in data-parallel training: this process has half of each batch."""

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer] = OPTIMIZERS["momentum"],
        seed: int = 1,
        model: nn.Module | None = None,
        rule: str = "foof",
        **options: bool,
    ) -> None:
        self.run = Run(RULES[rule](), optimizer, seed, model=model)
        self.net = DistributedDataParallel(self.run.model, **options)

    @property
    def optimizer(self) -> Optimizer:
        return self.run.optimizer

    def compute_loss(self, number: int, rows: int = 2, **options: Any) -> Tensor:
        """The loss of this process's rows; of none of them, a zero."""
        first = dist.get_rank() * 2
        run, run.model = self.run, self.net
        try:
            if rows == 0:
                return self.net(torch.zeros(0, 6), **options).sum()
            return run.compute_loss(number, slice(first, first + rows), **options)
        finally:
            run.model = self.net.module

    def step(self, number: int, **options: Any) -> None:
        self.optimizer.zero_grad()
        self.compute_loss(number, **options).backward()
        self.optimizer.step()

    def steps(self, *numbers: int) -> "Replica":
        for number in numbers:
            self.step(number)
        return self

    def copy_state(self) -> dict[str, Tensor]:
        return self.run.copy_state()

    def close(self) -> None:
        self.run.rule.detach()


# ---- distributed checkpoints ---------------------------------------------------------------------------


def save_distributed(model: nn.Module, optimizer: Optimizer, folder: Path, options: StateDictOptions) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load_distributed(model: nn.Module, optimizer: Optimizer, folder: Path, options: StateDictOptions) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    parts = {"model": weights, "optimizer": state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(parts, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
        options=options,
    )


FORMS: dict[str, tuple[str, StateDictOptions]] = {
    "nested": ("foof", StateDictOptions()),
    "flattened": ("foof", FLAT),
    "coordinates": ("coordinates", FLAT),
    "back-matching": ("back_matching-mean", FLAT),
}
"""Rules, and the forms in which torch saves them."""


def distributed(folder: Path, name: str) -> dict[str, Any]:
    """Saved by two processes and loaded by two; what one process has saved, loaded by two in two ways."""
    rule, options = FORMS[name]
    unbroken = Replica(rule=rule).steps(*range(SAVED))
    save_distributed(unbroken.net, unbroken.optimizer, folder / f"two {name}", options)
    if dist.get_rank() == 0:
        states = unbroken.run.model.state_dict(), unbroken.optimizer.state_dict()
        torch.save(states, folder / f"two {name}.pt")
    unbroken.steps(*range(SAVED, STEPS))
    resumed = Replica(seed=9, rule=rule)
    resumed.compute_loss(0)
    load_distributed(resumed.net, resumed.optimizer, folder / f"two {name}", options)
    resumed.steps(*range(SAVED, STEPS))
    found = {"unbroken": unbroken.copy_state(), "resumed": resumed.copy_state()}
    unbroken.close()
    resumed.close()
    for way in ("distributed", "plain"):
        other = Replica(seed=9, rule=rule)
        other.compute_loss(0)
        if way == "distributed":
            load_distributed(other.net, other.optimizer, folder / f"one {rule}", StateDictOptions())
        else:
            weights, state = torch.load(folder / f"one {rule}.pt", weights_only=True)
            other.run.model.load_state_dict(weights)
            other.optimizer.load_state_dict(state)
        found[f"one, {way}"] = other.steps(*range(SAVED, STEPS)).copy_state()
        other.close()
    return found


def ask_on_one_process() -> dict[str, Tensor]:
    """Only one process asks for a state dict before the first step: torch steps there, and nobody waits."""
    replica = Replica()
    if dist.get_rank() == 0:
        get_state_dict(replica.run.model, replica.optimizer)
    found = replica.steps(0, 1, 2).copy_state()
    replica.close()
    return found


# ---- ZeroRedundancyOptimizer ---------------------------------------------------------------------------

ZERO: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer_class": SGD, "lr": 0.05, "momentum": 0.9},
    "adam": {"optimizer_class": Adam, "lr": 0.01},
    "sgd": {"optimizer_class": SGD, "lr": 0.05},
}


def zero(folder: Path, name: str) -> dict[str, Any]:
    """A run broken off, saved by one process and gone on with by both; and the same without shards."""

    def make(parameters: Any) -> Optimizer:
        return ZeroRedundancyOptimizer(list(parameters), **ZERO[name])

    run = Replica(make).steps(*range(SAVED))
    run.optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        torch.save((run.run.model.state_dict(), run.optimizer.state_dict()), folder / f"zero {name}.pt")
    dist.barrier()
    weights, state = torch.load(folder / f"zero {name}.pt", weights_only=True)
    resumed = Replica(make, seed=9).steps(7)
    resumed.run.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    whole = Replica(OPTIMIZERS[name]).steps(*range(STEPS))
    for one in (run, resumed):
        one.steps(*range(SAVED, STEPS))
    found = {"unbroken": run.copy_state(), "resumed": resumed.copy_state(), "whole": whole.copy_state()}
    resumed.optimizer.consolidate_state_dict(to=1)  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        state = resumed.optimizer.state_dict()
        found["saved again"] = {
            f"{i}/{k}": torch.as_tensor(v) for i, own in state["state"].items() for k, v in own.items()
        }
    for one in (run, resumed, whole):
        one.close()
    return found


def refuse_zero() -> dict[str, str]:
    """What is said where the statistics cannot be right."""
    said = {}
    model = Varied()
    optimizer = ZeroRedundancyOptimizer(list(model.parameters()), SGD, lr=0.1, overlap_with_ddp=True)
    try:
        RULES["foof"]().attach(model, optimizer)
    except AttachError as error:
        said["overlap"] = str(error)
    optimizer = ZeroRedundancyOptimizer(list(model.parameters()), SGD, lr=0.1)
    try:
        BackMatching().attach(model, optimizer)
    except AttachError as error:
        said["measured values"] = str(error)
    plain = Replica().steps(0)
    state = copy.deepcopy(plain.optimizer.state_dict())
    plain.close()
    sharded = Replica(
        lambda parameters: ZeroRedundancyOptimizer(list(parameters), SGD, lr=0.05, momentum=0.9)
    )
    try:
        sharded.optimizer.load_state_dict(state)
    except StateError as error:
        said["saved without shards"] = str(error)
    sharded.close()
    return said


# ---- layers that are found at different times ------------------------------------------------------------


class Experts(nn.Module):
    """Experts that only some rows pass; that they are linear maps shows in their calls."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList([Transposed(8, 8), Transposed(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, used: tuple[int, ...] = ()) -> Tensor:
        h = torch.tanh(self.trunk(x))
        for number in used:
            h = h + torch.tanh(self.experts[number](h))
        return self.head(h)


USED = [
    ((0,), ()),
    ((0, 2), (1,)),
    ((2,), (1,)),
    ((1,), (0,)),
    ((), (2,)),
    ((0, 1), (1, 0)),
    ((2,), (0,)),
    ((), ()),
]
"""Experts that each of the two processes uses, step by step."""


def experts() -> dict[str, Any]:
    """Each process finds experts in its own order; broken off in the middle, and gone on with."""

    def make(seed: int) -> Replica:
        return Replica(model=Experts(seed), find_unused_parameters=True)

    run, found = make(1), {}
    for number, used in enumerate(USED):
        if number == SAVED:
            resumed = make(9)
            resumed.run.model.load_state_dict(copy.deepcopy(run.run.model.state_dict()))
            resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for one in (run,) if number < SAVED else (run, resumed):
            one.step(number, used=used[dist.get_rank()])
        found[str(number)] = run.copy_state()
    found["resumed"] = resumed.copy_state()
    run.close()
    resumed.close()
    return found


def parts() -> dict[str, Tensor]:
    """Parts of one weight, called in another order on each process."""
    run = Replica(model=Stacked().double(), rule="adabk")
    for number in range(STEPS):
        run.step(number, turned=dist.get_rank() == 1)
    found = run.copy_state()
    run.close()
    return found


def empty() -> dict[str, Tensor]:
    """A process without rows in some steps."""
    run = Replica()
    for number in range(STEPS):
        run.step(number, rows=0 if number % 3 == dist.get_rank() else 2)
    found = run.copy_state()
    run.close()
    return found


def main(rank: int, folder: Path) -> None:
    """Run all of it; leave what this process saw in ``folder/rank.pt``."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=2, timeout=limit)
    found: dict[str, Any] = {
        **{name: distributed(folder, name) for name in FORMS},
        "asked": ask_on_one_process(),
        "zero": {name: zero(folder, name) for name in ZERO},
        "refused": refuse_zero(),
        "experts": experts(),
        "parts": parts(),
        "empty": empty(),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
