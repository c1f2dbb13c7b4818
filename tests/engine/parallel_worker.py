"""One of two processes that train by other means than plain data parallelism; started by test_parallel.py."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_worker import RULES, describe_error, make_optimizer, see, start_process
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import plywise as pw
from plywise import Rule

SPREAD = ("ProxProp", "BackMatching", "Foof")
PIPED = ("ProxProp", "BackMatching exact", "KFAC", "RLS")
"""The rules that are tried, one of each kind."""

ROWS = 8
STEPS = 4
BATCHES = (12, 23)
"""How many batches each process has under ``join()``."""


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (ROWS,), generator=generator)


def train(net: nn.Module, optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        x, y = make_batch(number)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


# ---- tensor parallelism -----------------------------------------------------------------------------


def spread(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """All but the last layer over both processes."""
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def run_tensor_parallel(name: str, mesh: DeviceMesh) -> dict[str, Any]:
    """The last layer under the rule and the others spread, against the same without spreading."""
    found: dict[str, Any] = {}
    for way in ("after", "before", "alone"):
        rule, model = RULES[name](), make_model()
        if way == "after":
            spread(model, mesh)
        optimizer = make_optimizer(model)
        rule.attach(model, optimizer, exclude=["0", "2"] if way == "alone" else None)
        if way == "before":
            spread(model, mesh)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, range(STEPS))
        found[way] = see(model, optimizer)
        found[f"{way}: said"] = [str(w.message) for w in caught if "processes" in str(w.message)]
        found[f"{way}: rows"] = [(row.name, row.handled, row.reason) for row in rule.explain().rows]
        rule.detach()
    return found


def refuse_tensor_parallel(mesh: DeviceMesh) -> dict[str, Any]:
    """What is said where a rule would do something else than asked."""
    found = {}
    model = make_model()
    rule = pw.NLMS().attach(model, optimizer := make_optimizer(model))
    spread(model, mesh)
    found["optimizer before"] = describe_error(lambda: model(make_batch(0)[0]))
    rule.detach()
    model = spread(make_model()[:3], mesh)
    found["nothing left"] = describe_error(lambda: pw.NLMS().attach(model, make_optimizer(model)))
    model = spread(make_model(), mesh)
    rule = pw.BackMatching(mode="exact").attach(model, optimizer := make_optimizer(model))
    found["altered"] = describe_error(lambda: train(model, optimizer, range(1)))
    rule.detach()
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = fully_shard(spread(make_model(), both["tensor"]), mesh=both["data"])
    rule = pw.ProxProp().attach(model, optimizer := make_optimizer(model))
    train(model, optimizer, range(2))
    found["spread twice"] = [(row.name, row.handled, row.reason) for row in rule.explain().rows]
    rule.detach()
    return found


# ---- join -------------------------------------------------------------------------------------------


def run_join(name: str) -> dict[str, Any]:
    """Unequal numbers of batches; this process's are numbered from 100 times its rank."""
    rule, model, rank = RULES[name](), make_model(), dist.get_rank()
    optimizer = make_optimizer(model)
    rule.attach(model, optimizer)
    net = DistributedDataParallel(model)
    found: dict[str, Any] = {}

    def join() -> None:
        with net.join():
            train(net, optimizer, range(100 * rank, 100 * rank + BATCHES[rank]))

    found["said"] = describe_error(join)
    dist.barrier()  # nobody waits for anybody
    found["end"] = see(model, optimizer)
    rule.detach()
    return found


def run_join_alone(name: str) -> dict[str, Tensor]:
    """The same in one process: a process without batches adds zero."""
    model = make_model()
    optimizer = make_optimizer(model)
    rule = RULES[name]().attach(model, optimizer)
    for number in range(max(BATCHES)):
        optimizer.zero_grad()
        for rank, count in enumerate(BATCHES):
            if number < count:
                x, y = make_batch(100 * rank + number)
                nn.functional.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            parameter.grad /= len(BATCHES)  # type: ignore[operator]
        optimizer.step()
    rule.detach()
    return see(model, optimizer)


# ---- pipelines --------------------------------------------------------------------------------------

PIPELINES: dict[str, tuple[Callable[..., Any], list[list[int]]]] = {
    "1F1B": (lambda stages, n, loss: pipelining.Schedule1F1B(stages[0], n, loss_fn=loss), [[0], [1]]),
    "interleaved 1F1B": (
        lambda stages, n, loss: pipelining.ScheduleInterleaved1F1B(stages, n, loss_fn=loss),
        [[0, 2], [1, 3]],
    ),
    "ZeroBubble": (
        lambda stages, n, loss: pipelining.ScheduleInterleavedZeroBubble(stages, n, loss_fn=loss),
        [[0, 2], [1, 3]],
    ),
    "ZeroBubble V": (
        lambda stages, n, loss: pipelining.ScheduleZBVZeroBubble(stages, n, loss_fn=loss),
        [[0, 3], [1, 2]],
    ),
}
"""Each schedule, and the stages of each process."""

MICRO_BATCHES = 4


def make_stages(count: int, norm: bool = False) -> list[nn.Module]:
    torch.manual_seed(1)
    sizes = [6] + [8] * count
    stages = [
        nn.Sequential(
            nn.Linear(inputs, 8), nn.Tanh(), nn.LayerNorm(8) if norm else nn.Identity(), nn.Linear(8, 8)
        )
        for inputs in sizes[:-1]
    ]
    return [stage.double() for stage in stages]


def run_pipeline(name: str, kind: str) -> dict[str, Any]:
    """Train this process's stages."""
    make_schedule, places = PIPELINES[kind]
    mine = places[dist.get_rank()]
    count = sum(map(len, places))
    stages = make_stages(count)
    part = nn.ModuleList(stages[place] for place in mine)
    optimizer = make_optimizer(part)
    rule = RULES[name]().attach(part, optimizer)
    device = torch.device("cpu")
    made = [pipelining.PipelineStage(stages[place], place, count, device) for place in mine]
    schedule = make_schedule(made, MICRO_BATCHES, nn.functional.cross_entropy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(STEPS):
            optimizer.zero_grad()
            x, y = make_batch(number)
            schedule.step(*([x] if 0 in mine else []), **({"target": y} if count - 1 in mine else {}))
            optimizer.step()
    said = [str(w.message) for w in caught if "plywise" in str(w.filename)]
    found = {"end": see(part, optimizer), "said": said}
    rule.detach()
    return found


def run_pipeline_alone(name: str, kind: str, rank: int) -> dict[str, Tensor]:
    """What one process of a pipeline has at the end, by accumulating micro-batches in one process."""
    places = PIPELINES[kind][1]
    stages = make_stages(sum(map(len, places)))
    parts = [nn.ModuleList(stages[place] for place in mine) for mine in places]
    optimizers = [make_optimizer(part) for part in parts]
    rules: list[Rule] = [
        RULES[name]().attach(part, optimizer) for part, optimizer in zip(parts, optimizers, strict=True)
    ]
    for number in range(STEPS):
        x, y = make_batch(number)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for rows, labels in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
            for stage in stages:
                rows = stage(rows)
            nn.functional.cross_entropy(rows, labels).backward()
        for part, optimizer in zip(parts, optimizers, strict=True):
            for parameter in part.parameters():
                parameter.grad /= MICRO_BATCHES  # type: ignore[operator]
            optimizer.step()
    found = see(parts[rank], optimizers[rank])
    for rule in rules:
        rule.detach()
    return found


def refuse_pipelines(group: dist.ProcessGroup) -> dict[str, str]:
    """What is said of rules that need more than a stage; this process has both stages of its pipeline."""
    found = {}
    for name in ("BackMatching", "BackMatching exact"):
        stages = make_stages(2, norm=True)
        part = nn.ModuleList(stages)
        rule = RULES[name]().attach(part, make_optimizer(part), exclude=nn.LayerNorm)
        device = torch.device("cpu")
        made = [pipelining.PipelineStage(stage, i, 2, device, group=group) for i, stage in enumerate(stages)]
        schedule = pipelining.ScheduleInterleavedZeroBubble(
            made, MICRO_BATCHES, loss_fn=nn.functional.cross_entropy
        )
        x, y = make_batch(0)
        try:
            schedule.step(x, target=y)
            found[name] = "nothing"
        except RuntimeError as error:  # the schedule wraps what its stages raise
            found[name] = f"{error} {error.__cause__}"
        rule.detach()
    return found


def main(rank: int, folder: Path) -> None:
    """Run all of it; leave what this process saw in ``folder/rank.pt``."""
    start_process(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {"tensor parallel refused": refuse_tensor_parallel(mesh)}
    groups = [dist.new_group([other]) for other in range(2)]
    found["pipelines refused"] = refuse_pipelines(groups[rank])
    for name in RULES:
        found[f"{name} join"] = run_join(name)
    for name in SPREAD:
        found[f"{name} tensor parallel"] = run_tensor_parallel(name, mesh)
    for name in PIPED:
        for kind in PIPELINES:
            found[f"{name} {kind}"] = run_pipeline(name, kind)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
