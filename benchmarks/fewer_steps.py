"""Count the steps to AdamW's final training loss: rules, Muon and the recommended method on two data sets.

Digits has 1,100 training images and 160 steps. MNIST has the first 20,000 training images, 10,000 validation
images, and 600 steps. The network is an MLP with three hidden layers of 256, with batches of 128. Every
method is tuned with the same number of trials on the validation loss after all steps (seed 100); then three
fresh seeds run. The target is AdamW's final training loss, seed by seed. The training loss is that of the
whole training set; the time of this measurement does not count.

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
from step_cost import describe_environment
from tuning import (
    HERE,
    Candidate,
    compute_accuracy,
    compute_median,
    first_step_below,
    make_adamw,
    make_mlp,
    make_sgd,
    read_digits,
    read_mnist,
    repeat,
    tune,
    write_json,
)

Data = Any
TABLE_ONLY = ("BackMatching rate", "NLMS")
"""Methods that the picture omits, because they end at the same loss as SGD."""


def make_muon(rate: float) -> Candidate:
    """Make Muon for hidden weights, with the step size of AdamW, and AdamW for all others."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = group_for_muon(model, find_hidden_weights(model))
        return Muon(groups, rate, adjust_lr_fn="match_rms_adamw")

    return Candidate("Muon", rate, make, None, f"Muon(lr={rate:g})")


def make_recommended(rate: float, weight_decay: float) -> Candidate:
    """Make the optimizer of `plywise.recommend`."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        recommendation = pw.recommend(model, rate, weight_decay=weight_decay, on_nonfinite="propagate")
        return recommendation.optimizer

    settings = f"recommend(lr={rate:g}, weight_decay={weight_decay:g})"
    return Candidate("recommended", rate, make, None, settings)


def list_candidates() -> dict[str, list[Candidate]]:
    """Return eight trials for each method."""
    bind = functools.partial
    return {
        "AdamW": [make_adamw(rate) for rate in (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2)],
        "SGD momentum": [
            make_sgd("SGD momentum", r, 0.9, None) for r in (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
        ],
        "ProxProp exact": [
            make_sgd("ProxProp exact", rate, 0.9, bind(pw.ProxProp, tau=1 / damping))
            for damping in (1.0, 3.0, 5.0, 10.0)
            for rate in (5.0, 10.0)
        ],
        "Consequentialism": [
            make_sgd("Consequentialism", rate, 0.0, bind(pw.Consequentialism, eps=eps))
            for eps in (0.1, 1.0)
            for rate in (0.05, 0.1, 0.3, 1.0)
        ],
        "BackMatching rate": [
            make_sgd("BackMatching rate", rate, 0.9, pw.BackMatching)
            for rate in (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
        ],
        "Muon": [make_muon(rate) for rate in (1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1)],
        "recommended": [
            make_recommended(rate, decay) for decay in (0.01, 0.1) for rate in (0.005, 0.01, 0.02, 0.05)
        ],
        "NLMS": [make_sgd("NLMS", rate, 0.9, pw.NLMS) for rate in (0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)],
    }


def compare(name: str, data: Data, width: int, steps: int, every: int) -> dict[str, Any]:
    """Tune and run every method on one data set."""
    make = functools.partial(make_mlp, (width, 256, 256, 256, 10))
    methods, target = {}, {}
    for method, trials in list_candidates().items():
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
            "median_steps_to_target": compute_median(reached),
            "median_cpu_seconds_to_target": compute_median(seconds),
            "final_loss": [r.final_loss for r in records],
            "test_accuracy": [compute_accuracy(r) for r in records],
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
    """Return the median of three curves, to four digits."""
    return [float(f"{sorted(column)[1]:.4g}") for column in zip(*curves, strict=False)]


def draw_picture(result: dict[str, Any], path: str) -> None:
    """Draw the training loss over steps and over CPU seconds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sets = result["sets"]
    figure, axes = plt.subplots(len(sets), 2, figsize=(10, 3.6 * len(sets)), squeeze=False)
    for row, (name, figures) in zip(axes, sets.items(), strict=True):
        for method, values in figures["methods"].items():
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
    result: dict[str, Any] = {"environment": describe_environment("cpu", options.threads), "sets": {}}
    if options.set:  # run one set again, keep the figures of the other
        result["sets"] = json.loads((HERE / "fewer_steps.json").read_text())["sets"]
    for name in options.set or ["digits", "mnist"]:
        if name == "digits":
            result["sets"][name] = compare(name, read_digits(), 64, 160, 2)
        else:
            train, validation, test = read_mnist()
            subset = Split(train.x[:20000], train.y[:20000])
            result["sets"][name] = compare(name, (subset, validation, test), 784, 600, 10)
        write_json("fewer_steps.json", result)
        draw_picture(result, __file__.replace(".py", ".svg"))
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
