"""The arms of `pipeline.py`: methods to train with two processes, and the loop that runs them in turns."""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

import plywise as pw
from plywise.local.associated_learning import MakeBridge, wide_bridge
from plywise.pipeline.pipeline import Pipeline

INPUT, WIDTH, LAYERS, CLASSES, BATCH, MICRO = 784, 1024, 4, 10, 256, 4
BATCHES = 30


def make_slim_bridge(shape: torch.Size, code: int) -> nn.Module:
    """Make a bridge of one sigmoid layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), code), nn.Sigmoid())


BRIDGES: dict[str, tuple[int, MakeBridge]] = {
    "the paper's bridge, code 64": (64, wide_bridge),
    "the paper's bridge, code 32": (32, wide_bridge),
    "one layer, code 64": (64, make_slim_bridge),
    "the paper's bridge, code 256": (256, wide_bridge),
}


def draw_batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, INPUT, generator=generator)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    for _ in range(count):
        yield x, y


def make_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def make_learner(bridge: str) -> pw.AssociatedLearning:
    torch.manual_seed(0)
    widths = [INPUT] + [WIDTH] * LAYERS
    body = [nn.Sequential(nn.Linear(a, b), nn.ELU()) for a, b in pairwise(widths)]
    code, make = BRIDGES[bridge]
    blocks = pw.Blocks(body, torch.zeros(2, INPUT))
    return pw.AssociatedLearning(blocks, CLASSES, code=code, bridge=make, optimizer=make_adam)


def make_inference_network(bridge: str) -> nn.Sequential:
    """Return the blocks, the last bridge and the decoders as one network."""
    path = make_learner(bridge).as_module()
    return nn.Sequential(*path.blocks, path.bridge, *path.decoders)


# ---- the arms: each makes a function that trains on BATCHES batches -------------------------------


def make_one_process_al(bridge: str, rank: int) -> Callable[[], None]:
    learner = make_learner(bridge)

    def run() -> None:
        if rank == 0:
            for x, y in draw_batches(BATCHES):
                learner.step(x, y)

    return run


def make_two_learners(bridge: str, rank: int) -> Callable[[], None]:
    """Train one learner per process on half of the batches, to measure what two cores can give at once."""
    learner = make_learner(bridge)

    def run() -> None:
        for x, y in draw_batches(BATCHES // 2):
            learner.step(x, y)

    return run


class PipelineArm:
    """AL in two stages; records the start and end of each batch."""

    def __init__(self, bridge: str, rank: int) -> None:
        learner = make_learner(bridge)
        self.pipeline = Pipeline(learner)
        self.spans: list[tuple[float, float]] = []
        self.started = 0.0
        first = self.pipeline.trainers[0].component
        first.register_forward_pre_hook(self._begin)
        learner.callbacks.append(lambda _: self.spans.append((self.started, time.perf_counter())))

    def _begin(self, *_: object) -> None:
        self.started = time.perf_counter()

    def __call__(self) -> None:
        self.spans.clear()
        self.pipeline.run(draw_batches(BATCHES))


def make_one_process_backprop(bridge: str, rank: int) -> Callable[[], None]:
    model = make_inference_network(bridge)
    optimizer = make_adam(model.parameters())

    def run() -> None:
        if rank == 0:
            for x, y in draw_batches(BATCHES):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    return run


def make_ddp(bridge: str, rank: int) -> Callable[[], None]:
    model = DistributedDataParallel(make_inference_network(bridge))
    optimizer = make_adam(model.parameters())

    def run() -> None:
        for x, y in draw_batches(BATCHES // 2):  # each process has half of the samples
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


class TorchPipeline:
    """A network in stages under one of torch's schedules.

    Args:
        schedule_class: the schedule.
        owners: the process of each stage.
        bridge: name of the bridge, which determines the network.
        rank: rank of this process.
    """

    def __init__(self, schedule_class: Any, owners: tuple[int, ...], bridge: str, rank: int) -> None:
        network, count = make_inference_network(bridge), len(owners)
        edges = [LAYERS // count * number for number in range(count)]
        parts = [
            network[a:b] for a, b in zip(edges, [*edges[1:], None], strict=True)
        ]  # bridge, decoders: last
        mine = [number for number in range(count) if owners[number] == rank]
        stages = [PipelineStage(parts[number], number, count, torch.device("cpu")) for number in mine]
        self.schedule = schedule_class(
            stages if len(stages) > 1 else stages[0], n_microbatches=MICRO, loss_fn=F.cross_entropy
        )
        self.network, self.mine = network, [p for number in mine for p in parts[number].parameters()]
        self.first, self.last = owners[0] == rank, owners[-1] == rank
        self.optimizer = make_adam(self.mine)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Compute the gradients of this process's stages."""
        self.optimizer.zero_grad()
        targets: dict[str, Any] = {"target": y, "losses": []} if self.last else {}
        self.schedule.step(*([x] if self.first else []), **targets)

    def __call__(self) -> None:
        for x, y in draw_batches(BATCHES):
            self.backward(x, y)
            self.optimizer.step()

    def check(self) -> None:
        """Raise an error if a gradient differs from that of the whole network in one process."""
        x, y = next(draw_batches(1))
        self.backward(x, y)
        gradients = [p.grad.clone() for p in self.mine]
        for p in self.network.parameters():
            p.grad = None
        F.cross_entropy(self.network(x), y).backward()
        for p, gradient in zip(self.mine, gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)


SCHEDULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "backprop, 1F1B": (Schedule1F1B, (0, 1)),
    "backprop, GPipe": (ScheduleGPipe, (0, 1)),
    "backprop, zero bubble, interleaved": (ScheduleInterleavedZeroBubble, (0, 1, 0, 1)),
    "backprop, zero bubble, V": (ScheduleZBVZeroBubble, (0, 1, 1, 0)),
}


ARMS: dict[str, Callable[[str, int], Callable[[], None]]] = {
    "AL, one process": make_one_process_al,
    "AL, pipeline": PipelineArm,
    "AL, two learners apart (ceiling)": make_two_learners,
    "backprop, one process": make_one_process_backprop,
    "backprop again (null control)": make_one_process_backprop,
    **{name: partial(TorchPipeline, *SCHEDULES[name]) for name in ("backprop, 1F1B", "backprop, GPipe")},
    "backprop, DDP": make_ddp,
}


SCHEDULE_ARMS: dict[str, Callable[[str, int], Callable[[], None]]] = {
    **{name: ARMS[name] for name in ("backprop, one process", "backprop again (null control)")},
    **{name: partial(TorchPipeline, *how) for name, how in SCHEDULES.items()},
}


def run_process(rank: int, folder: str, schedules: bool, bridge: str, rounds: int) -> None:
    """Run all arms in one of the two processes."""
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    arms = {name: make(bridge, rank) for name, make in (SCHEDULE_ARMS if schedules else ARMS).items()}
    for arm in arms.values():
        if isinstance(arm, TorchPipeline):
            arm.check()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(arms), len(arms)):
            dist.barrier()
            start = time.perf_counter()
            arms[name]()
            dist.barrier()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {"seconds": seconds}
    for arm in arms.values():
        if isinstance(arm, PipelineArm):
            result["spans"] = arm.spans
            arm.pipeline.close()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_pair(schedules: bool, bridge: str, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        pair = [
            context.Process(target=run_process, args=(r, folder, schedules, bridge, rounds)) for r in range(2)
        ]
        for process in pair:
            process.start()
        for process in pair:
            process.join(1800)
        if any(process.exitcode != 0 for process in pair):
            for process in pair:
                process.kill()
            raise SystemExit(f"A process failed: {[process.exitcode for process in pair]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
