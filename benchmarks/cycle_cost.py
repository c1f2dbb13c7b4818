"""Measure the cost of a training step under rules with running statistics, over whole refresh cycles.

The network is 784-1024-1024-10 with batches of 256, 1024 and 4096; the rules refresh every 10 steps. Each arm
has its own model and optimizer, and first runs until every preconditioner has been computed once. Then blocks
of one cycle take turns in shuffled order, each between two blocks of plain SGD with momentum. The ratio is a
block's time over the mean of these two. The figures are the median ratios of CPU and wall time over the
rounds, and the slowest single step over the arm's median step.

    python benchmarks/step_cost.py --cycles --json benchmarks/cycle_cost.json
"""

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import SGD, AdamW, Optimizer

import plywise as pw

CYCLE, WARM = 10, 30
BATCHES = (256, 1024, 4096)
WIDTHS = (784, 1024, 1024, 10)


@dataclass(frozen=True)
class Arm:
    """A rule (or none) on an optimizer; ``up_to`` is the largest batch size to time."""

    rule: Callable[[], pw.Rule] | None = None
    optimizer: Callable[[Any], Optimizer] = lambda parameters: SGD(parameters, 1e-4, momentum=0.9)
    up_to: int = 4096


def make_peer(name: str, **settings: Any) -> Callable[[Any], Optimizer]:
    def make(parameters: Any) -> Optimizer:
        import peers

        return getattr(peers, name)(parameters, 1e-4, **settings)

    return make


EVERY = {"stats_every": CYCLE, "refresh_every": CYCLE}
ARMS = {
    "plain again (null control)": Arm(),
    "AdamW": Arm(optimizer=lambda parameters: AdamW(parameters, 1e-4)),
    "Foof (rank 128)": Arm(lambda: pw.Foof(**EVERY, slowdown=1)),
    "Foof, dense": Arm(lambda: pw.Foof(rank=None, **EVERY, slowdown=1)),
    "Foof, rank 32": Arm(lambda: pw.Foof(rank=32, **EVERY, slowdown=1)),
    "FeatureWhitening (rank 128)": Arm(lambda: pw.FeatureWhitening(**EVERY)),
    "FeatureWhitening, dense": Arm(lambda: pw.FeatureWhitening(rank=None, **EVERY)),
    "FeatureWhitening, dense, refresh 50": Arm(lambda: pw.FeatureWhitening(rank=None)),
    "FeatureWhitening, rank 32": Arm(lambda: pw.FeatureWhitening(rank=32, **EVERY)),
    "RLS": Arm(pw.RLS),
    "AdaBK": Arm(lambda: pw.AdaBK(**EVERY)),
    "AdaBK, rank 32": Arm(lambda: pw.AdaBK(rank=32, **EVERY)),
    "KFAC": Arm(lambda: pw.KFAC(**EVERY)),
    "KFAC, rank 32": Arm(lambda: pw.KFAC(rank=32, **EVERY)),
    "Coordinates on AdamW": Arm(lambda: pw.Coordinates(**EVERY, slowdown=1), lambda p: AdamW(p, 1e-4)),
    "torch Muon + AdamW": Arm(optimizer=make_peer("torch_muon"), up_to=1024),
    "SOAP (pytorch_optimizer)": Arm(optimizer=make_peer("soap"), up_to=1024),
    "Shampoo (pytorch_optimizer), every 10": Arm(optimizer=make_peer("shampoo", every=10), up_to=256),
}


class Runner:
    """The model, optimizer and batch of one arm."""

    def __init__(self, arm: Arm, make: Callable[..., torch.nn.Module], batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = make(*WIDTHS).to(device)
        self.optimizer = arm.optimizer(self.model.parameters())
        if arm.rule is not None:
            arm.rule().attach(self.model, self.optimizer)
        self.x = torch.rand(batch, WIDTHS[0], device=device)
        self.y = torch.randint(10, (batch,), device=device)

    def run_block(self, steps: int) -> list[tuple[float, float]]:
        """Run some steps, and return the CPU and wall seconds of each."""
        clocks = []
        for _ in range(steps):
            self._wait()
            cpu, wall = time.process_time(), time.perf_counter()
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            self._wait()
            clocks.append((time.process_time() - cpu, time.perf_counter() - wall))
        return clocks

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(make: Callable[..., torch.nn.Module], batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure all arms at one batch size."""
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    plain = Runner(Arm(), make, batch, device)
    runners = {name: Runner(arm, make, batch, device) for name, arm in ARMS.items() if batch <= arm.up_to}
    for runner in (plain, *runners.values()):
        runner.run_block(WARM)
    # a whole cycle for arms that refresh less often
    length = {name: 50 if "refresh 50" in name else CYCLE for name in runners}
    ratios: dict[str, list[tuple[float, ...]]] = {name: [] for name in runners}
    steps: dict[str, list[float]] = {name: [] for name in runners}
    order = random.Random(0)
    before = _mean(plain.run_block(CYCLE))
    for _ in range(rounds):
        for name in order.sample(list(runners), len(runners)):
            clocks = runners[name].run_block(length[name])
            after = _mean(plain.run_block(CYCLE))
            ratios[name].append(
                tuple(2 * o / (b + a) for o, b, a in zip(_mean(clocks), before, after, strict=True))
            )
            steps[name] += [cpu for cpu, _ in clocks]
            before = after
    table = {}
    for name, pairs in ratios.items():
        cpu, wall = ([pair[i] for pair in pairs] for i in (0, 1))
        low, middle, high = statistics.quantiles(cpu, n=4)
        middle_step = statistics.median(steps[name])
        # the slowest step of a cycle, not of the whole run, since other programs disturb single steps
        per_cycle = length[name]
        slowest = statistics.median(
            max(steps[name][i : i + per_cycle]) for i in range(0, len(steps[name]), per_cycle)
        )
        table[name] = {
            "cpu": middle,
            "cpu_low": low,
            "cpu_high": high,
            "wall": statistics.median(wall),
            "slowest_step": slowest / middle_step,
        }
    return table


def _mean(clocks: list[tuple[float, float]]) -> tuple[float, float]:
    cpu, wall = zip(*clocks, strict=True)
    return statistics.fmean(cpu), statistics.fmean(wall)


def print_table(batch: int, table: dict[str, Any]) -> None:
    """Print the table of one batch size."""
    print(f"\n784-1024-1024-10, batch {batch}: the mean step of a cycle relative to plain SGD")
    print(f"{'arm':40} {'CPU':>6} {'quartiles':>14} {'wall':>6} {'slowest/median step':>20}")
    for name, row in table.items():
        spread = f"{row['cpu_low']:.2f} - {row['cpu_high']:.2f}"
        print(f"{name:40} {row['cpu']:6.2f} {spread:>14} {row['wall']:6.2f} {row['slowest_step']:20.2f}")
