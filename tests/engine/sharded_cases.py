"""What may happen in training under fully_shard, on two processes; started by test_sharded.py."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from sharded_worker import (
    FEW,
    ROWS,
    RULES,
    STEPS,
    attach_after,
    describe_error,
    gather,
    make_batch,
    make_model,
    make_optimizer,
    see,
    shard,
    start_process,
    train,
)
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import plywise as pw
from plywise import Rule
from plywise.engine.contract import State
from plywise.engine.health import SKIPPED


def loss_of(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(data[0]), data[1])


def attach_replica(rule: Rule, model: nn.Module) -> tuple[nn.Module, Any]:
    optimizer = make_optimizer(model)
    rule.attach(model, optimizer)
    return DistributedDataParallel(model), optimizer


# ---- micro-batches, clipping, NaN -------------------------------------------------------------------


def run_micro_batches(name: str, way: str) -> dict[str, Tensor]:
    """Each row a backward pass of its own; gradients are averaged in each, or in the last one of a step."""
    rule = RULES[name]()
    net, optimizer = (attach_replica if way == "ddp" else attach_after)(rule, make_model("mlp"))
    for number in range(STEPS):
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        x, y = make_batch("mlp", number)
        for row in range(ROWS):
            data = x[row : row + 1], y[row : row + 1]
            if way == "last":
                net.set_requires_gradient_sync(row == ROWS - 1)  # type: ignore[operator]
                net.set_reshard_after_backward(row == ROWS - 1)  # type: ignore[operator]
            (loss_of(net, data) / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    found = see(net, optimizer)
    rule.detach()
    return found


def run_poisoned(name: str, where: str) -> dict[str, Any]:
    """A NaN on one process alone: in its rows, or in its shard of a gradient."""
    rule = RULES[name]()
    net, optimizer = attach_after(rule, make_model("mlp"))
    train(net, optimizer, "mlp", range(2))
    found: dict[str, Any] = {"before": see(net, optimizer)}
    optimizer.zero_grad()
    x, y = make_batch("mlp", 2)
    if where == "rows" and dist.get_rank() == 1:
        x[0] = float("nan")
    loss_of(net, (x, y)).backward()
    if where == "shard" and dist.get_rank() == 0:
        net.get_parameter("0.weight").grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    found["after"], found["skipped"] = see(net, optimizer), rule.health.total(SKIPPED)
    train(net, optimizer, "mlp", range(3, STEPS))
    found["end"] = see(net, optimizer)
    rule.detach()
    return found


# ---- saving -----------------------------------------------------------------------------------------


def attach_doubled(rule: Rule) -> tuple[nn.Module, Any]:
    """A sharded model that begins somewhere else."""
    model = make_model("attention")
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return attach_after(rule, model)


def run_resumed(name: str, folder: Path) -> dict[str, Any]:
    """A run broken off, whose state torch's distributed checkpoint carries to another model."""
    rule = RULES[name]()
    net, optimizer = attach_after(rule, make_model("attention"))
    train(net, optimizer, "attention", range(3))
    saved = get_state_dict(net, optimizer)
    place = folder / f"{name} checkpoint"
    distributed_checkpoint.save({"model": saved[0], "optimizer": saved[1]}, checkpoint_id=place)
    train(net, optimizer, "attention", range(3, STEPS))
    found = {"straight": see(net, optimizer)}
    rule.detach()
    rule = RULES[name]()
    net, optimizer = attach_doubled(rule)
    template = get_state_dict(net, optimizer)
    state = {"model": template[0], "optimizer": template[1]}
    distributed_checkpoint.load(state, checkpoint_id=place)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(net, optimizer, "attention", range(3, STEPS))
    found["resumed"] = see(net, optimizer)
    rule.detach()
    return found


def run_resumed_from_replica(name: str) -> dict[str, Any]:
    """A run begun under DistributedDataParallel that goes on under fully_shard."""
    rule = RULES[name]()
    net, optimizer = attach_replica(rule, make_model("attention"))
    train(net, optimizer, "attention", range(3))
    options = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    train(net, optimizer, "attention", range(3, STEPS))
    found = {"straight": see(net, optimizer)}
    rule.detach()
    rule = RULES[name]()
    net, optimizer = attach_doubled(rule)
    set_state_dict(net, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    train(net, optimizer, "attention", range(3, STEPS))
    found["resumed"] = see(net, optimizer)
    rule.detach()
    return found


# ---- options of fully_shard -------------------------------------------------------------------------


def place_shard(parameter: nn.Parameter) -> Shard | None:
    """Along the last dimension, where it can be halved."""
    return Shard(parameter.dim() - 1) if parameter.shape[-1] % 2 == 0 else None


def checkpoint_encoder(model: nn.Module) -> None:
    encoder = cast(nn.Module, model.encoder)
    forward = encoder.forward
    encoder.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]


def run_options(name: str) -> dict[str, dict[str, Tensor]]:
    """Weights after a few steps with options that change nothing."""
    found = {}
    for option in ("plain", "evaluated before attach", "last dimension", "checkpoint"):
        rule, model = RULES[name](), make_model("attention")
        if option == "checkpoint":
            checkpoint_encoder(model)
        shard(model, **{"shard_placement_fn": place_shard} if option == "last dimension" else {})
        optimizer = make_optimizer(model)
        if option == "evaluated before attach":  # the root's parameters stay whole after that
            with torch.no_grad():
                model(make_batch("attention", 0)[0])
        rule.attach(model, optimizer)
        train(model, optimizer, "attention", range(STEPS))
        found[option] = see(model, optimizer)
        rule.detach()
    return found


def run_mixed_precision(name: str) -> dict[str, dict[str, Tensor]]:
    """Forward and backward in bfloat16, everything else in float32."""
    found = {}
    for option in ("plain", "mixed"):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        rule, model = RULES[name](), make_model("mlp", torch.float32)
        shard(model, **{"mp_policy": policy} if option == "mixed" else {})
        optimizer = make_optimizer(model)
        rule.attach(model, optimizer)
        train(model, optimizer, "mlp", range(STEPS), torch.float32)
        found[option] = see(model, optimizer)
        rule.detach()
    return found


def run_all_kinds(name: str, way: str) -> dict[str, Any]:
    """Embeddings and norms, whose weights are stored in other layouts."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(10, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    rule = RULES[name]()
    net = DistributedDataParallel(model) if way == "ddp" else shard(model)
    optimizer = make_optimizer(net)
    rule.attach(net, optimizer, kinds="all")
    for number in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(2 * number + dist.get_rank())
        x, y = (
            torch.randint(10, (ROWS, 4), generator=generator),
            torch.randint(3, (ROWS,), generator=generator),
        )
        loss_of(net, (x, y)).backward()
        optimizer.step()
    found = {"end": see(net, optimizer), "share": rule.explain().share}
    rule.detach()
    return found


# ---- what is shared out -----------------------------------------------------------------------------

FINISHED: list[int] = []


class Counted(pw.KFAC):
    """Keeps a list of the sizes of the gradients that this process has turned into updates."""

    def finish_stacked(self, memory: State, gradients: Tensor) -> tuple[Tensor, State]:
        FINISHED.extend(gradient.numel() for gradient in gradients)
        return super().finish_stacked(memory, gradients)


def run_shared_out() -> list[int]:
    """Eight equal layers; how large the gradients were that this process has turned into updates."""
    torch.manual_seed(1)
    model = nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(6, 6), nn.Tanh()))).double()
    rule = Counted(stats_every=1, refresh_every=1)
    net, optimizer = attach_after(rule, model)
    FINISHED.clear()
    train(net, optimizer, "mlp", range(1))
    rule.detach()
    return list(FINISHED)


def run_turned_adamw(way: str) -> dict[str, Tensor]:
    """Second moments in turned coordinates, from the first step on, and a decoupled decay."""
    rule, model = pw.Coordinates(stats_every=2, refresh_every=2), make_model("convnet")
    net = DistributedDataParallel(model) if way == "ddp" else shard(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    rule.attach(net, optimizer)
    train(net, optimizer, "convnet", range(STEPS))
    found = see(net, optimizer)
    rule.detach()
    return {**found, **{f"{name}, detached": value for name, value in see(net, optimizer).items()}}


# ---- what is refused or left alone ------------------------------------------------------------------


def refuse_replaced(name: str, is_kept: bool) -> str:
    """What is said of an optimizer from before fully_shard, whether or not it still exists."""
    rule, model = RULES[name](), make_model("mlp")
    old = make_optimizer(model)
    rule.attach(model, old)
    if not is_kept:
        del old
    shard(model)
    said = describe_error(lambda: model(make_batch("mlp", 0)[0]))
    rule.detach()
    return said


def refuse_two_dimensions(name: str) -> str:
    """What is said of a mesh of replicas and shards."""
    rule, model = RULES[name](), make_model("mlp")
    shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
    return describe_error(lambda: rule.attach(model, make_optimizer(model)))


def refuse_other_processes() -> str:
    """What is said where statistics would be those of one process, and weights belong to two."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    rule, model = pw.RLS(), shard(make_model("mlp"))
    rule.attach(model, optimizer := make_optimizer(model), process_group=groups[dist.get_rank()])
    said = describe_error(lambda: train(model, optimizer, "mlp", range(1)))
    rule.detach()
    return said


def run_refusals() -> dict[str, Any]:
    """What is said where a rule would do something else than asked."""
    found: dict[str, Any] = {"other processes": refuse_other_processes()}
    for name in ("ProxProp", "Foof"):
        found[f"{name}: optimizer before, kept"] = refuse_replaced(name, True)
        found[f"{name}: optimizer before, gone"] = refuse_replaced(name, False)
        found[f"{name}: two dimensions"] = refuse_two_dimensions(name)
    rule, model = pw.NLMS(), make_model("mlp")
    shard(model)
    loss = loss_of(model, make_batch("mlp", 0))
    rule.attach(model, make_optimizer(model))
    found["forward before attach"] = describe_error(loss.backward)
    rule.detach()
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    matching = pw.BackMatching(mode="exact")
    matching.attach(shard(layers), make_optimizer(layers), exclude=nn.LayerNorm)
    found["altered"] = describe_error(lambda: loss_of(layers, make_batch("mlp", 0)).backward())
    matching.detach()
    return found


def run_detached() -> dict[str, Any]:
    """Training goes on plainly after detach; a rule without optimizer acts on each process's batch."""
    rule = pw.NLMS()
    net, optimizer = attach_after(rule, make_model("mlp"))
    train(net, optimizer, "mlp", range(2))
    rule.detach()
    model = make_model("mlp")
    model.load_state_dict({name: gather(p) for name, p in net.named_parameters()})
    other = make_optimizer(shard(model))
    optimizer = make_optimizer(net)
    train(net, optimizer, "mlp", range(2, STEPS))
    train(model, other, "mlp", range(2, STEPS))
    found = {"detached": see(net, optimizer), "plain": see(model, other)}
    for way in ("ddp", "sharded"):
        rule, model = pw.NLMS(), make_model("mlp")
        rule.attach(model)
        net = DistributedDataParallel(model) if way == "ddp" else shard(model)
        optimizer = make_optimizer(net)
        train(net, optimizer, "mlp", range(STEPS))
        found[f"no optimizer, {way}"] = see(net, optimizer)
        rule.detach()
    return found


def run_without_rows(name: str, way: str) -> dict[str, Tensor]:
    """Every other batch of the second process is empty."""
    rule = RULES[name]()
    net, optimizer = (attach_replica if way == "ddp" else attach_after)(rule, make_model("mlp"))
    for number in range(STEPS):
        optimizer.zero_grad()
        x, y = make_batch("mlp", number)
        rows = 0 if number % 2 and dist.get_rank() else ROWS
        nn.functional.cross_entropy(net(x[:rows]), y[:rows], reduction="sum").mul(0.1).backward()
        optimizer.step()
    found = see(net, optimizer)
    rule.detach()
    return found


def run_rule(name: str, folder: Path) -> dict[str, Any]:
    """Whatever may happen to one rule."""
    found: dict[str, Any] = {
        "options": run_options(name),
        "mixed precision": run_mixed_precision(name),
        "resumed": run_resumed(name, folder),
    }
    if name != "BackMatching":  # torch cannot load lists of another length than it finds
        found["resumed from replica"] = run_resumed_from_replica(name)
    for way in ("ddp", "each", "last"):
        found[f"micro-batches {way}"] = run_micro_batches(name, way)
    for where in ("rows", "shard"):
        found[f"poisoned {where}"] = run_poisoned(name, where)
    for way in ("ddp", "sharded"):
        found[f"all kinds {way}"] = run_all_kinds(name, way)
        found[f"without rows {way}"] = run_without_rows(name, way)
    return found


def main(rank: int, folder: Path) -> None:
    """Run all of it; leave what this process saw in ``folder/rank.pt``."""
    start_process(rank, folder)
    found: dict[str, Any] = {"shared out": run_shared_out(), "refused": run_refusals(), **run_detached()}
    found |= {f"turned adamw {way}": run_turned_adamw(way) for way in ("ddp", "sharded")}
    for name in FEW:
        found.update({f"{name} {case}": seen for case, seen in run_rule(name, folder).items()})
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
