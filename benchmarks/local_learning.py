"""Accuracy of learning without global backprop, beside backpropagation of the same network.

    python benchmarks/local_learning.py run               # all workloads; resumes if interrupted
    python benchmarks/local_learning.py run --workload mnist-mlp
    python benchmarks/local_learning.py report            # the table and the picture

Workloads: an MLP of two hidden layers of 256 and a CNN of four blocks of two convolutions (the paper's
CNN_AL with a quarter of its filters) on 10,000 and 4,000 images of MNIST and Fashion-MNIST, a VGG-like
network with batch norm on 3,000 images of CIFAR-10. Every method gets the same blocks, batches of 64 and
Adam. "backprop" trains the network that Associated Learning predicts with, end to end; "backprop, blocks"
trains blocks and a classifier. Each method's rate is the best of three, trained for three epochs, on 1,000
validation images with one seed; then three fresh seeds, tested on 2,000 test images. Beside Associated
Learning: the control with all f frozen at their random start, and the accuracy of each depth's shortcut.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plywise as pw
from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.local.associated_learning import pooled_bridge
from plywise.local.linear_heads import GradientHead, RidgeHead
from tuning import DATA

OUT = Path(__file__).with_suffix(".json")
RATES, TUNING_EPOCHS, TUNING_SEED, SEEDS = (3e-4, 1e-3, 3e-3), 3, 100, (0, 1, 2)
BATCH, CODE = 64, 64
Predict = Callable[[Tensor], Tensor]


# ---- the networks ----------------------------------------------------------------------------------


def mlp() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ELU()),
        nn.Sequential(nn.Linear(256, 256), nn.ELU()),
    ]


def cnn() -> list[nn.Module]:
    def block(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(after, after, 3, stride, padding=1),
            nn.ELU(),
        )

    return [block(1, 8, 1), block(8, 8, 2), block(8, 16, 1), block(16, 16, 2)]


def vgg() -> list[nn.Module]:
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
    """A data set, the blocks, and for how long."""

    data: str
    blocks: Callable[[], list[nn.Module]]
    images: int
    epochs: int


WORKLOADS = {
    "mnist-mlp": Workload("mnist", mlp, 10_000, 8),
    "fashion-mlp": Workload("fashion_mnist", mlp, 10_000, 8),
    "mnist-cnn": Workload("mnist", cnn, 4_000, 10),
    "fashion-cnn": Workload("fashion_mnist", cnn, 4_000, 10),
    "cifar-vgg": Workload("cifar10", vgg, 3_000, 6),
}


# ---- the methods: each makes (step, predict, extra predictors) -------------------------------------


@dataclass(frozen=True)
class Trained:
    """A method at work."""

    step: Callable[[Tensor, Tensor], object]
    predict: Predict
    depths: tuple[Predict, ...] = ()


def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def associated(blocks: pw.Blocks, rate: float, freeze: bool = False) -> Trained:
    if freeze:
        for block in blocks:
            block.requires_grad_(False)
    learner = pw.AssociatedLearning(blocks, 10, code=CODE, bridge=pooled_bridge, optimizer=adam(rate))
    depths = tuple(evaluated(learner.as_module(depth)) for depth in range(1, len(blocks) + 1))
    return Trained(learner.step, learner.predict, depths)


def evaluated(module: nn.Module) -> Predict:
    def predict(x: Tensor) -> Tensor:
        module.eval()
        with torch.no_grad():
            return module(x)

    return predict


def end_to_end(module: nn.Module, rate: float) -> Trained:
    optimizer = adam(rate)(module.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        module.train()
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()

    return Trained(step, evaluated(module))


def inference_path(blocks: pw.Blocks, rate: float) -> Trained:
    """The network that Associated Learning predicts with, sigmoids but the last, by cross entropy."""
    path = pw.AssociatedLearning(
        blocks, 10, code=CODE, bridge=pooled_bridge, optimizer=adam(rate)
    ).as_module()
    path.decoders[-1][1] = nn.Identity()  # cross entropy takes logits
    return end_to_end(path, rate)


def with_classifier(blocks: pw.Blocks) -> pw.Blocks:
    """The last block with a linear classifier behind it."""
    features = blocks.shapes[-1].numel()
    last = nn.Sequential(blocks[-1], nn.Flatten(), nn.Linear(features, 10))
    return pw.Blocks([*blocks[:-1], last], torch.zeros(2, *blocks.shapes[0]))


def learner_of(learner: pw.Learner) -> Trained:
    return Trained(learner.step, learner.predict)


MakeTrained = Callable[[pw.Blocks, float], Trained]
METHODS: dict[str, MakeTrained] = {
    "Associated Learning": associated,
    "Associated Learning, f frozen": lambda b, r: associated(b, r, freeze=True),
    "backprop": inference_path,
    "backprop, blocks": lambda b, r: end_to_end(nn.Sequential(*with_classifier(b)), r),
    "Interlocking 1 (LocalLoss)": lambda b, r: learner_of(
        pw.LocalLoss(with_classifier(b), 10, optimizer=adam(r))
    ),
    "Interlocking 2": lambda b, r: learner_of(
        pw.Interlocking(with_classifier(b), 10, horizon=2, optimizer=adam(r))
    ),
    "Interlocking 3": lambda b, r: learner_of(
        pw.Interlocking(with_classifier(b), 10, horizon=3, optimizer=adam(r))
    ),
    "Interlocking K (backprop)": lambda b, r: learner_of(
        pw.Interlocking(with_classifier(b), 10, horizon=len(b), optimizer=adam(r))
    ),
    "local forward gradient": lambda b, r: learner_of(
        pw.LocalForwardGradient(with_classifier(b), 10, optimizer=adam(r))
    ),
    "CaFo, gradient heads": lambda b, r: learner_of(
        pw.CascadedForward(b, 10, head=GradientHead, optimizer=adam(r))
    ),
    "CaFo, ridge heads": lambda b, r: learner_of(
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


def accuracy(predict: Predict, split: tuple[Tensor, Tensor]) -> float:
    x, y = split
    right = sum(
        int((predict(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return round(100 * right / len(y), 2)


def batches(split: tuple[Tensor, Tensor], epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = split
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(BATCH):
            yield x[rows], y[rows]


def train(
    workload: Workload, data: Any, make: MakeTrained, rate: float, seed: int, split: str
) -> dict[str, Any]:
    """One run; its accuracy on a split."""
    torch.manual_seed(seed)
    blocks = pw.Blocks(workload.blocks(), data["train"][0][:2])
    trained = make(blocks, rate)
    start = time.process_time()
    for x, y in batches(data["train"], TUNING_EPOCHS if split == "validation" else workload.epochs, seed):
        trained.step(x, y)
    clock = time.process_time() - start
    result = {
        "rate": rate,
        "seed": seed,
        "cpu": round(clock, 1),
        split: accuracy(trained.predict, data[split]),
    }
    if trained.depths and split == "test":
        result["depths"] = [accuracy(predict, data[split]) for predict in trained.depths]
    if split == "test":
        x, y = data["train"]
        result["train"] = accuracy(trained.predict, (x[:2_000], y[:2_000]))
    return result


def tuned(workload: Workload, data: Any, make: MakeTrained, rates: tuple[float, ...]) -> dict[str, Any]:
    """The rate that is best on the validation set, and the final runs with it."""
    tuning = [train(workload, data, make, rate, TUNING_SEED, "validation") for rate in rates]
    rate = max(tuning, key=lambda one: one["validation"])["rate"]
    return {"tuning": tuning, "final": [train(workload, data, make, rate, seed, "test") for seed in SEEDS]}


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
            rates = (RATES[1],) if method == "CaFo, ridge heads" else RATES  # a closed form has no rate
            done[method] = tuned(workload, data, METHODS[method], rates)
            rate, final = done[method]["final"][0]["rate"], done[method]["final"]
            print(f"{name:12} {method:32} rate {rate:g}  test {[one['test'] for one in final]}", flush=True)
            write_whole(OUT, json.dumps(result).replace('"tuning"', '\n"tuning"') + "\n")


# ---- the report ------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
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
                columns = zip(*(one["depths"] for one in final), strict=True)
                depths = " / ".join(f"{statistics.fmean(column):.1f}" for column in columns)
            test, training = (spread([one[key] for one in final]) for key in ("test", "train"))
            clock = statistics.median(one["cpu"] for one in final)
            print(f"| {method} | {final[0]['rate']:g} | {test} | {training} | {depths} | {clock:.0f} |")
    draw(result)


def draw(result: dict[str, Any]) -> None:
    """Test accuracies of all methods, workload by workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result), figsize=(15, 4.2), sharey=True)
    names = list(METHODS)
    for axis, (workload, methods) in zip(axes, result.items(), strict=True):
        for place, name in enumerate(reversed(names)):
            if name in methods:
                values = [one["test"] for one in methods[name]["final"]]
                colour = "#c0392b" if name.startswith("Associated") else "#1f5fa8"
                axis.scatter(values, [place] * len(values), s=16, color=colour)
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
    commands.add_parser("report", help="table and picture")
    options = parser.parse_args()
    if options.command == "run":
        run(options.workload or list(WORKLOADS))
    else:
        report()


if __name__ == "__main__":
    main()
