"""What `rule.record` costs: steps with and without it, in turns, and what a measured step costs alone.

Cycles of as many steps as lie between two measured ones take turns in one process, recording and not, in
shuffled order. The extra time of a cycle over that of a plain one is what recording costs; the aim is 2 %.
A second plain cycle is the null control.

    python benchmarks/telemetry_cost.py
    python benchmarks/telemetry_cost.py --rounds 3 --every 10     # small, to see that it works
    python benchmarks/telemetry_cost.py --device cuda
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import plywise as pw
from step_cost import NETS

RULES = {"ProxProp": pw.ProxProp, "NLMS": pw.NLMS, "Foof": pw.Foof, "KFAC": pw.KFAC}


class Arm:
    """A network in training under a rule, perhaps recorded."""

    def __init__(self, net: str, rule: str, every: int | None, device: str) -> None:
        make, shape = NETS[net]
        torch.manual_seed(0)
        self.model = make().to(device)
        self.x = torch.randn(shape, device=device)
        outputs = self.model(self.x).shape[1]
        self.y = torch.arange(shape[0], device=device) % outputs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.rule = RULES[rule]().attach(self.model, self.optimizer)
        if every is not None:
            self.rule.record(every=every)

    def run(self, steps: int) -> float:
        """Seconds that so many steps take."""
        if self.x.is_cuda:
            torch.cuda.synchronize()
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.process_time() - start


def measure(net: str, rule: str, every: int, rounds: int, device: str) -> dict[str, float]:
    """Medians of the ratios to plain cycles."""
    arms = {
        "plain": Arm(net, rule, None, device),
        "again": Arm(net, rule, None, device),
        "recorded": Arm(net, rule, every, device),
    }
    for arm in arms.values():
        arm.run(2 * every)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        order = list(arms)
        random.shuffle(order)
        for name in order:
            seconds[name].append(arms[name].run(every))
    ratios = {
        name: statistics.median(one / plain for one, plain in zip(times, seconds["plain"], strict=True))
        for name, times in seconds.items()
    }
    return {
        "extra": ratios["recorded"] - 1,
        "null control": ratios["again"] - 1,
        "a measured step in plain steps": 1 + (ratios["recorded"] - 1) * every,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for net in NETS:
        for rule in RULES:
            one = measure(net, rule, arguments.every, arguments.rounds, arguments.device)
            found[f"{net}, {rule}"] = one
            print(f"{net:32s} {rule:9s} " + ", ".join(f"{name} {value:.2%}" for name, value in one.items()))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
