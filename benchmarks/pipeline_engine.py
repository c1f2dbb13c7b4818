"""Compare torch's pipelining with plywise's pipeline for local learning.

Two processes train `LocalLoss` on four equal blocks, two in each process: with `plywise.pipeline`, and as two
stages of torch.distributed.pipelining that run forward only. In the second case the forward of a stage takes
the local steps, and sends detached activations and targets to the next stage as a micro-batch. Both use the
same learner, batches and number of steps, and the script checks that both end with the same weights. There
are 200 batches of 64; one call of torch's GPipe schedule takes 20 of them as micro-batches.

    torchrun --nproc-per-node 2 benchmarks/pipeline_engine.py     # writes benchmarks/pipeline_engine.json
"""

import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import plywise as pw
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.local.component import Signal
from plywise.pipeline.groups import join
from plywise.pipeline.pipeline import Pipeline

CLASSES, BLOCKS, WIDTHS = 10, 4, (64, 512)
BATCH, STEPS, CHUNK, REPEATS = 64, 200, 20, 5


def make_learner(width: int) -> pw.LocalLoss:
    """Make a learner that is the same in every process."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(BLOCKS - 1)]
    blocks = pw.Blocks([*layers, nn.Linear(width, CLASSES)], torch.zeros(2, width))
    return pw.LocalLoss(blocks, CLASSES, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))


def make_batches(width: int, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Make batches that are the same in every process."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, width, generator=generator) for _ in range(steps)]
    return [(x, x[:, :CLASSES].argmax(1)) for x in inputs]


class LocalStage(nn.Module):
    """Some components of a learner; its forward takes their training steps."""

    def __init__(self, learner: pw.LocalLoss, first: int, stop: int) -> None:
        super().__init__()
        self.learner, self.part, self.steps = [learner], learner.trainers[first:stop], 0

    def forward(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Train on a batch, and return activations and targets for the next stage."""
        signal = Signal(s, y)
        with torch.enable_grad():
            for trainer in self.part:
                trainer.begin()
                signal, _ = trainer.learn(signal, self.steps)
        self.steps += 1
        return signal.s, y


def run_torch(learner: pw.LocalLoss, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Train on all batches, and return the seconds."""
    rank, half = dist.get_rank(), BLOCKS // 2
    module = LocalStage(learner, rank * half, (rank + 1) * half)
    x, y = batches[0]
    outputs = x if rank == 0 else x.new_zeros(len(x), CLASSES)
    # without these shapes the stage would find them by a forward on empty memory, and train on it
    stage = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=(x, y), output_args=(outputs, y))
    schedule = ScheduleGPipe(stage, CHUNK)
    dist.barrier()
    start = time.perf_counter()
    for first in range(0, len(batches), CHUNK):
        part = batches[first : first + CHUNK]
        x, y = (torch.cat(tensors) for tensors in zip(*part, strict=True))
        schedule.eval(*((x, y) if rank == 0 else ()))
    dist.barrier()
    return time.perf_counter() - start


def run_plywise(learner: pw.LocalLoss, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Train on all batches, and return the seconds."""
    with Pipeline(learner, cuts=[0, BLOCKS // 2]) as pipeline:
        dist.barrier()
        start = time.perf_counter()
        pipeline.run(batches)
        dist.barrier()
        return time.perf_counter() - start


def compare(width: int) -> dict[str, list[int]]:
    """Measure samples per second of both in turns; raise an error if their weights differ at the end."""
    batches = make_batches(width, BATCH, STEPS)
    rates: dict[str, list[int]] = {"plywise": [], "torch": []}
    for _ in range(REPEATS):
        ours, theirs = (make_learner(width) for _ in range(2))
        rates["plywise"].append(round(STEPS * BATCH / run_plywise(ours, batches)))
        rates["torch"].append(round(STEPS * BATCH / run_torch(theirs, batches)))
        half = BLOCKS // 2
        part = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
        for our_trainer, their_trainer in zip(ours.trainers[part], theirs.trainers[part], strict=True):
            for a, b in zip(
                our_trainer.component.parameters(), their_trainer.component.parameters(), strict=True
            ):
                assert torch.equal(a, b), "both must end in the same weights"
    return rates


def main() -> None:
    torch.set_num_threads(1)
    join()
    widths = {str(width): compare(width) for width in WIDTHS}
    if dist.get_rank() == 0:
        for width, rates in widths.items():
            print(width, {name: statistics.median(speeds) for name, speeds in rates.items()})
        result = {"environment": environment(), "samples_per_second": widths}
        write_whole(Path(__file__).with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
