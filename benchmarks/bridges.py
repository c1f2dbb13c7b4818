"""Measure the accuracy of Associated Learning with the bridges that `benchmarks/pipeline.py` times.

    python benchmarks/bridges.py       # writes benchmarks/bridges.json; resumes if interrupted

The network has 784 inputs, 4 hidden layers of 1024 and 10 outputs, and trains on 10,000 images of MNIST and
of Fashion-MNIST. Tuning and tests are those of `local_learning.py`, with two rates. "the paper's bridge, code
64, backprop" trains the network that Associated Learning predicts with; "blocks and a classifier" trains only
the blocks.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import plywise as pw
from local_learning import (
    METHODS,
    MakeTrainer,
    Trainer,
    Workload,
    format_spread,
    load,
    make_adam,
    make_end_to_end,
    tune_and_train,
    wrap_learner,
)
from pipeline_arms import BRIDGES, INPUT, LAYERS, WIDTH
from plywise._util.environment import environment
from plywise._util.files import write_whole

OUT = Path(__file__).with_suffix(".json")
RATES, EPOCHS = (1e-3, 3e-3), 5
SMALL = 3e-4  # an additional rate for backpropagation, the reference


def make_wide_blocks() -> list[nn.Module]:
    layers = [nn.Sequential(nn.Linear(a, b), nn.ELU()) for a, b in pairwise([INPUT] + [WIDTH] * LAYERS)]
    return [nn.Sequential(nn.Flatten(), layers[0]), *layers[1:]]


def make_learner(blocks: pw.Blocks, rate: float, bridge: str) -> pw.AssociatedLearning:
    code, make = BRIDGES[bridge]
    return pw.AssociatedLearning(blocks, 10, code=code, bridge=make, optimizer=make_adam(rate))


def make_associated(bridge: str) -> MakeTrainer:
    return lambda blocks, rate: wrap_learner(make_learner(blocks, rate, bridge))


def make_backprop(bridge: str) -> MakeTrainer:
    def make(blocks: pw.Blocks, rate: float) -> Trainer:
        path = make_learner(blocks, rate, bridge).as_module()
        path.decoders[-1][1] = nn.Identity()  # cross entropy takes logits
        return make_end_to_end(path, rate)

    return make


def main() -> None:
    torch.set_num_threads(1)
    result = json.loads(OUT.read_text()) if OUT.exists() else {"environment": environment(), "data": {}}
    narrow = [name for name in BRIDGES if name != "the paper's bridge, code 256"]  # takes hours on one core
    arms = {f"{name}, AL": make_associated(name) for name in narrow}
    arms[f"{narrow[0]}, backprop"] = make_backprop(narrow[0])
    arms["blocks and a classifier, backprop"] = METHODS["backprop, blocks"]
    for name in ("mnist", "fashion_mnist"):
        workload = Workload(name, make_wide_blocks, 10_000, EPOCHS)
        data, done = load(workload), result["data"].setdefault(name, {})
        for arm, make in arms.items():
            if arm not in done:
                rates = (SMALL, *RATES) if arm.endswith("backprop") else RATES
                done[arm] = tune_and_train(workload, data, make, rates)
                write_whole(OUT, json.dumps(result, indent=1) + "\n")
            print(
                f"{name:14} {arm:40} {format_spread([run['test'] for run in done[arm]['final']])}", flush=True
            )


if __name__ == "__main__":
    main()
