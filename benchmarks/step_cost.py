"""Measure the cost of a training step with each rule, relative to plain backpropagation.

A step is zero_grad, forward, loss, backward and the optimizer's step. All rules take turns in one process in
shuffled order, each between two plain steps, after warm-up steps that are not timed. The ratio is a step's
time over the mean of the two plain ones. The figures are medians over the rounds of CPU and wall time; a
second plain step is the null control. Peak memory is measured in separate processes for each rule.

    python benchmarks/step_cost.py --threads 1 --rounds 25
    python benchmarks/step_cost.py --device cuda

Rules with running statistics are measured over whole refresh cycles, see `cycle_cost`:

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


def make_mlp(*widths: int) -> nn.Sequential:
    """Make a ReLU network with these widths."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_convnet() -> nn.Sequential:
    """Make the ConvNet of the ProxProp paper's code, for 32×32 images."""
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
    "8-64-64-2, batch 64": (lambda: make_mlp(8, 64, 64, 2), (64, 8)),
    "64-128-128-128-10, batch 128": (lambda: make_mlp(64, 128, 128, 128, 10), (128, 64)),
    "784-1024-1024-10, batch 256": (lambda: make_mlp(784, 1024, 1024, 10), (256, 784)),
    "3072-4000-1000-4000-10, batch 500": (lambda: make_mlp(3072, 4000, 1000, 4000, 10), (500, 3072)),
    "ConvNet 16-20-20 of 5×5, batch 500": (make_convnet, (500, 3, 32, 32)),
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
"""Networks with fewer weights are timed over several steps, after those that the engine explores."""


class Stepper:
    """A network with its data and optimizer; rules are attached and detached between steps."""

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
        """Return the loss of the batch."""
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> Tensor:
        """Take one training step."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def time_steps(self, rule: pw.Rule | None) -> tuple[float, float]:
        """Return CPU and wall seconds with ``rule`` attached, after some steps that are not timed."""
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
    """Return the median CPU and wall ratios, with quartiles, for each rule."""
    stepper = Stepper(net, device)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:  # warm up every rule
        stepper.time_steps(RULES[name]())
    order = random.Random(0)
    before = stepper.time_steps(None)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            current = stepper.time_steps(RULES[name]())
            after = stepper.time_steps(None)
            ratios[name].append(
                tuple(2 * o / (b + a) for o, b, a in zip(current, before, after, strict=True))
            )
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


def measure_peak_memory(net: str, name: str, device: str, threads: int) -> float:
    """Return the peak of three steps in MiB above an idle process, as the lowest of three processes."""
    command = [sys.executable, __file__, "--peak-of", name, "--net", net, "--device", device]
    command += ["--threads", str(threads)]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600) for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


def measure_peak(net: str, name: str, device: str) -> float:
    """Measure the peak for `measure_peak_memory`, inside its process."""
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # allocate the buffers of the libraries
    base = read_peak(device)
    stepper, rule = Stepper(net, device), RULES[name]()
    if rule is not None:
        rule.attach(stepper.model, stepper.optimizer)
    for _ in range(3):
        stepper.step()
    return read_peak(device) - base


def read_peak(device: str) -> float:
    """Return the peak memory of this process so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # getrusage would report the maximum of the parent process too
    high_water = next(line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    return int(high_water.split()[1]) / 1024


def describe_environment(device: str, threads: int) -> dict[str, str | int]:
    """Describe the machine and the versions that the figures depend on."""
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
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument(
        "--cycles", action="store_true", help="measure rules with running statistics, over whole cycles"
    )
    parser.add_argument(
        "--count", action="store_true", help="count Python calls and host synchronisations per step"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    nets, names = options.net or list(NETS), options.rule or list(RULES)
    if options.peak_of:
        print(measure_peak(nets[0], options.peak_of, options.device))
        return
    if options.count:
        print_counts(nets, names)
        return
    result: dict[str, Any] = {
        "environment": describe_environment(options.device, options.threads),
        "nets": {},
    }
    if options.cycles:
        measure_cycles(options, result)
        return
    if options.json and options.json.exists() and options.net:  # keep the figures of the other networks
        result["nets"] = json.loads(options.json.read_text())["nets"]
    for net in nets:
        table = measure(net, names, options.rounds, options.device)
        if not options.no_memory:
            add_memory(table, net, options)
        print_table(table, f"{net}, {options.device}, {options.threads} thread(s)")
        result["nets"][net] = table
    write_figures(options.json, result)


def measure_cycles(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure steps of rules with running statistics, over whole refresh cycles."""
    for batch in cycle_cost.BATCHES:
        table = cycle_cost.measure(make_mlp, batch, options.rounds, options.device)
        result["nets"][f"784-1024-1024-10, batch {batch}"] = table
        cycle_cost.print_table(batch, table)
        write_figures(options.json, result)


def add_memory(table: dict[str, Any], net: str, options: argparse.Namespace) -> None:
    """Add the peak memory of each rule, over that of plain training."""
    base = measure_peak_memory(net, next(iter(RULES)), options.device, options.threads)
    for name, row in table.items():
        row["memory"] = measure_peak_memory(net, name, options.device, options.threads) / base


def print_table(table: dict[str, Any], title: str) -> None:
    print(f"\n{title}: a step relative to a plain step")
    print(f"{'rule':30} {'CPU':>6} {'quartiles':>14} {'wall':>6} {'peak memory':>12}")
    for name, row in table.items():
        memory = f"{row['memory']:.2f}" if "memory" in row else ""
        spread = f"{row['cpu_low']:.2f} - {row['cpu_high']:.2f}"
        print(f"{name:30} {row['cpu']:6.2f} {spread:>14} {row['wall']:6.2f} {memory:>12}")


def print_counts(nets: list[str], names: list[str]) -> None:
    """Print the counts of `step_counts`."""
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
