"""What an existing engine costs a local pipeline: torch's pipelining against plywise's own wire and watch.

Two processes train `LocalLoss` on four equal blocks, two in each. Once by `plywise.pipeline`; once as two
stages of torch.distributed.pipelining, run forward only, where a stage's forward takes the local steps and
hands detached activations and targets on as a micro-batch. Same learner, same batches, same number of steps;
both end in the same weights, which is checked.

    torchrun --nproc-per-node 2 benchmarks/pipeline_engine.py --width 256 --steps 200
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import plywise as pw
from plywise.local.component import Signal
from plywise.pipeline.groups import join
from plywise.pipeline.pipeline import Pipeline

CLASSES, BLOCKS = 10, 4


def make_learner(width: int) -> pw.LocalLoss:
    """The same learner in every process."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(BLOCKS - 1)]
    blocks = pw.Blocks([*layers, nn.Linear(width, CLASSES)], torch.zeros(2, width))
    return pw.LocalLoss(blocks, CLASSES, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))


def make_batches(width: int, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches that are the same in every process."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, width, generator=generator) for _ in range(steps)]
    return [(x, x[:, :CLASSES].argmax(1)) for x in inputs]


class LocalStage(nn.Module):
    """Some components of a learner whose forward takes their steps."""

    def __init__(self, learner: pw.LocalLoss, first: int, stop: int) -> None:
        super().__init__()
        self.learner, self.part, self.steps = [learner], learner.trainers[first:stop], 0

    def forward(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and targets for the next stage."""
        signal = Signal(s, y)
        with torch.enable_grad():
            for trainer in self.part:
                trainer.begin()
                signal, _ = trainer.learn(signal, self.steps)
        self.steps += 1
        return signal.s, y


def run_torch(learner: pw.LocalLoss, batches: list[tuple[Tensor, Tensor]], chunk: int) -> float:
    """Seconds for all batches, ``chunk`` of them as the micro-batches of one call of the schedule."""
    rank, half = dist.get_rank(), BLOCKS // 2
    module = LocalStage(learner, rank * half, (rank + 1) * half)
    x, y = batches[0]
    outputs = x if rank == 0 else x.new_zeros(len(x), CLASSES)
    # without the shapes the stage would find them by a forward on empty memory, and learn from that
    stage = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=(x, y), output_args=(outputs, y))
    schedule = ScheduleGPipe(stage, chunk)
    dist.barrier()
    start = time.perf_counter()
    for first in range(0, len(batches), chunk):
        part = batches[first : first + chunk]
        x, y = (torch.cat(tensors) for tensors in zip(*part, strict=True))
        schedule.eval(*((x, y) if rank == 0 else ()))
    dist.barrier()
    return time.perf_counter() - start


def run_plywise(learner: pw.LocalLoss, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds for all batches."""
    with Pipeline(learner, cuts=[0, BLOCKS // 2]) as pipeline:
        dist.barrier()
        start = time.perf_counter()
        pipeline.run(batches)
        dist.barrier()
        return time.perf_counter() - start


def main() -> None:
    """Print samples a second of both, the best of some runs."""
    parser = argparse.ArgumentParser()
    for name, default in (("width", 256), ("batch", 64), ("steps", 200), ("chunk", 20), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    join()
    batches = make_batches(args.width, args.batch, args.steps)
    best = {"plywise": float("inf"), "torch.distributed.pipelining": float("inf")}
    for _ in range(args.repeats):
        ours, theirs = (make_learner(args.width) for _ in range(2))
        best["plywise"] = min(best["plywise"], run_plywise(ours, batches))
        name = "torch.distributed.pipelining"
        best[name] = min(best[name], run_torch(theirs, batches, args.chunk))
        half = BLOCKS // 2
        part = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
        for one, other in zip(ours.trainers[part], theirs.trainers[part], strict=True):
            for a, b in zip(one.component.parameters(), other.component.parameters(), strict=True):
                assert torch.equal(a, b), "both must end in the same weights"
    if dist.get_rank() == 0:
        for name, seconds in best.items():
            print(f"{name:30} {args.steps * args.batch / seconds:10.0f} samples/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
