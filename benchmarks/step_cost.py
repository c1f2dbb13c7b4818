"""What a whole training step costs with each rule, relative to plain backpropagation.

A step is zero_grad, forward, loss, backward and the optimizer's step. All rules take turns in one process
in shuffled order, each (after a first step that is not timed) between two plain steps; the ratio is a
step's time over the mean of those two.
Medians over the rounds, CPU time beside wall time, a second plain step as null control. Peak memory is
measured in processes of their own for each rule.

    python benchmarks/step_cost.py --threads 1 --rounds 25
    python benchmarks/step_cost.py --device cuda

Rules with memory are measured over whole cycles of refreshing, see `cycle_cost`:

    python benchmarks/step_cost.py --cycles
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cycle_cost
import plywise as pw
import step_counts


def mlp(*widths: int) -> nn.Sequential:
    """A ReLU network with these widths."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    """The ConvNet of the ProxProp paper's code on 32×32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 20, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 20, 5, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1280, 10),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "8-64-64-2, batch 64": (lambda: mlp(8, 64, 64, 2), (64, 8)),
    "64-128-128-128-10, batch 128": (lambda: mlp(64, 128, 128, 128, 10), (128, 64)),
    "3072-4000-1000-4000-10, batch 500": (lambda: mlp(3072, 4000, 1000, 4000, 10), (500, 3072)),
    "784-1024-1024-10, batch 256": (lambda: mlp(784, 1024, 1024, 10), (256, 784)),
    "ConvNet 16-20-20 of 5×5, batch 500": (convnet, (500, 3, 32, 32)),
}

RULES: dict[str, Callable[[], pw.Rule | None]] = {
    "plain again (null control)": lambda: None,
    "Backprop (identity)": pw.Backprop,
    "BackMatching rate (trace)": pw.BackMatching,
    "NLMS (diagonal)": pw.NLMS,
    "ProxProp exact": pw.ProxProp,
    "ProxProp CG(3)": lambda: pw.ProxProp(solver="cg", cg_steps=3),
    "Consequentialism": pw.Consequentialism,
    "BackMatching exact": lambda: pw.BackMatching(mode="exact"),
}


QUICK = 10**6
"""Networks with fewer weights are timed for several steps at once, after as many as the engine explores."""


class Stepper:
    """One network, its data and its optimizer; rules come and go between steps."""

    def __init__(self, net: str, device: str) -> None:
        make, shape = NETS[net]
        torch.manual_seed(0)
        self.device = device
        self.model = make().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.x = torch.rand(shape, device=device)
        classes = self.model(self.x).shape[1]
        self.y = torch.randint(classes, shape[:1], device=device)
        is_quick = sum(p.numel() for p in self.model.parameters()) < QUICK
        self.warm_steps, self.timed_steps = (4, 10) if is_quick else (1, 1)

    def loss(self) -> Tensor:
        """The loss of the batch."""
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> Tensor:
        """One training step."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed(self, rule: pw.Rule | None) -> tuple[float, float]:
        """CPU and wall seconds with ``rule`` attached, after some steps that are not timed."""
        if rule is not None:
            rule.attach(self.model, self.optimizer)
        for _ in range(self.warm_steps):
            self.step()
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(self.timed_steps):
            self.step()
        self._wait()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if rule is not None:
            rule.detach()
        return cpu, wall

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(net: str, names: list[str], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median CPU and wall ratio, with quartiles, for each rule."""
    stepper = Stepper(net, device)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:  # warm up every path
        stepper.timed(RULES[name]())
    order = random.Random(0)
    before = stepper.timed(None)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            own = stepper.timed(RULES[name]())
            after = stepper.timed(None)
            ratios[name].append(tuple(2 * o / (b + a) for o, b, a in zip(own, before, after, strict=True)))
            before = after
    table = {}
    for name, pairs in ratios.items():
        cpu, wall = ([pair[i] for pair in pairs] for i in (0, 1))
        low, middle, high = statistics.quantiles(cpu, n=4)
        table[name] = {
            "cpu": middle,
            "cpu_low": low,
            "cpu_high": high,
            "wall": statistics.median(wall),
        }
    return table


def peak_memory(net: str, name: str, device: str, threads: int) -> float:
    """MiB above an idle process at the peak of three steps, the least of two processes of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--net", net, "--device", device]
    command += ["--threads", str(threads)]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600) for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


def own_peak(net: str, name: str, device: str) -> float:
    """The measurement of `peak_memory`, inside its process."""
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own buffers
    base = read_peak(device)
    stepper, rule = Stepper(net, device), RULES[name]()
    if rule is not None:
        rule.attach(stepper.model, stepper.optimizer)
    for _ in range(3):
        stepper.step()
    return read_peak(device) - base


def read_peak(device: str) -> float:
    """MiB at the peak of this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # not getrusage: its maximum is inherited from the process that started this one
    high_water = next(line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    return int(high_water.split()[1]) / 1024


def environment(device: str, threads: int) -> dict[str, str | int]:
    """What the figures depend on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": threads,
        "torch": torch.__version__,
        "plywise": pw.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--net", action="append", choices=list(NETS), help="default: all")
    parser.add_argument("--rule", action="append", choices=list(RULES), help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--cycles", action="store_true", help="rules with memory, over whole cycles")
    parser.add_argument("--count", action="store_true", help="Python calls and host synchronisations a step")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    nets, names = options.net or list(NETS), options.rule or list(RULES)
    if options.peak_of:
        print(own_peak(nets[0], options.peak_of, options.device))
        return
    if options.count:
        show_counts(nets, names)
        return
    result: dict[str, Any] = {"environment": environment(options.device, options.threads), "nets": {}}
    if options.cycles:
        measure_cycles(options, result)
        return
    if options.json and options.json.exists() and options.net:  # some nets again: the others' figures stay
        result["nets"] = json.loads(options.json.read_text())["nets"]
    for net in nets:
        table = measure(net, names, options.rounds, options.device)
        if not options.no_memory:
            add_memory(table, net, options)
        show_table(table, f"{net}, {options.device}, {options.threads} thread(s)")
        result["nets"][net] = table
    write_figures(options.json, result)


def measure_cycles(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Steps of rules with running statistics, over whole cycles of refreshing."""
    for batch in cycle_cost.BATCHES:
        table = cycle_cost.measure(mlp, batch, options.rounds, options.device)
        result["nets"][f"784-1024-1024-10, batch {batch}"] = table
        cycle_cost.show(batch, table)
        write_figures(options.json, result)


def add_memory(table: dict[str, Any], net: str, options: argparse.Namespace) -> None:
    """Peak memory of each rule over that of plain training."""
    base = peak_memory(net, next(iter(RULES)), options.device, options.threads)
    for name, row in table.items():
        row["memory"] = peak_memory(net, name, options.device, options.threads) / base


def show_table(table: dict[str, Any], title: str) -> None:
    print(f"\n{title}: a step relative to a plain step")
    print(f"{'rule':30} {'CPU':>6} {'quartiles':>14} {'wall':>6} {'peak memory':>12}")
    for name, row in table.items():
        memory = f"{row['memory']:.2f}" if "memory" in row else ""
        spread = f"{row['cpu_low']:.2f} - {row['cpu_high']:.2f}"
        print(f"{name:30} {row['cpu']:6.2f} {spread:>14} {row['wall']:6.2f} {memory:>12}")


def show_counts(nets: list[str], names: list[str]) -> None:
    """Print what `step_counts` counts."""
    for net in nets:
        print(f"\n{net}: Python calls, and host synchronisations in forward, backward and step")
        for name in names:
            stepper, rule = Stepper(net, "cpu"), RULES[name]()
            if rule is not None:
                rule.attach(stepper.model, stepper.optimizer)
            counts = step_counts.count_step(stepper.model, stepper.optimizer, stepper.loss)
            print(f"{name:30} {' '.join(f'{count:6}' for count in counts.values())}")


def write_figures(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
