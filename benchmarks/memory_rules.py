"""Compare the steps and CPU seconds to AdamW's best validation loss: rules, optimizers and peers.

    python benchmarks/memory_rules.py tune fashion     # tuning and three fresh seeds; resumes if interrupted
    python benchmarks/memory_rules.py tune cifar
    python benchmarks/memory_rules.py time             # CPU time of a step; run it alone on a quiet machine
    python benchmarks/memory_rules.py report           # the table and the picture

There are two workloads: an MLP 784-256-256-10 on 20,000 images of Fashion-MNIST for three epochs, and a
ConvNet of three convolutions and two linear layers on 10,000 images of CIFAR-10 for two epochs, without
augmentation and with batches of 128. Only the rate of each method is tuned, over six values in equal ratios
from lowest to 100 times the lowest. Methods of one class share this range; it was moved where the best value
was at its edge. All other settings are defaults. The rate with the lowest validation loss runs again with
three fresh seeds. The target is the lowest validation loss that AdamW reaches with them, as the median of the
seeds. The CPU time of a step is measured separately, with all methods taking turns, as a mean over whole
refresh cycles.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import plywise as pw
from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.method import Method as ArenaMethod
from plywise.arena.method import Trainer, TrialContext, with_rule
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.run.ledger import Ledger
from plywise.arena.scoring.records import FINAL, TUNED, TUNING, TrialRecord
from plywise.arena.task import Task
from plywise.arena.workload import Workload
from plywise.data.batches import endless_batches
from plywise.data.digits import Split
from plywise.data.parts import Data
from tuning import DATA, HERE, compute_median, make_mlp

BATCH, TRIALS = 128, 6
EVERY = 10  # steps between two measurements of the validation loss
TUNING_SEED, SEEDS = 100, (0, 1, 2)
OUT = HERE / "memory_rules.json"


@dataclass(frozen=True)
class Method:
    """A rule (or none) on an optimizer, and the lowest of its rates; the highest is 100 times it."""

    rule: Callable[[], pw.Rule] | None
    optimizer: Callable[[Any, float], Optimizer]
    lowest: float

    def list_rates(self) -> list[float]:
        """Return the rates to try."""
        return [float(f"{self.lowest * 100 ** (i / (TRIALS - 1)):.3g}") for i in range(TRIALS)]


def make_nesterov(parameters: Any, rate: float) -> Optimizer:
    return SGD(parameters, rate, momentum=0.9, nesterov=True)


def make_adamw(parameters: Any, rate: float) -> Optimizer:
    return AdamW(parameters, rate)


def make_peer(name: str) -> Callable[[Any, float], Optimizer]:
    def make(parameters: Any, rate: float) -> Optimizer:
        import peers

        return getattr(peers, name)(parameters, rate)

    return make


METHODS = {
    "SGD-Nesterov": Method(None, make_nesterov, 0.01),
    "AdamW": Method(None, make_adamw, 3e-4),
    "Muon": Method(None, make_peer("muon"), 2e-3),
    "SOAP": Method(None, make_peer("soap"), 3e-4),
    "Shampoo": Method(None, make_peer("shampoo"), 0.01),
    "Foof": Method(pw.Foof, make_nesterov, 3e-3),
    "Foof, dense": Method(lambda: pw.Foof(rank=None), make_nesterov, 3e-3),
    "Foof, rank 32": Method(lambda: pw.Foof(rank=32), make_nesterov, 3e-3),
    "Foof on AdamW": Method(pw.Foof, make_adamw, 3e-4),
    "FeatureWhitening (W-SGDM)": Method(pw.FeatureWhitening, make_nesterov, 0.01),
    "FeatureWhitening (W-AdamW)": Method(pw.FeatureWhitening, make_adamw, 3e-4),
    "FeatureWhitening, dense (W-SGDM)": Method(lambda: pw.FeatureWhitening(rank=None), make_nesterov, 0.01),
    "FeatureWhitening, dense (W-AdamW)": Method(lambda: pw.FeatureWhitening(rank=None), make_adamw, 3e-4),
    "AdaBK (SGDM_BK)": Method(pw.AdaBK, make_nesterov, 0.01),
    "AdaBK (AdamW_BK)": Method(pw.AdaBK, make_adamw, 3e-4),
    "KFAC": Method(pw.KFAC, make_nesterov, 3e-3),
    "RLS": Method(pw.RLS, make_nesterov, 0.01),
    "ProxProp": Method(pw.ProxProp, lambda p, rate: SGD(p, rate), 0.5),
    "BackMatching": Method(pw.BackMatching, make_nesterov, 0.003),
    "NLMS": Method(pw.NLMS, make_nesterov, 0.1),
    "Consequentialism": Method(pw.Consequentialism, make_nesterov, 0.01),
}


def make_fashion_net() -> nn.Sequential:
    return make_mlp((784, 256, 256, 10))


def make_cifar_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def read_images(name: str, train: int, validation: int) -> tuple[Split, Split]:
    """Read the first images for training and the next ones for validation; pixels are standardised."""
    sys.path.insert(0, str(DATA))
    from load_data import image_set

    pixels, labels, _, _ = image_set(name)
    x = torch.from_numpy(np.asarray(pixels[: train + validation])).float() / 255
    x = x.flatten(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    x = (x - x[:train].mean()) / x[:train].std()
    y = torch.from_numpy(np.asarray(labels[: train + validation])).long().flatten()
    return Split(x[:train], y[:train]), Split(x[train:], y[train:])


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[str, int, int]]] = {
    "fashion": (make_fashion_net, ("fashion_mnist", 20_000, 5_000)),
    "cifar": (make_cifar_net, ("cifar10", 10_000, 1_000)),
}
EPOCHS = {"fashion": 3, "cifar": 2}
TUNING_EVERY = {
    "fashion": 10,
    "cifar": 40,
}  # fewer measurements where they would take as long as the training


def tune(workload: str, names: list[str]) -> None:
    """Try six rates for each method, then run the best with three fresh seeds; skip finished methods."""
    result = load(workload)
    training, validation = read_images(*WORKLOADS[workload][1])
    steps = EPOCHS[workload] * (len(training.y) // BATCH)
    task = Task(F.cross_entropy, F.cross_entropy, "cross entropy")
    whole = Data(training, validation, validation)
    make = WORKLOADS[workload][0]
    problem = Workload(workload, "", make, lambda: whole, task, BATCH, steps, measure_every=EVERY)
    design = Design(
        len(SEEDS),
        tracks=(TUNED,),
        choose=choose_best,
        tuning_seed=TUNING_SEED,
        tuning_every=TUNING_EVERY[workload],
    )
    ledger = Ledger(HERE.parent / "runs" / f"memory_rules_{workload}.jsonl")
    for name in names:
        if result["methods"].get(name, {}).get("final"):
            continue
        arm = make_arm(name, METHODS[name])
        trials = run_arms(problem, [arm], design, ledger).lines(workload, name)
        tuning = [summarise(line) for line in trials if line["purpose"] == TUNING]
        final = [summarise(line) for line in trials if line["purpose"] == FINAL]
        for run in tuning:
            del run["seed"], run["curve"]
        result["methods"][name] = {"tuning": tuning, "final": final}
        print(f"{workload} {name}: {[run['best'] for run in final]}", flush=True)
        save(workload, result)


def make_arm(name: str, method: Method) -> ArenaMethod:
    """Make a method of the experiment engine from a method of this script."""

    def begin(context: TrialContext) -> Trainer:
        rule = method.rule() if method.rule else None
        optimizer = method.optimizer(context.model.parameters(), context.numbers["rate"])
        return with_rule(context.model, optimizer, rule, F.cross_entropy)

    return ArenaMethod(name, "", {}, begin, grid=tuple({"rate": rate} for rate in method.list_rates()))


def choose_best(lines: Sequence[TrialRecord], _: float | None) -> TrialRecord | None:
    """Choose the rate with the lowest validation loss at any measurement."""
    finished = [line for line in lines if line["failure"] is None]
    return min(finished, key=lambda line: min(line["validation"][1:]), default=None)


def summarise(line: TrialRecord) -> dict[str, Any]:
    """Return a trial in the format of this script's JSON; a failed trial is kept."""
    pairs = zip(line["steps"][1:], line["validation"][1:], strict=True) if line["failure"] is None else ()
    curve = [[step, round(loss, 5)] for step, loss in pairs]
    return {
        "rate": line["numbers"]["rate"],
        "seed": line["seed"],
        "best": min((loss for _, loss in curve), default=None),
        "failure": line["failure"],
        "cpu": round(line["cpu"][-1], 2) if line["cpu"] else 0.0,
        "curve": curve,
    }


def load(workload: str) -> dict[str, Any]:
    path = OUT.with_name(f"memory_rules_{workload}.json")
    return json.loads(path.read_text()) if path.exists() else {"environment": environment(), "methods": {}}


def save(workload: str, result: dict[str, Any]) -> None:
    path = OUT.with_name(f"memory_rules_{workload}.json")
    write_whole(path, json.dumps(result, ensure_ascii=False).replace('"tuning"', '\n"tuning"') + "\n")


def time_steps(rounds: int = 4, cycle: int = 50) -> None:
    """Measure the CPU time of a step over SGD's: means over whole refresh cycles, medians over rounds."""
    result: dict[str, Any] = {"environment": environment(), "cycle": cycle, "rounds": rounds, "workloads": {}}
    for workload, (make, where) in WORKLOADS.items():
        training, _ = read_images(*where)
        arms = {}
        for name, method in METHODS.items():
            torch.manual_seed(0)
            rule = method.rule() if method.rule else None
            model = make()
            optimizer = method.optimizer(model.parameters(), method.lowest / 10)
            step = with_rule(model, optimizer, rule, F.cross_entropy).step
            batches = endless_batches(training, BATCH, 0)
            for _ in range(30):  # until every peer has computed its first preconditioner
                step(*next(batches))
            arms[name] = (step, batches)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, (step, batches) in arms.items():
                rows = [next(batches) for _ in range(cycle)]
                start = time.process_time()
                for x, y in rows:
                    step(x, y)
                seconds[name].append((time.process_time() - start) / cycle)
        base = seconds["SGD-Nesterov"]
        table = {
            name: {
                "ms": round(1e3 * statistics.median(times), 2),
                "relative": round(statistics.median(o / b for o, b in zip(times, base, strict=True)), 3),
            }
            for name, times in seconds.items()
        }
        result["workloads"][workload] = table
        for name, row in table.items():
            print(f"{workload:8} {name:28} {row['ms']:8.2f} ms  {row['relative']:.2f}", flush=True)
    write_whole(
        OUT.with_name("memory_rules_time.json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    )


def find_first_below(run: dict[str, Any], target: float) -> int | None:
    """Return the steps until the validation loss is at or below the target, or None."""
    return next((step for step, loss in run["curve"] if loss <= target), None)


def report() -> None:
    """Write the summary and the picture, and print the table."""
    clock = json.loads(OUT.with_name("memory_rules_time.json").read_text())["workloads"]
    summary: dict[str, Any] = {}
    for workload in WORKLOADS:
        methods = load(workload)["methods"]
        target = compute_median(run["best"] for run in methods["AdamW"]["final"])
        assert target is not None
        rows = {}
        for name, entry in methods.items():
            steps = (
                compute_median(find_first_below(run, target) for run in entry["final"])
                if entry["final"]
                else None
            )
            milliseconds = clock[workload][name]["ms"]
            rows[name] = {
                "rate": entry["final"][0]["rate"] if entry["final"] else None,
                "best_validation_loss": compute_median(run["best"] for run in entry["final"])
                if entry["final"]
                else None,
                "steps_to_target": steps,
                "cpu_seconds_to_target": None if steps is None else round(steps * milliseconds / 1e3, 2),
                "step_relative_to_sgd": clock[workload][name]["relative"],
                "failed_trials": sum(run["failure"] is not None for run in entry["tuning"]),
            }
        summary[workload] = {"target": target, "methods": rows}
        print(f"\n{workload}: AdamW's best validation loss is {target:.4f}")
        print(f"{'method':28} {'rate':>8} {'best':>7} {'steps':>6} {'CPU s':>7} {'step':>6} {'failed':>6}")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["cpu_seconds_to_target"] or 1e9):
            cells = [row["steps_to_target"], row["cpu_seconds_to_target"], row["best_validation_loss"]]
            steps, cpu, best = ("never" if cell is None else f"{cell:g}" for cell in cells)
            print(
                f"{name:28} {row['rate'] or 0:8.3g} {best:>7} {steps:>6} {cpu:>7} "
                f"{row['step_relative_to_sgd']:6.2f} {row['failed_trials']:6}"
            )
    write_whole(OUT, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    draw(summary, clock)


def draw(summary: dict[str, Any], clock: dict[str, Any]) -> None:
    """Draw the steps and CPU seconds to the target relative to AdamW's, for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), sharex=True)
    titles = {"fashion": "MLP on Fashion-MNIST", "cifar": "ConvNet on CIFAR-10"}
    for axis, (workload, part) in zip(axes, summary.items(), strict=True):
        rows = part["methods"]
        base = rows["AdamW"]
        order = sorted(rows, key=lambda name: rows[name]["cpu_seconds_to_target"] or 1e9, reverse=True)
        for position, name in enumerate(order):
            row = rows[name]
            if row["steps_to_target"] is None:
                axis.text(0.22, position, "never reached", va="center", fontsize=8, color="#777777")
                continue
            steps = row["steps_to_target"] / base["steps_to_target"]
            cpu = row["cpu_seconds_to_target"] / base["cpu_seconds_to_target"]
            axis.plot([steps, cpu], [position, position], color="#bbbbbb", zorder=1)
            axis.scatter([steps], [position], marker="o", facecolors="white", edgecolors="#1f5fa8", zorder=2)
            axis.scatter([cpu], [position], marker="s", color="#c0392b", zorder=2)
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_ylim(-0.6, len(order) - 0.4)
        axis.set_xscale("log")
        axis.set_xlim(0.2, 8)
        axis.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(titles[workload], fontsize=10)
        axis.set_xlabel("to AdamW's best validation loss, relative to AdamW (log scale)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[1].scatter([], [], marker="o", facecolors="white", edgecolors="#1f5fa8", label="steps")
    axes[1].scatter([], [], marker="s", color="#c0392b", label="CPU seconds")
    axes[1].legend(loc="center right", fontsize=8)
    figure.tight_layout()
    save_picture(figure, OUT.with_suffix(".svg"))


def main() -> None:
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tuning = commands.add_parser("tune", help="tune and train on one workload")
    tuning.add_argument("workload", choices=list(WORKLOADS))
    tuning.add_argument("--method", action="append", choices=list(METHODS), help="default: all")
    commands.add_parser("time", help="time a step of each")
    commands.add_parser("report", help="table and picture")
    options = parser.parse_args()
    if options.command == "tune":
        tune(options.workload, options.method or list(METHODS))
    elif options.command == "time":
        time_steps()
    else:
        report()


if __name__ == "__main__":
    main()
