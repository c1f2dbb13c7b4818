"""Steps to AdamW's final training loss: the rules, Muon and the recommended method on digits and MNIST.

Digits: 1,100 training images, 160 steps. MNIST: the first 20,000 training images, 10,000 for validation, 600
steps. An MLP with three hidden layers of 256, batch 128. Every method is tuned with the same number of
trials on the validation loss after all steps (seed 100); then three fresh seeds. The target is AdamW's final
training loss, seed by seed. Training loss is that of the whole training set, measured off the clock.

    python benchmarks/fewer_steps.py            # digits and MNIST
"""

import argparse
import functools
import json
import time
from typing import Any

import torch
from torch import nn

import plywise as pw
from pictures import save_picture
from plywise.data.digits import Split
from plywise.optim import Muon
from plywise.optim.hidden_weights import find_hidden_weights, group_for_muon
from step_cost import environment
from tuning import (
    HERE,
    Candidate,
    accuracy,
    adamw,
    digits,
    first_step_below,
    median,
    mlp,
    mnist,
    repeat,
    sgd,
    tune,
    write_json,
)

Data = Any
TABLE_ONLY = ("BackMatching rate", "NLMS")
"""Methods that the picture leaves out, because they end where SGD does."""


def muon(rate: float) -> Candidate:
    """Muon for hidden weights, in steps as large as AdamW's, and AdamW for all others."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = group_for_muon(model, find_hidden_weights(model))
        return Muon(groups, rate, adjust_lr_fn="match_rms_adamw")

    return Candidate("Muon", rate, make, None, f"Muon(lr={rate:g})")


def recommended(rate: float, weight_decay: float) -> Candidate:
    """What `plywise.recommend` makes."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        made = pw.recommend(model, rate, weight_decay=weight_decay, on_nonfinite="propagate")
        return made.optimizer

    settings = f"recommend(lr={rate:g}, weight_decay={weight_decay:g})"
    return Candidate("recommended", rate, make, None, settings)


def candidates() -> dict[str, list[Candidate]]:
    """Eight trials a method."""
    prox = functools.partial
    return {
        "AdamW": [adamw(rate) for rate in (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2)],
        "SGD momentum": [
            sgd("SGD momentum", r, 0.9, None) for r in (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
        ],
        "ProxProp exact": [
            sgd("ProxProp exact", rate, 0.9, prox(pw.ProxProp, tau=1 / damping))
            for damping in (1.0, 3.0, 5.0, 10.0)
            for rate in (5.0, 10.0)
        ],
        "Consequentialism": [
            sgd("Consequentialism", rate, 0.0, prox(pw.Consequentialism, eps=eps))
            for eps in (0.1, 1.0)
            for rate in (0.05, 0.1, 0.3, 1.0)
        ],
        "BackMatching rate": [
            sgd("BackMatching rate", rate, 0.9, pw.BackMatching)
            for rate in (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
        ],
        "Muon": [muon(rate) for rate in (1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1)],
        "recommended": [
            recommended(rate, decay) for decay in (0.01, 0.1) for rate in (0.005, 0.01, 0.02, 0.05)
        ],
        "NLMS": [sgd("NLMS", rate, 0.9, pw.NLMS) for rate in (0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)],
    }


def compare(name: str, data: Data, width: int, steps: int, every: int) -> dict[str, Any]:
    """Tune and run every method on one data set."""
    make = functools.partial(mlp, (width, 256, 256, 256, 10))
    methods, target = {}, {}
    for method, trials in candidates().items():
        print(f"  {name}: {method}", flush=True)
        best, log = tune(trials, make, data, 100, steps=steps, measure_every=steps)
        records = repeat(best, make, data, 3, steps=steps, measure_every=every)
        if method == "AdamW":
            target = {record.seed: record.final_loss for record in records}
        reached = [first_step_below(record, target[record.seed]) for record in records]
        seconds = [
            None if step is None else record.cpu[record.steps.index(step)]
            for record, step in zip(records, reached, strict=True)
        ]
        methods[method] = {
            "settings": best.settings,
            "tuning": log,
            "steps_to_target": reached,
            "cpu_seconds_to_target": [None if s is None else round(s, 3) for s in seconds],
            "median_steps_to_target": median(reached),
            "median_cpu_seconds_to_target": median(seconds),
            "final_loss": [r.final_loss for r in records],
            "test_accuracy": [accuracy(r) for r in records],
            "failures": [r.failure for r in records],
            "curve": {
                "steps": records[0].steps,
                "loss": find_middle([r.loss for r in records]),
                "cpu_seconds": [round(v, 3) for v in records[0].cpu],
            },
        }
        row = methods[method]
        print(f"    -> {best.settings}: final {row['final_loss']}, steps to target {reached}", flush=True)
    return {"steps": steps, "target": "AdamW's final training loss, per seed", "methods": methods}


def find_middle(curves: list[list[float]]) -> list[float]:
    """The median of three curves, to four digits."""
    return [float(f"{sorted(column)[1]:.4g}") for column in zip(*curves, strict=False)]


def picture(result: dict[str, Any], path: str) -> None:
    """Training loss against steps and against CPU seconds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sets = result["sets"]
    figure, axes = plt.subplots(len(sets), 2, figsize=(10, 3.6 * len(sets)), squeeze=False)
    for row, (name, one) in zip(axes, sets.items(), strict=True):
        for method, values in one["methods"].items():
            if method in TABLE_ONLY:
                continue
            curve = values["curve"]
            for axis, key in zip(row, ("steps", "cpu_seconds"), strict=True):
                xs = curve[key][: len(curve["loss"])]
                axis.plot(xs, curve["loss"], label=method, linewidth=1.6)
        row[0].set_ylabel(f"{name}: training loss")
        for axis, label in zip(row, ("steps", "CPU seconds of training"), strict=True):
            axis.set(yscale="log", xlabel=label)
            axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--set", action="append", choices=["digits", "mnist"], help="default: both")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.time()
    result: dict[str, Any] = {"environment": environment("cpu", options.threads), "sets": {}}
    if options.set:  # one set again: the other's figures stay
        result["sets"] = json.loads((HERE / "fewer_steps.json").read_text())["sets"]
    for name in options.set or ["digits", "mnist"]:
        if name == "digits":
            result["sets"][name] = compare(name, digits(), 64, 160, 2)
        else:
            train, validation, test = mnist()
            few = Split(train.x[:20000], train.y[:20000])
            result["sets"][name] = compare(name, (few, validation, test), 784, 600, 10)
        write_json("fewer_steps.json", result)
        picture(result, __file__.replace(".py", ".svg"))
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
