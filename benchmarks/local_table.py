"""One table of local learning beside its harshest rivals: quality, memory, speed.

    python benchmarks/local_table.py run                       # hours; goes on where it was interrupted
    python benchmarks/local_table.py run --workload characters --method "next token, tied"
    python benchmarks/local_table.py run --small               # a few steps of everything; nothing is written
    python benchmarks/local_table.py follow --workload cifar MonoForward backpropagation
    python benchmarks/local_table.py follow --workload characters --seeds 3 "Interlocking 1"
    python benchmarks/local_table.py report

Workloads: an MLP of two hidden layers on 10,000 images of MNIST and of Fashion-MNIST, five epochs
(`local_learning.py` has it); a ConvNet of eight convolutions on 10,000 images of CIFAR-10, three epochs; and
a transformer of four blocks, 64 wide, on tiny Shakespeare, 400 steps. The ConvNet halves the image in its
first convolution: where one layer holds most of a network's activations, no block can be small beside it.
Rivals: backpropagation with deep supervision, with checkpointing, with accumulation in as many parts as there
are blocks, and with a delay of one step (`local_baselines.py`). "Interlocking 1" is a loss for each block
alone. Each method's rate is the best of three on validation data with one seed, in trainings a third as long;
then three fresh seeds on test data.
"memory" is the most that the tensors which a step makes take at once, gradients and temporary ones
included, of backpropagation's. "speed" is samples a second of CPU time on one thread over backpropagation's,
which each final run measures beside itself, before and after, in its own process: so runs of different
machines, or of a busy one, can stand in one table. The median of the final runs is printed. Entries without
"processor" were measured before that, on the processor in "environment"; their speed is over that of the
entry "backpropagation". Everything is on Adam at a constant rate.
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
from local_baselines import Accumulation, Checkpointing, DeepSupervision, OneStepDelay, Stepper, Trained, adam
from local_learning import Workload, load, mlp
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


def token_head(shape: torch.Size, scores: int) -> nn.Module:
    return linear_head(shape[-1], scores)


@dataclass(frozen=True)
class Problem:
    """Blocks, data, and for how many steps (``longer`` for `follow`). ``tokens``: a language model."""

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
        return (token_head if self.tokens else pooled_linear)(shape, self.classes)

    def quality(self, predict: Callable[[Tensor], Tensor], part: tuple[Tensor, Tensor]) -> float:
        """Nats a token, or accuracy in per cent."""
        pairs = zip(part[0].split(200), part[1].split(200), strict=True)
        if self.tokens:
            return sum(float(self.loss(predict(x), y)) * len(x) for x, y in pairs) / len(part[1])
        return 100 * sum(int((predict(x).argmax(1) == y).sum()) for x, y in pairs) / len(part[1])


class Embed(nn.Module):
    """Characters and where they stand."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(65, width), nn.Embedding(64, width)
        for table in (self.characters, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.characters(tokens) + self.places.weight


def convnet() -> list[nn.Module]:
    """Eight convolutions, 16 channels at 16×16 and 32 at 8×8; ReLUs work in place."""

    def conv(before: int, after: int, stride: int = 1) -> nn.Module:
        layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    wide = [conv(3, 16, 2), *(conv(16, 16) for _ in range(3))]
    return [*wide, conv(16, 32, 2), *(conv(32, 32) for _ in range(3))]


def transformer() -> list[nn.Module]:
    return [nn.Sequential(Embed(), TransformerBlock(64, 4)), *(TransformerBlock(64, 4) for _ in range(3))]


def characters() -> Split:
    from plywise.arena.workloads.text import make_data

    data = make_data()
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: (part.x, part.y) for name, part in parts.items()}


def images(name: str, blocks: Callable[[], list[nn.Module]], steps: int, longer: int = 0) -> Problem:
    return Problem(lambda: load(Workload(name, blocks, 10_000, 0)), blocks, 10, steps, longer=longer)


PROBLEMS = {
    "mnist": images("mnist", mlp, 780),
    "fashion": images("fashion_mnist", mlp, 780),
    "cifar": images("cifar10", convnet, 468, longer=1560),
    "characters": Problem(characters, transformer, 65, 400, batch=16, longer=1000, tokens=True),
}


# ---- methods: each gets the problem, blocks without classifier, and a rate --------------------------


def classified(problem: Problem, blocks: pw.Blocks) -> list[nn.Module]:
    """The blocks, the last one with a classifier behind it."""
    return [*blocks[:-1], nn.Sequential(blocks[-1], problem.head(blocks.shapes[-1]))]


def stepped(kind: Callable[..., Stepper], problem: Problem, blocks: pw.Blocks, rate: float) -> Trained:
    parts = classified(problem, blocks)
    more = ([problem.head(shape) for shape in blocks.shapes[1:-1]],) if kind is DeepSupervision else ()
    stepper = kind(parts, problem.loss, rate, *more)
    return Trained(stepper.step, stepper.predict)


def learned(kind: Callable[..., pw.Learner], problem: Problem, blocks: pw.Blocks, rate: float) -> Trained:
    """A learner that reads the classes off the blocks."""
    learner = kind(blocks, problem.classes, optimizer=adam(rate))
    return Trained(learner.step, learner.predict)


def classifying(kind: Callable[..., pw.Learner], problem: Problem, blocks: pw.Blocks, rate: float) -> Trained:
    """A learner whose last block classifies."""
    example = torch.zeros(2, *blocks.shapes[0], dtype=torch.long if problem.tokens else torch.float32)
    return learned(kind, problem, pw.Blocks(classified(problem, blocks), example), rate)


def tied(problem: Problem, blocks: pw.Blocks, rate: float) -> Trained:
    table = blocks[0].get_submodule("0.characters")
    return learned(partial(pw.LocalNextToken, tied=table), problem, blocks, rate)


def without_count(kind: Callable[..., pw.Learner]) -> Callable[..., pw.Learner]:
    """A learner that does not ask for the number of classes."""
    return lambda blocks, classes, **training: kind(blocks, **training)


Method = Callable[[Problem, pw.Blocks, float], Trained]
BASELINES: dict[str, Method] = {
    "backpropagation": partial(stepped, Stepper),
    "deep supervision": partial(stepped, DeepSupervision),
    "checkpointing": partial(stepped, Checkpointing),
    "accumulation": partial(stepped, Accumulation),
    "one-step delay": partial(stepped, OneStepDelay),
}
ASSOCIATED = partial(pw.AssociatedLearning, code=64, bridge=pooled_bridge)
ON_IMAGES: dict[str, Method] = {
    "LocalLoss": partial(classifying, pw.LocalLoss),
    "Interlocking 2": partial(classifying, partial(pw.Interlocking, horizon=2)),
    "MomentumAuxiliary": partial(classifying, pw.MomentumAuxiliary),
    "SCPL": partial(classifying, pw.SCPL),
    "AssociatedLearning": partial(learned, ASSOCIATED),
    "AssociatedLearning, mean decoder": partial(learned, partial(ASSOCIATED, decoder=mean_decoder)),
    "MonoForward": partial(learned, pw.MonoForward),
    "ForwardForward": partial(learned, pw.ForwardForward),
    "DirectFeedback": partial(classifying, without_count(pw.DirectFeedback)),
    "LocalForwardGradient": partial(classifying, pw.LocalForwardGradient),
    "CascadedForward, gradient": partial(learned, partial(pw.CascadedForward, head=GradientHead)),
    "CascadedForward, ridge": partial(
        learned, partial(pw.CascadedForward, head=partial(RidgeHead, max_features=1024))
    ),
}
ON_TOKENS: dict[str, Method] = {
    **{
        f"Interlocking {horizon}": partial(
            classifying, partial(pw.Interlocking, horizon=horizon, head=token_head)
        )
        for horizon in (1, 2, 3)
    },
    "next token": partial(learned, pw.LocalNextToken),
    "next token, tied": tied,
}


def methods_of(problem: Problem) -> dict[str, Method]:
    return {**BASELINES, **(ON_TOKENS if problem.tokens else ON_IMAGES)}


# ---- running ---------------------------------------------------------------------------------------


def batches(part: tuple[Tensor, Tensor], size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(part[1]), (size,), generator=generator)
        yield part[0][rows], part[1][rows]


def train(
    problem: Problem, method: Method, data: Split, rate: float, seed: int, judge: str, steps: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    trained = method(problem, pw.Blocks(problem.blocks(), data["train"][0][:2]), rate)
    start = time.process_time()
    for x, y in batches(data["train"], problem.batch, steps, seed):
        trained.step(x, y)
    seconds = time.process_time() - start
    result = {"rate": rate, "seed": seed, "samples_a_second": round(problem.batch * steps / seconds)}
    x, y = next(batches(data["train"], problem.batch, 1, seed))
    result["alive_bytes"] = most_alive(lambda: trained.step(x, y)) if judge == "test" else 0
    return {**result, judge: problem.quality(trained.predict, data[judge])}


def time_backpropagation(problem: Problem, data: Split) -> list[float]:
    """Samples a second of CPU time in rounds of some steps of backpropagation."""
    torch.manual_seed(TUNING_SEED)
    blocks = pw.Blocks(problem.blocks(), data["train"][0][:2])
    trained = BASELINES["backpropagation"](problem, blocks, RATES[1])
    rates = []
    for number in range(1 + TIMED_ROUNDS):  # the first round warms up
        drawn = list(batches(data["train"], problem.batch, ROUND_STEPS, number))
        start = time.process_time()
        for x, y in drawn:
            trained.step(x, y)
        rates.append(problem.batch * ROUND_STEPS / (time.process_time() - start))
    return rates[1:]


def train_beside(
    problem: Problem, method: Method, data: Split, rate: float, seed: int, steps: int
) -> dict[str, float]:
    """A final run, with the speed of backpropagation in the same process, just before and just after."""
    before = time_backpropagation(problem, data)
    result = train(problem, method, data, rate, seed, "test", steps)
    beside = statistics.median([*before, *time_backpropagation(problem, data)])
    return {**result, "backpropagation_samples_a_second": round(beside)}


def tune_and_train(problem: Problem, method: Method, data: Split, small: bool) -> dict[str, Any]:
    short, long = (3, 5) if small else (problem.steps // 3, problem.steps)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if small else (RATES, SEEDS)
    tuning = [train(problem, method, data, rate, TUNING_SEED, "validation", short) for rate in rates]
    best = (min if problem.tokens else max)(tuning, key=lambda one: one["validation"])
    final = [train_beside(problem, method, data, best["rate"], seed, long) for seed in seeds]
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
        for label, method in methods_of(problem).items():
            if (only and label not in only) or (label in read()["workloads"][name] and not small):
                continue
            entry = tune_and_train(problem, method, data, small)
            test = [round(one["test"], 3) for one in entry["final"]]
            print(f"{name:12} {label:28} rate {entry['final'][0]['rate']:g}  test {test}", flush=True)
            if not small:
                result = read()  # `follow` may have written meanwhile
                result["workloads"][name][label] = entry
                write(result)


def follow(name: str, labels: list[str], seeds: int, looks: int = 5) -> None:
    """Train for longer, at the rates of the table, and look now and then; with seeds that are missing."""
    problem = PROBLEMS[name]
    data = problem.read()
    for seed in SEEDS[:seeds]:
        for label in labels:
            points = read().get("longer", {}).get(name, {}).get(label, [])
            if any(point["seed"] == seed for point in points):
                continue
            rate = read()["workloads"][name][label]["final"][0]["rate"]
            points += train_longer(problem, methods_of(problem)[label], data, rate, seed, looks)
            test = [round(point["test"], 3) for point in points[-looks:]]
            print(f"{label:28} seed {seed}  test {test}", flush=True)
            result = read()  # `run` may have written meanwhile
            result.setdefault("longer", {}).setdefault(name, {})[label] = points
            write(result)


def train_longer(
    problem: Problem, method: Method, data: Split, rate: float, seed: int, looks: int
) -> list[dict[str, float]]:
    """Quality on validation and test data at so many equally spaced steps of a longer training."""
    torch.manual_seed(seed)
    trained = method(problem, pw.Blocks(problem.blocks(), data["train"][0][:2]), rate)
    points = []
    for step, (x, y) in enumerate(batches(data["train"], problem.batch, problem.longer, seed), 1):
        trained.step(x, y)
        if step % (problem.longer // looks) == 0:
            judged = {part: problem.quality(trained.predict, data[part]) for part in ("validation", "test")}
            points.append({"seed": seed, "step": step, **judged})
    return points


def report() -> None:
    for name in PROBLEMS:
        if (
            table := TABLES.get(f"local-table-{name}")
        ) is not None:  # there is one as soon as it has been run
            print(f"\n**{name}**\n\n{table('')}", end="")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="tune and train")
    running.add_argument("--workload", action="append", choices=list(PROBLEMS), help="default: all")
    running.add_argument("--method", action="append", help="default: all")
    running.add_argument("--small", action="store_true", help="a few steps, nothing is written")
    commands.add_parser("report", help="the table")
    following = commands.add_parser("follow", help="longer, for methods of the table")
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
