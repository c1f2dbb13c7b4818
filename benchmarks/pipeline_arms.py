"""The arms of `pipeline.py`: methods to train with two processes, and the loop that runs them in turns."""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from local_memory import (
    CHARACTERS,
    CONTEXT,
    TOKEN,
    TOKEN_BATCH,
    TOKEN_BLOCKS,
    draw_characters,
    make_token_blocks,
)
from plywise.local.associated_learning import MakeBridge, wide_bridge
from plywise.local.next_token import linear_head
from plywise.pipeline.pipeline import Pipeline

INPUT, WIDTH, LAYERS, CLASSES, BATCH, MICRO = 784, 1024, 4, 10, 256, 4
BATCHES, TOKEN_BATCHES = 30, 15


@dataclass(frozen=True)
class Problem:
    """What two processes train.

    Attributes:
        make_learner: makes the local learner.
        make_network: makes the network that it predicts with: first the parts that stages share, then those
            of the last stage.
        layers: the number of parts that stages share.
        draw: yields so many batches.
        loss: of the network's output and the targets.
        batches: how many batches a run takes.
    """

    make_learner: Callable[[], pw.Learner]
    make_network: Callable[[], nn.Sequential]
    layers: int
    draw: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: int


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


def draw_token_batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    batch = draw_characters(TOKEN_BATCH)
    for _ in range(count):
        yield batch


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


def make_token_learner() -> pw.LocalNextToken:
    """Return a learner of the next character with a transformer block in each component."""
    blocks = pw.Blocks(make_token_blocks(), torch.zeros(2, CONTEXT, dtype=torch.long))
    return pw.LocalNextToken(blocks, CHARACTERS, optimizer=make_adam)


def make_token_network() -> nn.Sequential:
    """Return the blocks and the last head as one network."""
    return nn.Sequential(*make_token_blocks(), linear_head(TOKEN, CHARACTERS))


def compute_token_loss(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def make_image_problem(bridge: str) -> Problem:
    """Return the problem of Associated Learning with this bridge."""
    learner, network = partial(make_learner, bridge), partial(make_inference_network, bridge)
    return Problem(learner, network, LAYERS, draw_batches, F.cross_entropy, BATCHES)


TOKENS = Problem(
    make_token_learner,
    make_token_network,
    TOKEN_BLOCKS,
    draw_token_batches,
    compute_token_loss,
    TOKEN_BATCHES,
)


# ---- the arms: each makes a function that trains on all batches of a run --------------------------


def make_one_process_learner(problem: Problem, rank: int) -> Callable[[], None]:
    learner = problem.make_learner()

    def run() -> None:
        if rank == 0:
            for x, y in problem.draw(problem.batches):
                learner.step(x, y)

    return run


def make_two_learners(problem: Problem, rank: int) -> Callable[[], None]:
    """Train one learner per process on half of the batches, to measure what two cores can give at once."""
    learner = problem.make_learner()

    def run() -> None:
        for x, y in problem.draw(count_half(problem, rank)):
            learner.step(x, y)

    return run


def count_half(problem: Problem, rank: int) -> int:
    """Count the batches of a process where two share them."""
    return (problem.batches + 1 - rank) // 2


class PipelineArm:
    """The learner in two stages; records the start and end of each batch."""

    def __init__(self, problem: Problem, rank: int) -> None:
        learner = problem.make_learner()
        self.problem, self.pipeline = problem, Pipeline(learner)
        self.spans: list[tuple[float, float]] = []
        self.started = 0.0
        first = self.pipeline.trainers[0].component
        first.register_forward_pre_hook(self._begin)
        learner.callbacks.append(lambda _: self.spans.append((self.started, time.perf_counter())))

    def _begin(self, *_: object) -> None:
        self.started = time.perf_counter()

    def __call__(self) -> None:
        self.spans.clear()
        self.pipeline.run(self.problem.draw(self.problem.batches))


def make_one_process_backprop(problem: Problem, rank: int) -> Callable[[], None]:
    model = problem.make_network()
    optimizer = make_adam(model.parameters())

    def run() -> None:
        if rank == 0:
            train(problem, model, optimizer, problem.batches)

    return run


def make_ddp(problem: Problem, rank: int) -> Callable[[], None]:
    """Train with a whole batch in each process: each has half of the samples."""
    model = DistributedDataParallel(problem.make_network())
    optimizer = make_adam(model.parameters())
    return partial(train, problem, model, optimizer, problem.batches // 2)


def train(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, batches: int) -> None:
    for x, y in problem.draw(batches):
        optimizer.zero_grad()
        problem.loss(model(x), y).backward()
        optimizer.step()


class TorchPipeline:
    """A network in stages under one of torch's schedules.

    Args:
        schedule_class: the schedule.
        owners: the process of each stage.
        problem: the network and its batches.
        rank: rank of this process.
    """

    def __init__(self, schedule_class: Any, owners: tuple[int, ...], problem: Problem, rank: int) -> None:
        network, count = problem.make_network(), len(owners)
        edges = [problem.layers // count * number for number in range(count)]
        parts = [network[a:b] for a, b in zip(edges, [*edges[1:], None], strict=True)]
        mine = [number for number in range(count) if owners[number] == rank]
        stages = [PipelineStage(parts[number], number, count, torch.device("cpu")) for number in mine]
        self.schedule = schedule_class(
            stages if len(stages) > 1 else stages[0], n_microbatches=MICRO, loss_fn=problem.loss
        )
        self.problem = problem
        self.network, self.mine = network, [p for number in mine for p in parts[number].parameters()]
        self.first, self.last = owners[0] == rank, owners[-1] == rank
        self.optimizer = make_adam(self.mine)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Compute the gradients of this process's stages."""
        self.optimizer.zero_grad()
        targets: dict[str, Any] = {"target": y, "losses": []} if self.last else {}
        self.schedule.step(*([x] if self.first else []), **targets)

    def __call__(self) -> None:
        for x, y in self.problem.draw(self.problem.batches):
            self.backward(x, y)
            self.optimizer.step()

    def check(self) -> None:
        """Raise an error if a gradient differs from that of the whole network in one process."""
        x, y = next(self.problem.draw(1))
        self.backward(x, y)
        gradients = [p.grad.clone() for p in self.mine]
        for p in self.network.parameters():
            p.grad = None
        self.problem.loss(self.network(x), y).backward()
        for p, gradient in zip(self.mine, gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)


SCHEDULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "backprop, 1F1B": (Schedule1F1B, (0, 1)),
    "backprop, GPipe": (ScheduleGPipe, (0, 1)),
    "backprop, zero bubble, interleaved": (ScheduleInterleavedZeroBubble, (0, 1, 0, 1)),
    "backprop, zero bubble, V": (ScheduleZBVZeroBubble, (0, 1, 1, 0)),
}

MakeArm = Callable[[Problem, int], Callable[[], None]]


def list_arms(learner: str) -> dict[str, MakeArm]:
    """List the methods that a learner of this name is compared with, and the learner in three ways."""
    return {
        f"{learner}, one process": make_one_process_learner,
        f"{learner}, pipeline": PipelineArm,
        f"{learner}, two learners apart (ceiling)": make_two_learners,
        "backprop, one process": make_one_process_backprop,
        "backprop again (null control)": make_one_process_backprop,
        **{name: partial(TorchPipeline, *SCHEDULES[name]) for name in ("backprop, 1F1B", "backprop, GPipe")},
        "backprop, DDP": make_ddp,
    }


AL, NEXT_TOKEN = "AL", "next token"
ARMS, TOKEN_ARMS = list_arms(AL), list_arms(NEXT_TOKEN)
SCHEDULE_ARMS: dict[str, MakeArm] = {
    **{name: ARMS[name] for name in ("backprop, one process", "backprop again (null control)")},
    **{name: partial(TorchPipeline, *how) for name, how in SCHEDULES.items()},
}


def run_process(rank: int, folder: str, arms: Mapping[str, MakeArm], problem: Problem, rounds: int) -> None:
    """Run all arms in one of the two processes."""
    torch.set_num_threads(1)
    # Adam through saturated layers meets numbers below float32's normal range, which take ten times as long:
    # backpropagation in one process would train three times as slowly, and the pipeline would look quicker
    torch.set_flush_denormal(True)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    ready = {name: make(problem, rank) for name, make in arms.items()}
    for arm in ready.values():
        if isinstance(arm, TorchPipeline):
            arm.check()
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(ready), len(ready)):
            dist.barrier()
            start = time.perf_counter()
            ready[name]()
            dist.barrier()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {"seconds": seconds}
    for arm in ready.values():
        if isinstance(arm, PipelineArm):
            result["spans"] = arm.spans
            arm.pipeline.close()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_pair(arms: Mapping[str, MakeArm], problem: Problem, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        pair = [
            context.Process(target=run_process, args=(rank, folder, arms, problem, rounds))
            for rank in range(2)
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
