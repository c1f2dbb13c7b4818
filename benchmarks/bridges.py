"""Accuracy of Associated Learning with the bridges that `benchmarks/pipeline.py` times.

    python benchmarks/bridges.py       # writes benchmarks/bridges.json; resumes if interrupted

784 → 4 hidden layers of 1024 → 10 on 10,000 images of MNIST and Fashion-MNIST, tuned and tested as in
`local_learning.py`, with two rates. "the paper's bridge, code 64, backprop" trains the network that
Associated Learning predicts with; "blocks and a classifier" the blocks alone.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import plywise as pw
from local_learning import (
    METHODS,
    MakeTrained,
    Trained,
    Workload,
    adam,
    end_to_end,
    learner_of,
    load,
    spread,
    tuned,
)
from pipeline_arms import BRIDGES, INPUT, LAYERS, WIDTH
from plywise._util.environment import environment
from plywise._util.files import write_whole

OUT = Path(__file__).with_suffix(".json")
RATES, EPOCHS = (1e-3, 3e-3), 5
SMALL = 3e-4  # tried for backpropagation besides: it may have every chance


def wide() -> list[nn.Module]:
    layers = [nn.Sequential(nn.Linear(a, b), nn.ELU()) for a, b in pairwise([INPUT] + [WIDTH] * LAYERS)]
    return [nn.Sequential(nn.Flatten(), layers[0]), *layers[1:]]


def learner(blocks: pw.Blocks, rate: float, bridge: str) -> pw.AssociatedLearning:
    code, make = BRIDGES[bridge]
    return pw.AssociatedLearning(blocks, 10, code=code, bridge=make, optimizer=adam(rate))


def associated(bridge: str) -> MakeTrained:
    return lambda blocks, rate: learner_of(learner(blocks, rate, bridge))


def backprop(bridge: str) -> MakeTrained:
    def make(blocks: pw.Blocks, rate: float) -> Trained:
        path = learner(blocks, rate, bridge).as_module()
        path.decoders[-1][1] = nn.Identity()  # cross entropy takes logits
        return end_to_end(path, rate)

    return make


def main() -> None:
    torch.set_num_threads(1)
    result = json.loads(OUT.read_text()) if OUT.exists() else {"environment": environment(), "data": {}}
    narrow = [name for name in BRIDGES if name != "the paper's bridge, code 256"]  # hours of one core
    arms = {f"{name}, AL": associated(name) for name in narrow}
    arms[f"{narrow[0]}, backprop"] = backprop(narrow[0])
    arms["blocks and a classifier, backprop"] = METHODS["backprop, blocks"]
    for name in ("mnist", "fashion_mnist"):
        workload = Workload(name, wide, 10_000, EPOCHS)
        data, done = load(workload), result["data"].setdefault(name, {})
        for arm, make in arms.items():
            if arm not in done:
                rates = (SMALL, *RATES) if arm.endswith("backprop") else RATES
                done[arm] = tuned(workload, data, make, rates)
                write_whole(OUT, json.dumps(result, indent=1) + "\n")
            print(f"{name:14} {arm:40} {spread([one['test'] for one in done[arm]['final']])}", flush=True)


if __name__ == "__main__":
    main()
