"""Measure the cost of `rule.record`: in the steps that it measures, and in the steps between them.

Two copies of a network train in lockstep with the same numbers, so both refresh in the same step; one of them
is recorded in each step. The difference of their CPU times is the cost of measuring a step, which is large
compared with the noise. Divided by the 50 steps between two measured steps, it is the cost of recording; the
aim is 2 % of a step. A third copy is the null control. In the other steps, recording adds calls of functions
that return at once: they are counted, and their time is that of such a call in a loop.

    python benchmarks/telemetry_cost.py --out benchmarks/telemetry_cost.json
    python benchmarks/telemetry_cost.py --seconds 1     # a small run, to check that it works
    python benchmarks/telemetry_cost.py --device cuda
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import time
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F

import plywise as pw
from step_cost import NETS
from step_counts import count_python_calls

RULES = {
    "ProxProp": pw.ProxProp,
    "NLMS": pw.NLMS,
    "Foof": lambda: pw.Foof(stats_every=CYCLE, refresh_every=CYCLE, slowdown=1),
    "KFAC": lambda: pw.KFAC(stats_every=CYCLE, refresh_every=CYCLE),
}
EVERY = 50
"""Steps from one measured step to the next, the default of `rule.record`."""
CYCLE = 10
"""Steps from one refresh to the next of the rules with running state."""
NEVER = 10**9


class Arm:
    """A network with its optimizer under a rule, recorded or not."""

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

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def time_step(self) -> float:
        """Take a step, and return its CPU seconds."""
        if self.x.is_cuda:
            torch.cuda.synchronize()
        start = time.process_time()
        self.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.process_time() - start


def measure(net: str, rule: str, seconds: float, device: str) -> dict[str, float]:
    """Measure the cost of recording, as shares of a plain step."""
    arms = {
        "plain": Arm(net, rule, None, device),
        "again": Arm(net, rule, None, device),
        "recorded": Arm(net, rule, 1, device),
    }
    for arm in arms.values():
        for _ in range(CYCLE + 1):
            arm.step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not times["plain"] or len(times["plain"]) % CYCLE:
        for name in random.sample(list(arms), len(arms)):
            times[name].append(arms[name].time_step())
    plain = statistics.fmean(times["plain"])
    extra, null = (estimate(times[name], times["plain"], plain) for name in ("recorded", "again"))
    return {
        "rounds": len(times["plain"]),
        "plain step, ms": 1000 * plain,
        "measured step, extra": extra,
        "null control": null,
        "recording": extra / EVERY,
        "null control of recording": null / EVERY,
        **measure_other_steps(net, rule, device, plain),
    }


def estimate(times: list[float], plain: list[float], step: float) -> float:
    """Estimate the extra time of a step as a share of a plain step.

    It takes the median over the rounds at each position of the refresh cycle, then the mean over positions.
    The median removes single steps that other programs disturb, and keeps refreshes.
    """
    differences = [recorded - unrecorded for recorded, unrecorded in zip(times, plain, strict=True)]
    medians = [statistics.median(differences[position::CYCLE]) for position in range(CYCLE)]
    return statistics.fmean(medians) / step


def measure_other_steps(net: str, rule: str, device: str, plain: float) -> dict[str, float]:
    """Count the calls that recording adds to steps that it does not measure, and estimate their time."""
    counts = {}
    for name, every in (("plain", None), ("recorded", NEVER)):
        arm = Arm(net, rule, every, device)
        for _ in range(2 * CYCLE):
            arm.step()
        counts[name] = statistics.fmean(count_python_calls(arm.step) for _ in range(CYCLE))
    added = counts["recorded"] - counts["plain"]
    empty: dict[int, object] = {}
    # an iteration has two calls
    seconds = min(timeit.repeat(lambda: empty.clear(), number=10_000, repeat=20)) / 20_000
    return {"calls between": counts["plain"], "calls added": added, "added time": added * seconds / plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="seconds for each network and rule")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    about = {"device": arguments.device, "torch": torch.__version__, "machine": platform.machine()}
    for net, rule in itertools.product(sorted(NETS, key=time_plain_step), RULES):
        figures = measure(net, rule, arguments.seconds, arguments.device)
        results[f"{net}, {rule}"] = {name: float(f"{value:.4g}") for name, value in figures.items()}
        print(
            f"{net:34s} {rule:9s}",
            ", ".join(f"{name} {value:.3g}" for name, value in figures.items()),
            flush=True,
        )
        if arguments.out is not None:
            arguments.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def time_plain_step(net: str) -> float:
    """Return the CPU seconds of a second step under NLMS, to measure slow networks last."""
    arm = Arm(net, "NLMS", None, "cpu")
    arm.step()
    return arm.time_step()


if __name__ == "__main__":
    main()
