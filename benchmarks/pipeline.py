"""Throughput of Associated Learning as a pipeline of two processes, against every other way to use them.

    python benchmarks/pipeline.py                   # writes benchmarks/pipeline.json and pipeline.svg

784 → 4 hidden layers of 1024 → 10, batch 256, Adam, one thread a process, gloo. All arms take turns in one
run of two processes, in shuffled order; samples a second of whole runs of batches, filling and draining
included, medians of the rounds. An arm of one process runs in the first while the other sleeps.

- "AL": the learner's four components, in one process or two stages, with each of several bridges; and two
  learners that know nothing of each other, a process each: the speed that the machine has for two processes;
- "backprop": the network that AL predicts with (blocks, last bridge, decoders), in one process, by DDP with
  a batch of 256 for each process, and by torch's own GPipe and 1F1B with 4 micro-batches.

κ is AL's time over backprop's, both in one process. The discrete-event model (`benchmarks/forecast.py`) is
fed with the stages' measured times; its points for two stages stand beside the measured ones, and it is asked
for 2 to 64 stages of one component each over several links.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

import plywise as pw
from forecast import Link, StageCost, forecast
from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.local.associated_learning import MakeBridge, wide_bridge
from plywise.pipeline.pipeline import Pipeline

INPUT, WIDTH, LAYERS, CLASSES, BATCH, MICRO = 784, 1024, 4, 10, 256, 4
BATCHES, ROUNDS, WARM = 30, 7, 4
OUT = Path(__file__).with_suffix(".json")


def slim_bridge(shape: torch.Size, code: int) -> nn.Module:
    """One sigmoid layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), code), nn.Sigmoid())


BRIDGES: dict[str, tuple[int, MakeBridge]] = {
    "the paper's bridge, code 64": (64, wide_bridge),
    "the paper's bridge, code 32": (32, wide_bridge),
    "one layer, code 64": (64, slim_bridge),
    "the paper's bridge, code 256": (256, wide_bridge),
}


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, INPUT, generator=generator)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    for _ in range(count):
        yield x, y


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def learner(bridge: str) -> pw.AssociatedLearning:
    torch.manual_seed(0)
    widths = [INPUT] + [WIDTH] * LAYERS
    body = [nn.Sequential(nn.Linear(a, b), nn.ELU()) for a, b in pairwise(widths)]
    code, make = BRIDGES[bridge]
    blocks = pw.Blocks(body, torch.zeros(2, INPUT))
    return pw.AssociatedLearning(blocks, CLASSES, code=code, bridge=make, optimizer=adam)


def inference_network(bridge: str) -> nn.Sequential:
    """Blocks, last bridge, decoders, one after another."""
    path = learner(bridge).as_module()
    return nn.Sequential(*path.blocks, path.bridge, *path.decoders)


# ---- the arms: each makes a function that trains on BATCHES batches -------------------------------


def one_process_al(bridge: str, rank: int) -> Callable[[], None]:
    one = learner(bridge)

    def run() -> None:
        if rank == 0:
            for x, y in batches(BATCHES):
                one.step(x, y)

    return run


def two_al(bridge: str, rank: int) -> Callable[[], None]:
    """Each process trains a learner of its own on half of the batches: what two cores at once can give."""
    one = learner(bridge)

    def run() -> None:
        for x, y in batches(BATCHES // 2):
            one.step(x, y)

    return run


class PipelineArm:
    """AL in two stages; keeps when each batch was worked on."""

    def __init__(self, bridge: str, rank: int) -> None:
        one = learner(bridge)
        self.pipeline = Pipeline(one)
        self.spans: list[tuple[float, float]] = []
        self.began = 0.0
        first = self.pipeline.trainers[0].component
        first.register_forward_pre_hook(self._begin)
        one.callbacks.append(lambda _: self.spans.append((self.began, time.perf_counter())))

    def _begin(self, *_: object) -> None:
        self.began = time.perf_counter()

    def __call__(self) -> None:
        self.spans.clear()
        self.pipeline.run(batches(BATCHES))


def one_process_backprop(bridge: str, rank: int) -> Callable[[], None]:
    model = inference_network(bridge)
    optimizer = adam(model.parameters())

    def run() -> None:
        if rank == 0:
            for x, y in batches(BATCHES):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    return run


def ddp(bridge: str, rank: int) -> Callable[[], None]:
    model = DistributedDataParallel(inference_network(bridge))
    optimizer = adam(model.parameters())

    def run() -> None:
        for x, y in batches(BATCHES // 2):  # each process has half of the samples
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def torch_schedule(schedule_class: Any) -> Callable[[str, int], Callable[[], None]]:
    def make(bridge: str, rank: int) -> Callable[[], None]:
        network = inference_network(bridge)
        half = LAYERS // 2  # the second half has bridge and decoders too, as in AL's second stage
        part = network[:half] if rank == 0 else network[half:]
        stage = PipelineStage(part, rank, 2, torch.device("cpu"))
        schedule = schedule_class(stage, n_microbatches=MICRO, loss_fn=F.cross_entropy)
        optimizer = adam(part.parameters())

        def run() -> None:
            for x, y in batches(BATCHES):
                optimizer.zero_grad()
                if rank == 0:
                    schedule.step(x)
                else:
                    schedule.step(target=y, losses=[])
                optimizer.step()

        return run

    return make


ARMS: dict[str, Callable[[str, int], Callable[[], None]]] = {
    "AL, one process": one_process_al,
    "AL, pipeline": PipelineArm,
    "AL, two learners apart (ceiling)": two_al,
    "backprop, one process": one_process_backprop,
    "backprop again (null control)": one_process_backprop,
    "backprop, 1F1B": torch_schedule(Schedule1F1B),
    "backprop, GPipe": torch_schedule(ScheduleGPipe),
    "backprop, DDP": ddp,
}


def main_of(rank: int, folder: str, bridge: str, rounds: int) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    arms = {name: make(bridge, rank) for name, make in ARMS.items()}
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
    pipeline = arms["AL, pipeline"]
    assert isinstance(pipeline, PipelineArm)
    result = {"seconds": seconds, "spans": pipeline.spans}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    pipeline.pipeline.close()
    dist.barrier()
    dist.destroy_process_group()


def run_pair(bridge: str, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        pair = [context.Process(target=main_of, args=(r, folder, bridge, rounds)) for r in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            process.join(540)
        if any(process.exitcode != 0 for process in pair):
            for process in pair:
                process.kill()
            raise SystemExit(f"A process failed: {[process.exitcode for process in pair]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


# ---- what it comes to ----------------------------------------------------------------------------


def component_costs(bridge: str) -> list[StageCost]:
    """Seconds of each component's forward and rest, one process, medians; bytes that it hands on."""
    one = learner(bridge)
    clocks: list[list[tuple[float, float]]] = [[] for _ in one.trainers]
    for x, y in batches(BATCHES):
        signal = one.signal(x, y)
        for trainer, own in zip(one.trainers, clocks, strict=True):
            sent: list[float] = []
            start = time.perf_counter()
            signal, _ = trainer.learn(signal, 0, lambda _, s=sent: s.append(time.perf_counter()))
            own.append((sent[0] - start, time.perf_counter() - sent[0]))
    payload = 4 * BATCH * WIDTH
    return [
        StageCost(statistics.median(f for f, _ in own), statistics.median(r for _, r in own), payload)
        for own in clocks
    ]


def together(costs: list[StageCost]) -> StageCost:
    """Components of one stage: all but the last one's rest come before the signal leaves."""
    forward = sum(cost.forward + cost.rest for cost in costs[:-1]) + costs[-1].forward
    return StageCost(forward, costs[-1].rest, costs[-1].payload)


LINKS = {
    "no delay": Link(),
    "10 Gbit/s, 0.1 ms": Link(10e9 / 8, 1e-4),
    "1 Gbit/s, 1 ms": Link(1e9 / 8, 1e-3),
    "1 Gbit/s, 20 ms": Link(1e9 / 8, 2e-2),
}


def summary(bridge: str, pair: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates, ratios taken round by round, bubble and forecasts of one kind of bridge."""
    seconds = pair[0]["seconds"]

    def ratio(name: str, other: str) -> float:
        return statistics.median(o / n for n, o in zip(seconds[name], seconds[other], strict=True))

    costs = component_costs(bridge)
    half = LAYERS // 2
    two = forecast([together(costs[:half]), together(costs[half:])], BATCHES)
    alone = BATCHES * sum(cost.forward + cost.rest for cost in costs)
    start = min(span[0] for own in pair for span in own["spans"])
    end = max(span[1] for own in pair for span in own["spans"])
    busy = sum(b - a for own in pair for a, b in own["spans"])
    inner = costs[1]  # a stage of one component, as often as asked
    return {
        "samples_per_second": {
            name: round(BATCH * BATCHES / statistics.median(own)) for name, own in seconds.items()
        },
        "kappa": 1 / ratio("AL, one process", "backprop, one process"),
        "null_control": ratio("backprop again (null control)", "backprop, one process"),
        "pipeline_over": {
            name: round(ratio("AL, pipeline", name), 3) for name in ARMS if name != "AL, pipeline"
        },
        "of_ideal": round(ratio("AL, pipeline", "AL, one process") / 2, 3),
        "of_ceiling": round(ratio("AL, pipeline", "AL, two learners apart (ceiling)"), 3),
        "bubble": round(1 - busy / (2 * (end - start)), 3),
        "forecast": {
            "speed_up_of_two_stages": round(alone / two.seconds, 3),
            "bubble_of_two_stages": round(two.bubble, 3),
            "speed_up_by_link_and_stages": {
                name: {
                    stages: round(stages * 1000 * (inner.forward + inner.rest) / seconds_, 2)
                    for stages in (2, 4, 8, 16, 32, 64)
                    if (seconds_ := forecast([inner] * stages, 1000, link).seconds)
                }
                for name, link in LINKS.items()
            },
        },
        "component_ms": [(round(1e3 * c.forward, 3), round(1e3 * c.rest, 3)) for c in costs],
        "spans": [[(a - start, b - start) for a, b in own["spans"]] for own in pair],
        "seconds": seconds,
    }


def draw(result: dict[str, Any]) -> None:
    """The rates of the arms, and a Gantt chart of one run of the pipeline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, gantt) = plt.subplots(2, 1, figsize=(11, 8), height_ratios=(3, 1))
    names = list(ARMS)
    for place, (bridge, part) in enumerate(result["bridges"].items()):
        rates = [part["samples_per_second"][name] for name in names]
        positions = [i + (place - 1.5) * 0.2 for i in range(len(names))]
        bars.bar(positions, rates, 0.18, label=f"{bridge} (κ {part['kappa']:.2f})")
    bars.set_xticks(
        range(len(names)), [name.replace(", ", ",\n").replace(" (", "\n(") for name in names], fontsize=8
    )
    bars.set_ylabel("samples a second")
    bars.grid(axis="y", alpha=0.3)
    bars.legend(fontsize=8)
    bridge, part = next(iter(result["bridges"].items()))
    for stage, own in enumerate(part["spans"]):
        for number, (start, end) in enumerate(own):
            colour = plt.cm.viridis(number / len(own))
            gantt.broken_barh([(1e3 * start, 1e3 * (end - start))], (1 - stage - 0.4, 0.8), color=colour)
    gantt.set_yticks([1, 0], ["stage 0", "stage 1"])
    gantt.set_xlabel(f"milliseconds; {BATCHES} batches, {bridge}, bubble {100 * part['bubble']:.0f} %")
    figure.tight_layout()
    save_picture(figure, OUT.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--bridge", action="append", choices=list(BRIDGES), help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(), "bridges": {}}
    if options.bridge and OUT.exists():  # some bridges again: the others' figures stay
        result["bridges"] = json.loads(OUT.read_text())["bridges"]
    for bridge in options.bridge or list(BRIDGES):
        part = summary(bridge, run_pair(bridge, options.rounds))
        result["bridges"][bridge] = part
        print(f"\n{bridge}: κ {part['kappa']:.2f}, null control {part['null_control']:.2f}, ", end="")
        print(f"{part['of_ceiling']:.2f} of ceiling, ", end="")
        print(f"{part['of_ideal']:.2f} of ideal, bubble {part['bubble']:.3f}, forecast {part['forecast']}")
        for name, rate in part["samples_per_second"].items():
            ratio = part["pipeline_over"].get(name, 1)
            print(f"  {name:32} {rate:7} samples/s   pipeline is {ratio:.2f} ×", flush=True)
        write_whole(OUT, json.dumps(result) + "\n")
    draw(result)


if __name__ == "__main__":
    main()
