"""The local forward gradient on LocalMixer and CIFAR-10, beside backpropagation of the same network.

    python benchmarks/local_mixer.py run        # goes on where it was interrupted
    python benchmarks/local_mixer.py run --way "local forward gradient" --rate 1e-3

A LocalMixer of 4×4 patches, 64 channels in 8 groups and 3 blocks; 10,000 images, batches of 128, Adam, 1,200
steps, one seed. "local forward gradient" has a loss for each patch and group, as in the paper. After every
200 steps: the share of right validation, test and training images, in per cent.

The script has a loop of its own because a trial of the arena looks at the test images once, at its end.
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
from local_baselines import Stepper, Trained, adam
from local_learning import Workload, load
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.local.local_mixer import average_head, local_mixer

OUT = Path(__file__).with_suffix(".json")
STEPS, EVERY, BATCH, RATES, GROUPS = 1200, 200, 128, (1e-3, 3e-3), 8


def network() -> list[torch.nn.Module]:
    return local_mixer((3, 32, 32), 10, patches=4, channels=64, groups=GROUPS, blocks=3)


def backpropagation(rate: float, x: Tensor) -> Trained:
    stepper = Stepper(network(), F.cross_entropy, rate)
    return Trained(stepper.step, stepper.predict)


def forward_gradient(rate: float, x: Tensor) -> Trained:
    settings: dict[str, Any] = {
        "head": average_head,
        "patches": True,
        "groups": GROUPS,
        "optimizer": adam(rate),
    }
    learner = pw.LocalForwardGradient(pw.Blocks(network(), x[:2]), 10, **settings)
    return Trained(learner.step, learner.predict)


WAYS: dict[str, Callable[[float, Tensor], Trained]] = {
    "backpropagation": backpropagation,
    "local forward gradient": forward_gradient,
}


def train(way: str, rate: float, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = data["train"]
    trained, generator, start = WAYS[way](rate, x), torch.Generator().manual_seed(0), time.process_time()
    parts = {"validation": data["validation"], "test": data["test"], "train": (x[:2000], y[:2000])}
    curve = []
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        trained.step(x[rows], y[rows])
        if step % EVERY == 0:
            right = {name: accuracy(trained, part) for name, part in parts.items()}
            curve.append({"step": step, **right, "cpu_seconds": round(time.process_time() - start)})
            print(way, rate, curve[-1], flush=True)
    return {"way": way, "rate": rate, "curve": curve}


def accuracy(trained: Trained, part: tuple[Tensor, Tensor]) -> float:
    return round(100 * float((trained.predict(part[0]).argmax(1) == part[1]).double().mean()), 1)


def run(ways: list[str], rates: list[float]) -> None:
    result = json.loads(OUT.read_text()) if OUT.exists() else {"environment": environment(), "runs": []}
    data = load(Workload("cifar10", network, 10_000, 0))
    done = [(one["way"], one["rate"]) for one in result["runs"]]
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
