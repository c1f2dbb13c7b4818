"""Compare the local forward gradient with backpropagation on LocalMixer and CIFAR-10.

    python benchmarks/local_mixer.py run        # resumes if interrupted
    python benchmarks/local_mixer.py run --way "local forward gradient" --rate 1e-3

The network is a LocalMixer with 4×4 patches, 64 channels in 8 groups and 3 blocks. It trains on 10,000 images
with batches of 128 and Adam for 1,200 steps, with one seed. "local forward gradient" has a loss for each
patch and group, as in the paper. After every 200 steps the script measures the accuracy on validation, test
and training images, in per cent.

The script has its own training loop because a trial of the arena uses the test images only once, at its end.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plywise as pw
from local_baselines import Stepper, Trainer, make_adam
from local_learning import Workload, load
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.local.local_mixer import average_head, local_mixer

OUT = Path(__file__).with_suffix(".json")
STEPS, EVERY, BATCH, RATES, GROUPS = 1200, 200, 128, (1e-3, 3e-3), 8


def make_network() -> list[torch.nn.Module]:
    return local_mixer((3, 32, 32), 10, patches=4, channels=64, groups=GROUPS, blocks=3)


def make_backpropagation(rate: float, x: Tensor) -> Trainer:
    stepper = Stepper(make_network(), F.cross_entropy, rate)
    return Trainer(stepper.step, stepper.predict)


def make_forward_gradient(rate: float, x: Tensor) -> Trainer:
    settings: dict[str, Any] = {
        "head": average_head,
        "patches": True,
        "groups": GROUPS,
        "optimizer": make_adam(rate),
    }
    learner = pw.LocalForwardGradient(pw.Blocks(make_network(), x[:2]), 10, **settings)
    return Trainer(learner.step, learner.predict)


WAYS: dict[str, Callable[[float, Tensor], Trainer]] = {
    "backpropagation": make_backpropagation,
    "local forward gradient": make_forward_gradient,
}


def train(way: str, rate: float, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = data["train"]
    trainer, generator, start = WAYS[way](rate, x), torch.Generator().manual_seed(0), time.process_time()
    parts = {"validation": data["validation"], "test": data["test"], "train": (x[:2000], y[:2000])}
    curve = []
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        trainer.step(x[rows], y[rows])
        if step % EVERY == 0:
            accuracies = {name: compute_accuracy(trainer, part) for name, part in parts.items()}
            curve.append({"step": step, **accuracies, "cpu_seconds": round(time.process_time() - start)})
            print(way, rate, curve[-1], flush=True)
    return {"way": way, "rate": rate, "curve": curve}


def compute_accuracy(trainer: Trainer, part: tuple[Tensor, Tensor]) -> float:
    return round(100 * float((trainer.predict(part[0]).argmax(1) == part[1]).double().mean()), 1)


def run(ways: list[str], rates: list[float]) -> None:
    result = json.loads(OUT.read_text()) if OUT.exists() else {"environment": environment(), "runs": []}
    data = load(Workload("cifar10", make_network, 10_000, 0))
    done = [(entry["way"], entry["rate"]) for entry in result["runs"]]
    for way in ways:
        for rate in rates:
            if (way, rate) not in done:
                result["runs"].append(train(way, rate, data))
                write_whole(OUT, json.dumps(result).replace('{"way"', '\n{"way"') + "\n")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and write the curve")
    running.add_argument("--way", choices=list(WAYS))
    running.add_argument("--rate", type=float)
    options = parser.parse_args()
    run([options.way] if options.way else list(WAYS), [options.rate] if options.rate else list(RATES))


if __name__ == "__main__":
    main()
