"""Compare local learning with its strongest baselines in one table: quality, memory and speed.

    python benchmarks/local_table.py run                       # takes hours; resumes if interrupted
    python benchmarks/local_table.py run --workload characters --method "next token, tied"
    python benchmarks/local_table.py run --small               # a few steps of everything; writes nothing
    python benchmarks/local_table.py follow --workload cifar MonoForward backpropagation
    python benchmarks/local_table.py follow --workload characters --seeds 3 "Interlocking 1"
    python benchmarks/local_table.py report

The workloads are an MLP of two hidden layers (from `local_learning.py`) on 10,000 images of MNIST and of
Fashion-MNIST, for five epochs; a ConvNet of eight convolutions on 10,000 images of CIFAR-10, for three
epochs; and a transformer of four blocks of width 64 on tiny Shakespeare, for 400 steps. The ConvNet halves
the image in its first convolution, since otherwise one layer would have most of the network's activations,
and splitting into blocks could save little memory. The baselines are backpropagation with deep supervision,
with checkpointing, with accumulation over as many parts as there are blocks, and with a delay of one step
(`local_baselines.py`). "Interlocking 1" has a separate loss for each block. The rate of each method is the
best of three on validation data with one seed, in runs a third as long; then three fresh seeds run and are
tested.

"memory" is the peak size of all tensors that a step creates, including gradients and temporary tensors, over
that of backpropagation. "speed" is the number of samples per second of CPU time on one thread, over that of
backpropagation. Each final run measures the speed of backpropagation before and after itself in the same
process, so runs of different or busy machines are comparable. The table shows the median of the final runs.
Entries without "processor" are older and were measured on the processor in "environment"; their speed is
relative to the entry "backpropagation". Everything uses Adam at a constant rate.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plywise as pw
from figure_tables import TABLES
from local_baselines import (
    Accumulation,
    Checkpointing,
    DeepSupervision,
    OneStepDelay,
    Stepper,
    Trainer,
    make_adam,
)
from local_learning import Workload, load, make_mlp
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.workloads.networks import TransformerBlock
from plywise.local.associated_maps import mean_decoder, pooled_bridge
from plywise.local.heads import pooled_linear
from plywise.local.linear_heads import GradientHead, RidgeHead
from plywise.local.next_token import linear_head

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "local"))
from alive import most_alive

OUT = Path(__file__).with_suffix(".json")
RATES, TUNING_SEED, SEEDS = (3e-4, 1e-3, 3e-3), 100, (0, 1, 2)
TIMED_ROUNDS, ROUND_STEPS = 3, 10
Split = dict[str, tuple[Tensor, Tensor]]


def make_token_head(shape: torch.Size, scores: int) -> nn.Module:
    return linear_head(shape[-1], scores)


@dataclass(frozen=True)
class Problem:
    """Blocks, data and number of steps (``longer``: of `follow`); ``tokens`` is true for a language model."""

    read: Callable[[], Split]
    blocks: Callable[[], list[nn.Module]]
    classes: int
    steps: int
    batch: int = 64
    longer: int = 0
    tokens: bool = False

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, -2), y.flatten())

    def head(self, shape: torch.Size) -> nn.Module:
        return (make_token_head if self.tokens else pooled_linear)(shape, self.classes)

    def compute_quality(self, predict: Callable[[Tensor], Tensor], part: tuple[Tensor, Tensor]) -> float:
        """Return nats per token, or the accuracy in per cent."""
        pairs = zip(part[0].split(200), part[1].split(200), strict=True)
        if self.tokens:
            return sum(float(self.loss(predict(x), y)) * len(x) for x, y in pairs) / len(part[1])
        return 100 * sum(int((predict(x).argmax(1) == y).sum()) for x, y in pairs) / len(part[1])


class Embed(nn.Module):
    """Embeds characters and their positions."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(65, width), nn.Embedding(64, width)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.characters(tokens) + self.positions.weight


def make_convnet() -> list[nn.Module]:
    """Make eight convolutions, 16 channels at 16×16 and 32 at 8×8, with in-place ReLUs."""

    def conv(before: int, after: int, stride: int = 1) -> nn.Module:
        layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    wide = [conv(3, 16, 2), *(conv(16, 16) for _ in range(3))]
    return [*wide, conv(16, 32, 2), *(conv(32, 32) for _ in range(3))]


def make_transformer() -> list[nn.Module]:
    return [nn.Sequential(Embed(), TransformerBlock(64, 4)), *(TransformerBlock(64, 4) for _ in range(3))]


def read_characters() -> Split:
    from plywise.arena.workloads.text import make_data

    data = make_data()
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: (part.x, part.y) for name, part in parts.items()}


def make_image_problem(
    name: str, blocks: Callable[[], list[nn.Module]], steps: int, longer: int = 0
) -> Problem:
    return Problem(lambda: load(Workload(name, blocks, 10_000, 0)), blocks, 10, steps, longer=longer)


PROBLEMS = {
    "mnist": make_image_problem("mnist", make_mlp, 780),
    "fashion": make_image_problem("fashion_mnist", make_mlp, 780),
    "cifar": make_image_problem("cifar10", make_convnet, 468, longer=1560),
    "characters": Problem(read_characters, make_transformer, 65, 400, batch=16, longer=1000, tokens=True),
}


# ---- methods: each gets the problem, blocks without classifier, and a rate --------------------------


def append_classifier(problem: Problem, blocks: pw.Blocks) -> list[nn.Module]:
    """Return the blocks with a classifier appended to the last one."""
    return [*blocks[:-1], nn.Sequential(blocks[-1], problem.head(blocks.shapes[-1]))]


def make_stepper(kind: Callable[..., Stepper], problem: Problem, blocks: pw.Blocks, rate: float) -> Trainer:
    parts = append_classifier(problem, blocks)
    more = ([problem.head(shape) for shape in blocks.shapes[1:-1]],) if kind is DeepSupervision else ()
    stepper = kind(parts, problem.loss, rate, *more)
    return Trainer(stepper.step, stepper.predict)


def make_block_reader(
    kind: Callable[..., pw.Learner], problem: Problem, blocks: pw.Blocks, rate: float
) -> Trainer:
    """Make a learner that predicts the class from its blocks."""
    learner = kind(blocks, problem.classes, optimizer=make_adam(rate))
    return Trainer(learner.step, learner.predict)


def make_classifier(
    kind: Callable[..., pw.Learner], problem: Problem, blocks: pw.Blocks, rate: float
) -> Trainer:
    """Make a learner whose last block is the classifier."""
    example = torch.zeros(2, *blocks.shapes[0], dtype=torch.long if problem.tokens else torch.float32)
    return make_block_reader(kind, problem, pw.Blocks(append_classifier(problem, blocks), example), rate)


def make_tied(problem: Problem, blocks: pw.Blocks, rate: float) -> Trainer:
    table = blocks[0].get_submodule("0.characters")
    return make_block_reader(partial(pw.LocalNextToken, tied=table), problem, blocks, rate)


def drop_class_count(kind: Callable[..., pw.Learner]) -> Callable[..., pw.Learner]:
    """Make a learner without the argument for the number of classes."""
    return lambda blocks, classes, **training: kind(blocks, **training)


Method = Callable[[Problem, pw.Blocks, float], Trainer]
BASELINES: dict[str, Method] = {
    "backpropagation": partial(make_stepper, Stepper),
    "deep supervision": partial(make_stepper, DeepSupervision),
    "checkpointing": partial(make_stepper, Checkpointing),
    "accumulation": partial(make_stepper, Accumulation),
    "one-step delay": partial(make_stepper, OneStepDelay),
}
ASSOCIATED = partial(pw.AssociatedLearning, code=64, bridge=pooled_bridge)
ON_IMAGES: dict[str, Method] = {
    "LocalLoss": partial(make_classifier, pw.LocalLoss),
    "Interlocking 2": partial(make_classifier, partial(pw.Interlocking, horizon=2)),
    "MomentumAuxiliary": partial(make_classifier, pw.MomentumAuxiliary),
    "SCPL": partial(make_classifier, pw.SCPL),
    "AssociatedLearning": partial(make_block_reader, ASSOCIATED),
    "AssociatedLearning, mean decoder": partial(make_block_reader, partial(ASSOCIATED, decoder=mean_decoder)),
    "MonoForward": partial(make_block_reader, pw.MonoForward),
    "ForwardForward": partial(make_block_reader, pw.ForwardForward),
    "DirectFeedback": partial(make_classifier, drop_class_count(pw.DirectFeedback)),
    "LocalForwardGradient": partial(make_classifier, pw.LocalForwardGradient),
    "CascadedForward, gradient": partial(make_block_reader, partial(pw.CascadedForward, head=GradientHead)),
    "CascadedForward, ridge": partial(
        make_block_reader, partial(pw.CascadedForward, head=partial(RidgeHead, max_features=1024))
    ),
}
ON_TOKENS: dict[str, Method] = {
    **{
        f"Interlocking {horizon}": partial(
            make_classifier, partial(pw.Interlocking, horizon=horizon, head=make_token_head)
        )
        for horizon in (1, 2, 3)
    },
    "next token": partial(make_block_reader, pw.LocalNextToken),
    "next token, tied": make_tied,
}


def list_methods(problem: Problem) -> dict[str, Method]:
    return {**BASELINES, **(ON_TOKENS if problem.tokens else ON_IMAGES)}


# ---- running ---------------------------------------------------------------------------------------


def draw_batches(
    part: tuple[Tensor, Tensor], size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(part[1]), (size,), generator=generator)
        yield part[0][rows], part[1][rows]


def train(
    problem: Problem, method: Method, data: Split, rate: float, seed: int, part_name: str, steps: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    trainer = method(problem, pw.Blocks(problem.blocks(), data["train"][0][:2]), rate)
    start = time.process_time()
    for x, y in draw_batches(data["train"], problem.batch, steps, seed):
        trainer.step(x, y)
    seconds = time.process_time() - start
    result = {"rate": rate, "seed": seed, "samples_a_second": round(problem.batch * steps / seconds)}
    x, y = next(draw_batches(data["train"], problem.batch, 1, seed))
    result["alive_bytes"] = most_alive(lambda: trainer.step(x, y)) if part_name == "test" else 0
    return {**result, part_name: problem.compute_quality(trainer.predict, data[part_name])}


def time_backpropagation(problem: Problem, data: Split) -> list[float]:
    """Return samples per second of CPU time for some rounds of backpropagation."""
    torch.manual_seed(TUNING_SEED)
    blocks = pw.Blocks(problem.blocks(), data["train"][0][:2])
    trainer = BASELINES["backpropagation"](problem, blocks, RATES[1])
    rates = []
    for number in range(1 + TIMED_ROUNDS):  # the first round warms up
        batches = list(draw_batches(data["train"], problem.batch, ROUND_STEPS, number))
        start = time.process_time()
        for x, y in batches:
            trainer.step(x, y)
        rates.append(problem.batch * ROUND_STEPS / (time.process_time() - start))
    return rates[1:]


def train_and_time(
    problem: Problem, method: Method, data: Split, rate: float, seed: int, steps: int
) -> dict[str, float]:
    """Run a final training, and time backpropagation in the same process just before and after it."""
    before = time_backpropagation(problem, data)
    result = train(problem, method, data, rate, seed, "test", steps)
    reference = statistics.median([*before, *time_backpropagation(problem, data)])
    return {**result, "backpropagation_samples_a_second": round(reference)}


def tune_and_train(problem: Problem, method: Method, data: Split, small: bool) -> dict[str, Any]:
    short, long = (3, 5) if small else (problem.steps // 3, problem.steps)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if small else (RATES, SEEDS)
    tuning = [train(problem, method, data, rate, TUNING_SEED, "validation", short) for rate in rates]
    best = (min if problem.tokens else max)(tuning, key=lambda trial: trial["validation"])
    final = [train_and_time(problem, method, data, best["rate"], seed, long) for seed in seeds]
    return {"processor": environment()["cpu"], "tuning": tuning, "final": final}


def read() -> dict[str, Any]:
    if OUT.exists():
        return json.loads(OUT.read_text())
    return {"environment": environment(), "workloads": {name: {} for name in PROBLEMS}}


def write(result: dict[str, Any]) -> None:
    write_whole(OUT, json.dumps(result).replace('"tuning"', '\n"tuning"') + "\n")


def run(names: list[str], only: list[str], small: bool) -> None:
    for name in names:
        problem = PROBLEMS[name]
        data = problem.read()
        for label, method in list_methods(problem).items():
            if (only and label not in only) or (label in read()["workloads"][name] and not small):
                continue
            entry = tune_and_train(problem, method, data, small)
            test = [round(run["test"], 3) for run in entry["final"]]
            print(f"{name:12} {label:28} rate {entry['final'][0]['rate']:g}  test {test}", flush=True)
            if not small:
                result = read()  # `follow` may have written in the meantime
                result["workloads"][name][label] = entry
                write(result)


def follow(name: str, labels: list[str], seeds: int, evaluations: int = 5) -> None:
    """Train for longer at the rates of the table, with the missing seeds, and evaluate several times."""
    problem = PROBLEMS[name]
    data = problem.read()
    for seed in SEEDS[:seeds]:
        for label in labels:
            points = read().get("longer", {}).get(name, {}).get(label, [])
            if any(point["seed"] == seed for point in points):
                continue
            rate = read()["workloads"][name][label]["final"][0]["rate"]
            points += train_longer(problem, list_methods(problem)[label], data, rate, seed, evaluations)
            test = [round(point["test"], 3) for point in points[-evaluations:]]
            print(f"{label:28} seed {seed}  test {test}", flush=True)
            result = read()  # `run` may have written in the meantime
            result.setdefault("longer", {}).setdefault(name, {})[label] = points
            write(result)


def train_longer(
    problem: Problem, method: Method, data: Split, rate: float, seed: int, evaluations: int
) -> list[dict[str, float]]:
    """Return the quality on validation and test data at equally spaced steps of a longer training."""
    torch.manual_seed(seed)
    trainer = method(problem, pw.Blocks(problem.blocks(), data["train"][0][:2]), rate)
    points = []
    for step, (x, y) in enumerate(draw_batches(data["train"], problem.batch, problem.longer, seed), 1):
        trainer.step(x, y)
        if step % (problem.longer // evaluations) == 0:
            qualities = {
                part: problem.compute_quality(trainer.predict, data[part]) for part in ("validation", "test")
            }
            points.append({"seed": seed, "step": step, **qualities})
    return points


def report() -> None:
    for name in PROBLEMS:
        if (table := TABLES.get(f"local-table-{name}")) is not None:  # a workload that never ran has no table
            print(f"\n**{name}**\n\n{table('')}", end="")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="tune and train")
    running.add_argument("--workload", action="append", choices=list(PROBLEMS), help="default: all")
    running.add_argument("--method", action="append", help="default: all")
    running.add_argument("--small", action="store_true", help="run a few steps and write nothing")
    commands.add_parser("report", help="print the table")
    following = commands.add_parser("follow", help="train methods of the table for longer")
    following.add_argument(
        "--workload", required=True, choices=[name for name in PROBLEMS if PROBLEMS[name].longer]
    )
    following.add_argument("--seeds", type=int, default=1, choices=(1, 2, 3), help="default: 1")
    following.add_argument("method", nargs="+")
    options = parser.parse_args()
    if options.command == "run":
        run(options.workload or list(PROBLEMS), options.method or [], options.small)
    elif options.command == "follow":
        follow(options.workload, options.method, options.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
