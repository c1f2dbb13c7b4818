"""Compare the accuracy of local learning with backpropagation of the same network.

    python benchmarks/local_learning.py run               # runs all workloads; resumes if interrupted
    python benchmarks/local_learning.py run --workload mnist-mlp
    python benchmarks/local_learning.py report            # prints the table, draws the picture

The workloads are an MLP of two hidden layers of 256 on 10,000 images of MNIST and of Fashion-MNIST; a CNN of
four blocks of two convolutions (the paper's CNN_AL with a quarter of its filters) on 4,000 images of each;
and a VGG-like network with batch norm on 3,000 images of CIFAR-10. Every method gets the same blocks, batches
of 64 and Adam. "backprop" trains the network that Associated Learning predicts with, end to end; "backprop,
blocks" trains blocks and a classifier. The rate of each method is the best of three on 1,000 validation
images, after three epochs with one seed; then three fresh seeds run and are tested on 2,000 test images.
Associated Learning also has a control whose functions f stay at their random initial values, and the accuracy
of each depth is measured. The committed figures come from an earlier training loop, whose epochs had another
order and ended with an incomplete batch.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import plywise as pw
from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.method import EndToEnd, Method, TrialContext
from plywise.arena.methods.learners import LocalTraining
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.scoring.records import TUNED, TUNING, TrialRecord
from plywise.arena.task import CLASSIFICATION, Task, error_rate, mean, predictor
from plywise.arena.workload import Workload as Problem
from plywise.data.batches import Split
from plywise.data.parts import Data
from plywise.local.associated_learning import pooled_bridge
from plywise.local.linear_heads import GradientHead, RidgeHead
from tuning import DATA

OUT = Path(__file__).with_suffix(".json")
RATES, TUNING_EPOCHS, TUNING_SEED, SEEDS = (3e-4, 1e-3, 3e-3), 3, 100, 3
BATCH, CODE = 64, 64
Predict = Callable[[Tensor], Tensor]


# ---- the networks ----------------------------------------------------------------------------------


def make_mlp() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ELU()),
        nn.Sequential(nn.Linear(256, 256), nn.ELU()),
    ]


def make_cnn() -> list[nn.Module]:
    def block(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(after, after, 3, stride, padding=1),
            nn.ELU(),
        )

    return [block(1, 8, 1), block(8, 8, 2), block(8, 16, 1), block(16, 16, 2)]


def make_vgg() -> list[nn.Module]:
    def conv(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ELU()]

    return [
        nn.Sequential(*conv(3, 16), *conv(16, 32), nn.MaxPool2d(2)),
        nn.Sequential(*conv(32, 32), *conv(32, 64), nn.MaxPool2d(2)),
        nn.Sequential(*conv(64, 64), nn.MaxPool2d(2), *conv(64, 64), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.ELU(), nn.Linear(128, 128), nn.ELU()),
    ]


@dataclass(frozen=True)
class Workload:
    """A data set, the blocks, the number of training images and of epochs."""

    data: str
    blocks: Callable[[], list[nn.Module]]
    images: int
    epochs: int


WORKLOADS = {
    "mnist-mlp": Workload("mnist", make_mlp, 10_000, 8),
    "fashion-mlp": Workload("fashion_mnist", make_mlp, 10_000, 8),
    "mnist-cnn": Workload("mnist", make_cnn, 4_000, 10),
    "fashion-cnn": Workload("fashion_mnist", make_cnn, 4_000, 10),
    "cifar-vgg": Workload("cifar10", make_vgg, 3_000, 6),
}


# ---- the methods: each makes a trainer ----------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """A trainer of the arena, with the predictions of each of its depths."""

    step: Callable[[Tensor, Tensor], float]
    predict: Predict
    depths: tuple[Predict, ...] = ()
    plain: bool = True


def make_adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def make_associated(blocks: pw.Blocks, rate: float, freeze: bool = False) -> Trainer:
    if freeze:
        for block in blocks:
            block.requires_grad_(False)
    learner = pw.AssociatedLearning(blocks, 10, code=CODE, bridge=pooled_bridge, optimizer=make_adam(rate))
    depths = tuple(predictor(learner.as_module(depth)) for depth in range(1, len(blocks) + 1))
    return replace(wrap_learner(learner), depths=depths)


def make_end_to_end(module: nn.Module, rate: float) -> Trainer:
    trainer = EndToEnd(module.train(), make_adam(rate)(module.parameters()), CLASSIFICATION.loss)
    return Trainer(trainer.step, trainer.predict)


def make_inference_path(blocks: pw.Blocks, rate: float) -> Trainer:
    """Train the network that Associated Learning predicts with by cross-entropy.

    Its last sigmoid is removed, since cross-entropy takes logits.
    """
    path = pw.AssociatedLearning(
        blocks, 10, code=CODE, bridge=pooled_bridge, optimizer=make_adam(rate)
    ).as_module()
    path.decoders[-1][1] = nn.Identity()
    return make_end_to_end(path, rate)


def append_classifier(blocks: pw.Blocks) -> pw.Blocks:
    """Append a linear classifier to the last block."""
    features = blocks.shapes[-1].numel()
    last = nn.Sequential(blocks[-1], nn.Flatten(), nn.Linear(features, 10))
    return pw.Blocks([*blocks[:-1], last], torch.zeros(2, *blocks.shapes[0]))


def wrap_learner(learner: pw.Learner) -> Trainer:
    trainer = LocalTraining(learner, plain=True)
    return Trainer(trainer.step, trainer.predict)


MakeTrainer = Callable[[pw.Blocks, float], Trainer]
METHODS: dict[str, MakeTrainer] = {
    "Associated Learning": make_associated,
    "Associated Learning, f frozen": lambda b, r: make_associated(b, r, freeze=True),
    "backprop": make_inference_path,
    "backprop, blocks": lambda b, r: make_end_to_end(nn.Sequential(*append_classifier(b)), r),
    "Interlocking 1 (LocalLoss)": lambda b, r: wrap_learner(
        pw.LocalLoss(append_classifier(b), 10, optimizer=make_adam(r))
    ),
    "Interlocking 2": lambda b, r: wrap_learner(
        pw.Interlocking(append_classifier(b), 10, horizon=2, optimizer=make_adam(r))
    ),
    "Interlocking 3": lambda b, r: wrap_learner(
        pw.Interlocking(append_classifier(b), 10, horizon=3, optimizer=make_adam(r))
    ),
    "Interlocking K (backprop)": lambda b, r: wrap_learner(
        pw.Interlocking(append_classifier(b), 10, horizon=len(b), optimizer=make_adam(r))
    ),
    "local forward gradient": lambda b, r: wrap_learner(
        pw.LocalForwardGradient(append_classifier(b), 10, optimizer=make_adam(r))
    ),
    "CaFo, gradient heads": lambda b, r: wrap_learner(
        pw.CascadedForward(b, 10, head=GradientHead, optimizer=make_adam(r))
    ),
    "CaFo, ridge heads": lambda b, r: wrap_learner(
        pw.CascadedForward(b, 10, head=partial(RidgeHead, max_features=1024))
    ),
}


# ---- training --------------------------------------------------------------------------------------


def load(workload: Workload) -> dict[str, tuple[Tensor, Tensor]]:
    sys.path.insert(0, str(DATA))
    from load_data import image_set

    images, labels, test_images, test_labels = image_set(workload.data)

    def tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.asarray(x)).float() / 255
        pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return pixels, torch.from_numpy(np.asarray(y)).long().flatten()

    n = workload.images
    x, y = tensors(images[: n + 1_000], labels[: n + 1_000])
    tx, ty = tensors(test_images[:2_000], test_labels[:2_000])
    mean, deviation = x[:n].mean(), x[:n].std()
    return {
        "train": ((x[:n] - mean) / deviation, y[:n]),
        "validation": ((x[n:] - mean) / deviation, y[n:]),
        "test": ((tx - mean) / deviation, ty),
    }


def compute_accuracy(predict: Predict, split: tuple[Tensor, Tensor]) -> float:
    return convert_to_percent(mean(error_rate, predict, Split(*split), 500))


def convert_to_percent(error: float | None) -> float:
    return round(100 * (1 - error), 2)


ACCURACY = Task(error_rate, error_rate, "error rate")


def tune_and_train(
    workload: Workload, data: Any, make: MakeTrainer, rates: tuple[float, ...]
) -> dict[str, Any]:
    """Choose the rate that is best on the validation set, and run it with fresh seeds."""
    trainers: list[Trainer] = []

    def begin(context: TrialContext) -> Trainer:
        trainers.append(make(pw.Blocks(list(context.model), context.example[:2]), context.numbers["rate"]))
        return trainers[-1]

    epoch = len(data["train"][1]) // BATCH
    steps, tuning_steps = workload.epochs * epoch, TUNING_EPOCHS * epoch
    problem = Problem(
        "",
        "",
        lambda: nn.Sequential(*workload.blocks()),
        lambda: Data(*(Split(*part) for part in data.values())),
        ACCURACY,
        BATCH,
        steps,
        target=0.0,
        measure_every=steps,
        train_eval_size=2_000,
    )
    design = Design(
        SEEDS,
        tracks=(TUNED,),
        choose=choose_rate,
        tuning_seed=TUNING_SEED,
        tuning_steps=tuning_steps,
        tuning_every=tuning_steps,
        check=require_final,
    )
    method = Method("method", "", {}, begin, grid=tuple({"rate": rate} for rate in rates))
    lines = run_arms(problem, [method], design).lines("", "method")
    return describe_runs(lines, trainers, data)


def describe_runs(lines: list[TrialRecord], trainers: list[Trainer], data: Any) -> dict[str, Any]:
    """Return what is kept of the tuning runs and of the final ones; ``trainers`` are theirs, in order."""
    tuning = [
        {**describe_line(line), "validation": convert_to_percent(find_error(line))}
        for line in lines
        if is_tuning(line)
    ]
    final = [
        {
            **describe_line(line),
            "test": convert_to_percent(line["test"]),
            "train": convert_to_percent(line["loss"][-1]),
        }
        for line in lines
        if not is_tuning(line)
    ]
    for result, trainer in zip(final, trainers[-SEEDS:], strict=True):
        if trainer.depths:
            result["depths"] = [compute_accuracy(predict, data["test"]) for predict in trainer.depths]
    return {"tuning": tuning, "final": final}


def is_tuning(line: TrialRecord) -> bool:
    return line["purpose"] == TUNING


def find_error(line: TrialRecord) -> float:
    """Return the error rate on the validation set, or 1 for a failed run."""
    return 1.0 if line["failure"] else line["validation"][-1]


def choose_rate(lines: Sequence[TrialRecord], target: float | None) -> TrialRecord | None:
    return min(lines, key=find_error, default=None)


def require_final(line: TrialRecord) -> None:
    if line["failure"] and not is_tuning(line):
        raise RuntimeError(f"A final run failed: {line['failure']}")


def describe_line(line: TrialRecord) -> dict[str, Any]:
    return {"rate": line["numbers"]["rate"], "seed": line["seed"], "cpu": round(line["cpu"][-1], 1)}


def read() -> dict[str, Any]:
    if OUT.exists():
        return json.loads(OUT.read_text())
    return {"environment": environment(), "workloads": {name: {} for name in WORKLOADS}}


def run(names: list[str]) -> None:
    result = read()
    for name in names:
        workload, done = WORKLOADS[name], result["workloads"][name]
        data = load(workload)
        for method in METHODS:
            if method in done or (method == "Interlocking 3" and len(workload.blocks()) < 4):
                continue
            # ridge heads have a closed form without a rate
            rates = (RATES[1],) if method == "CaFo, ridge heads" else RATES
            done[method] = tune_and_train(workload, data, METHODS[method], rates)
            rate, final = done[method]["final"][0]["rate"], done[method]["final"]
            print(f"{name:12} {method:32} rate {rate:g}  test {[run['test'] for run in final]}", flush=True)
            write_whole(OUT, json.dumps(result).replace('"tuning"', '\n"tuning"') + "\n")


# ---- the report ------------------------------------------------------------------------------------


def format_spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def report() -> None:
    result = read()["workloads"]
    for name, methods in result.items():
        workload = WORKLOADS[name]
        print(f"\n**{name}**, {workload.images} images, {workload.epochs} epochs\n")
        print("| method | rate | test accuracy, % | training accuracy, % | by depth | CPU s |")
        print("|---|---|---|---|---|---|")
        for method in (name for name in METHODS if name in methods):
            entry = methods[method]
            final = entry["final"]
            depths = ""
            if "depths" in final[0]:
                columns = zip(*(run["depths"] for run in final), strict=True)
                depths = " / ".join(f"{statistics.fmean(column):.1f}" for column in columns)
            test, training = (format_spread([run[key] for run in final]) for key in ("test", "train"))
            clock = statistics.median(run["cpu"] for run in final)
            print(f"| {method} | {final[0]['rate']:g} | {test} | {training} | {depths} | {clock:.0f} |")
    draw(result)


def draw(result: dict[str, Any]) -> None:
    """Draw the test accuracies of all methods for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result), figsize=(15, 4.2), sharey=True)
    names = list(METHODS)
    for axis, (workload, methods) in zip(axes, result.items(), strict=True):
        for position, name in enumerate(reversed(names)):
            if name in methods:
                values = [run["test"] for run in methods[name]["final"]]
                colour = "#c0392b" if name.startswith("Associated") else "#1f5fa8"
                axis.scatter(values, [position] * len(values), s=16, color=colour)
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axis.set_title(workload, fontsize=10)
        axis.grid(alpha=0.3)
    axes[len(axes) // 2].set_xlabel("test accuracy, %, three seeds")
    figure.tight_layout()
    save_picture(figure, OUT.with_suffix(".svg"))


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="tune and train")
    running.add_argument("--workload", action="append", choices=list(WORKLOADS), help="default: all")
    commands.add_parser("report", help="print the table and draw the picture")
    options = parser.parse_args()
    if options.command == "run":
        run(options.workload or list(WORKLOADS))
    else:
        report()


if __name__ == "__main__":
    main()
