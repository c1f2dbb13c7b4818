"""Find out why the last depth of Associated Learning falls behind on convolutional networks.

    python benchmarks/associated_depth.py run          # takes some minutes; resumes if interrupted
    python benchmarks/associated_depth.py run --workload fashion-cnn --arm "as shipped" --seed 1

The script trains the CNN of `local_learning.py` on 4,000 images of MNIST, and its VGG on 3,000 of CIFAR-10,
at the rate that was best there. After training it measures for every depth, on test images:

- "path": the accuracy of the depth's prediction, through all decoders below; "train" is the same on training
  images;
- "nearest": the accuracy of the class whose code is nearest to the bridge's output, which needs no decoder;
- "probe": the accuracy of a ridge regression on the block's activations, pooled to 4×4, as a measure of their
  information about the classes;
- "apart": the distance between the codes of the two nearest classes, over the root mean square distance of
  the bridge's output from its code.

The arm "fixed codes" never trains the encoders of the targets; "longer" trains for three times the epochs.

The script has its own training loop because it inspects each trained learner, while a trial of the arena
keeps only predictions, and because all arms of an experiment of the arena train for the same number of
epochs.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plywise as pw
from local_learning import BATCH, CODE, WORKLOADS, compute_accuracy, load, make_adam
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise._util.modes import evaluating
from plywise.local.associated_maps import apart_encoder, pooled_bridge

OUT = Path(__file__).with_suffix(".json")
RATE = 3e-3


def make_fixed_encoder(codes: Tensor, width: int) -> nn.Module:
    return apart_encoder(codes, width).requires_grad_(False)


ARMS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "fixed codes": {"encoder": make_fixed_encoder},
    "longer": {"longer": 3},
}
RUNS = [
    (workload, arm, seed)
    for workload in ("cifar-vgg", "mnist-cnn", "fashion-cnn")
    for seed in (0, 1, 2)
    for arm in ARMS
]
"""The default runs: workload, arm, seed."""


def draw_batches(split: tuple[Tensor, Tensor], epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = split
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(BATCH):
            yield x[rows], y[rows]


def train(
    name: str, seed: int, longer: int = 1, **settings: Any
) -> tuple[pw.AssociatedLearning, dict[str, Any]]:
    workload = WORKLOADS[name]
    data = load(workload)
    torch.manual_seed(seed)
    blocks = pw.Blocks(workload.blocks(), data["train"][0][:2])
    learner = pw.AssociatedLearning(
        blocks, 10, **{"code": CODE, "bridge": pooled_bridge, "optimizer": make_adam(RATE), **settings}
    )
    for x, y in draw_batches(data["train"], longer * workload.epochs, seed):
        learner.step(x, y)
    return learner, data


def compute_activations(blocks: list[Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        parts = []
        for part in x.split(500):
            for block in blocks:
                part = block(part)
            parts.append(part)
        return torch.cat(parts)


def measure_probe(train: Tensor, y: Tensor, test: Tensor, targets: Tensor) -> float:
    """Return the accuracy of a ridge regression.

    It takes the best of three dampings on test images, which makes all arms look better than they are.
    """

    def add_bias(s: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(s, 4) if s.dim() == 4 else s
        s = s.flatten(1).double()
        return torch.cat([s, s.new_ones(len(s), 1)], 1)

    a, b = add_bias(train), add_bias(test)
    gram, right = a.T @ a / len(a), a.T @ F.one_hot(y, 10).double() / len(a)
    scale, eye = gram.diagonal().mean(), torch.eye(len(gram), dtype=gram.dtype)
    predictions = [
        (b @ torch.linalg.solve(gram + damping * scale * eye, right)).argmax(1)
        for damping in (1e-4, 1e-3, 1e-2)
    ]
    return max(100 * float((prediction == targets).double().mean()) for prediction in predictions)


def measure_depths(learner: pw.AssociatedLearning, data: Any) -> list[dict[str, float]]:
    """Measure every depth of a trained learner."""
    results, codes = [], torch.eye(10)
    (x, y), (tx, ty) = data["train"], data["test"]
    components = learner._components
    for depth, component in enumerate(components, 1):
        module = learner.as_module(depth)
        with evaluating(module), torch.no_grad():
            codes = component.encoder(codes)
            blocks = [part.block for part in components[:depth]]
            s, test = compute_activations(blocks, x), compute_activations(blocks, tx)
            bridged = torch.cat([component.bridge(part) for part in test.split(500)])
            between = torch.cdist(codes, codes) + 1e9 * torch.eye(10)
            error = (bridged - codes[ty]).square().sum(1).mean().sqrt()
            results.append(
                {
                    "path": compute_accuracy(module, data["test"]),
                    "train": compute_accuracy(module, (x[:2000], y[:2000])),
                    "nearest": 100 * float((torch.cdist(bridged, codes).argmin(1) == ty).double().mean()),
                    "probe": measure_probe(s, y, test, ty),
                    "apart": float(between.min() / error),
                }
            )
    return [{key: round(value, 2) for key, value in depth.items()} for depth in results]


def run(runs: list[tuple[str, str, int]]) -> None:
    result = json.loads(OUT.read_text()) if OUT.exists() else {"environment": environment(), "runs": []}
    done = [(entry["workload"], entry["arm"], entry["seed"]) for entry in result["runs"]]
    for workload, arm, seed in runs:
        if (workload, arm, seed) not in done:
            depths = measure_depths(*train(workload, seed, **ARMS[arm]))
            result["runs"].append({"workload": workload, "arm": arm, "seed": seed, "depths": depths})
            write_whole(OUT, json.dumps(result).replace('{"workload"', '\n{"workload"') + "\n")
            print(workload, arm, seed, [depth["path"] for depth in depths], flush=True)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and measure")
    running.add_argument("--workload", choices=list(WORKLOADS))
    running.add_argument("--arm", choices=list(ARMS), default="as shipped")
    running.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run([(options.workload, options.arm, options.seed)] if options.workload else RUNS)


if __name__ == "__main__":
    main()
