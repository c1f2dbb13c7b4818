"""Measure how the cost of a training step grows with the width of a network, and the cost on a transformer.

The networks are 784-w-w-10 with batch 256, and a transformer of 10.7 million parameters on 8 × 64 tokens.
Each arm has its own model; the arms take turns in shuffled order, a cycle of ten steps each, in one process.
The figures are CPU times of the mean step of a cycle over that of fused AdamW in the same round, as medians
over the rounds; a second fused AdamW is the null control. "slowest" is the slowest step of a cycle over its
median step. Peak memory is measured in a separate process for each arm, over AdamW's. Muon and SOAP multiply
w × w matrices, which takes minutes per step from w = 4096 on, so they are left out there.

    OMP_NUM_THREADS=1 python benchmarks/width_cost.py --json benchmarks/width_cost.json
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import plywise as pw
from peers_cost import CYCLE, RATE, WARM, Transformer, compute_ratios, make_grouped
from plywise.optim import SOAP, Muon
from step_cost import describe_environment, make_mlp, read_peak

WIDTHS = (512, 1024, 2048, 4096, 8192)
BATCH, WIDEST_SQUARE, NULL = 256, 2048, "AdamW, fused, again (null control)"


def make_attached(make_rule: Callable[[], pw.Rule]) -> Callable[[nn.Module, Tensor], Any]:
    """Return a function that makes AdamW under a rule."""

    def make(model: nn.Module, x: Tensor) -> Any:
        optimizer = AdamW(model.parameters(), RATE, fused=True)
        make_rule().attach(model, optimizer)
        return optimizer

    return make


def make_plain(model: nn.Module, x: Tensor) -> Any:
    """Make AdamW without a rule."""
    return AdamW(model.parameters(), RATE, fused=True)


EVERY = {"stats_every": CYCLE, "refresh_every": CYCLE}
ARMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "AdamW, fused": make_plain,
    NULL: make_plain,
    "recommended": lambda model, x: pw.recommend(model, RATE, batch=x).optimizer,
    "Foof on AdamW": make_attached(lambda: pw.Foof(**EVERY, slowdown=1)),
    "FeatureWhitening on AdamW": make_attached(lambda: pw.FeatureWhitening(**EVERY)),
    "ProxProp on AdamW": make_attached(pw.ProxProp),
    "Muon": lambda model, x: make_grouped(Muon, adjust_lr_fn="match_rms_adamw")(model.parameters()),
    "SOAP": lambda model, x: SOAP(model.parameters(), RATE),
}
SQUARE = ("Muon", "SOAP")
"""Arms whose steps multiply square matrices as wide as the layers."""


def make_net(net: str) -> tuple[nn.Module, Tensor]:
    """Make a network by its name, and a batch of inputs."""
    torch.manual_seed(0)
    if net == "transformer":
        return Transformer(384, 6, 6), torch.rand(8, 64 * 384)
    return make_mlp(784, int(net), int(net), 10), torch.rand(BATCH, 784)


def list_arms(net: str) -> list[str]:
    """List the arms to time on a network."""
    wide = net != "transformer" and int(net) > WIDEST_SQUARE
    return [arm for arm in ARMS if not (wide and arm in SQUARE)]


class Runner:
    """The model, optimizer and batch of one arm."""

    def __init__(self, net: str, arm: str) -> None:
        self.model, self.x = make_net(net)
        self.y = torch.arange(len(self.x)) % 10
        self.optimizer = ARMS[arm](self.model, self.x)

    def run(self, steps: int) -> list[float]:
        """Run some steps, and return the CPU seconds of each."""
        clocks = []
        for _ in range(steps):
            start = time.process_time()
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            clocks.append(time.process_time() - start)
        return clocks


def measure(net: str, rounds: int) -> dict[str, dict[str, float]]:
    """Measure all arms on one network."""
    runners = {arm: Runner(net, arm) for arm in list_arms(net)}
    for runner in runners.values():
        runner.run(WARM)
    means: dict[str, list[float]] = {arm: [] for arm in runners}
    slowest: dict[str, list[float]] = {arm: [] for arm in runners}
    order = random.Random(0)
    for _ in range(rounds):
        for arm in order.sample(list(runners), len(runners)):
            clocks = runners[arm].run(CYCLE)
            means[arm].append(statistics.fmean(clocks))
            slowest[arm].append(max(clocks) / statistics.median(clocks))
    return {
        arm: {
            "cost": statistics.median(compute_ratios(seconds, means["AdamW, fused"])),
            "ms": 1e3 * statistics.median(seconds),
            "slowest": statistics.median(slowest[arm]),
        }
        for arm, seconds in means.items()
    }


def read_peaks(net: str) -> dict[str, float]:
    """Return the peak of two steps in MiB above an idle process, for each arm in its own process."""
    peaks = {}
    for arm in list_arms(net):
        command = [sys.executable, __file__, "--peak-of", arm, "--only", net]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
        peaks[arm] = float(run.stdout)
    return peaks


def print_peak(net: str, arm: str) -> None:
    """Print the measurement of `read_peaks`, inside its process."""
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # allocate the buffers of the libraries
    base = read_peak("cpu")
    Runner(net, arm).run(2)
    print(read_peak("cpu") - base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="measure one network: a width, or transformer")
    parser.add_argument(
        "--json", type=Path, help="file to write after each network; it keeps the other networks"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print_peak(options.only, options.peak_of)
        return
    stored = options.json and options.json.exists() and json.loads(options.json.read_text())["nets"]
    nets: dict[str, Any] = dict(stored or {})
    for net in [options.only] if options.only else [*map(str, WIDTHS), "transformer"]:
        nets[net] = measure(net, options.rounds)
        peaks = read_peaks(net)
        print(f"\n{net}\n{'arm':38} {'ms':>9} {'cost':>6} {'slowest':>8} {'peak memory':>12}")
        for arm, row in nets[net].items():
            row["memory"] = peaks[arm] / peaks["AdamW, fused"]
            print(f"{arm:38} {row['ms']:9.2f} {row['cost']:6.2f} {row['slowest']:8.2f} {row['memory']:12.2f}")
        if options.json:
            result = {"environment": describe_environment("cpu", 1), "nets": nets}
            options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
