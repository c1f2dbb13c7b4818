"""Compare rules with SGD on badly scaled networks, which SGD may not train even at its best rate.

The networks are ReLU networks 64-48-48-48-48-10 on digits, with batches of 64 and 255 steps (15 epochs).
Their weights have He initialisation, multiplied by a factor for each layer. "rescaled" and "rescaled hard" do
not change the function of the network; "small" and "mixed" do. On each network each method gets the same
number of trials (rates in steps of sqrt 10, best validation loss on seed 100); then three fresh seeds run
with the best.

    python benchmarks/bad_scaling.py                      # run all methods
    python benchmarks/bad_scaling.py --only BackMatching  # run some again, keep the figures of the others
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import plywise as pw
from pictures import save_picture
from step_cost import describe_environment
from tuning import (
    Candidate,
    compute_accuracy,
    compute_median,
    make_adamw,
    make_mlp,
    make_sgd,
    read_digits,
    repeat,
    tune,
    write_json,
)

WIDTHS = (64, 48, 48, 48, 48, 10)
SCALES = {
    "good": (1, 1, 1, 1, 1),
    "rescaled": (10, 0.1, 10, 0.1, 1),
    "rescaled hard": (30, 1 / 30, 1 / 30, 30, 1),
    "small": (0.3, 0.3, 0.3, 0.3, 0.3),
    "mixed": (3, 0.1, 2, 0.2, 0.5),
}


def list_rates(middle: float) -> list[float]:
    """Return nine rates in steps of sqrt 10 around the middle one."""
    return [middle * 10 ** (k / 2) for k in range(-4, 5)]


def list_methods() -> dict[str, list[Candidate]]:
    """Return nine trials for each method."""
    rules: dict[str, tuple[float, float, Callable[[], pw.Rule] | None]] = {
        "SGD": (0.03, 0.0, None),
        "SGD momentum": (0.01, 0.9, None),
        "ProxProp": (3.0, 0.9, pw.ProxProp),
        "BackMatching rate": (0.1, 0.0, pw.BackMatching),
        "BackMatching rate, momentum": (0.01, 0.9, pw.BackMatching),
        "BackMatching rate, no cap": (0.03, 0.0, functools.partial(pw.BackMatching, cap=None)),
        "BackMatching exact": (0.1, 0.0, functools.partial(pw.BackMatching, mode="exact", cap=None)),
        "NLMS": (1.0, 0.9, pw.NLMS),
        "Consequentialism": (0.1, 0.0, pw.Consequentialism),
    }
    grids = {
        name: [make_sgd(name, rate, momentum, rule) for rate in list_rates(middle)]
        for name, (middle, momentum, rule) in rules.items()
    }
    return {"SGD": grids.pop("SGD"), "AdamW": [make_adamw(rate) for rate in list_rates(3e-3)], **grids}


def draw_picture(result: dict[str, Any], path: str) -> None:
    """Draw the final training loss of every method on every network."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.2))
    names = list(next(iter(result["networks"].values())))
    for index, name in enumerate(names):
        values = [network[name]["median_final_loss"] for network in result["networks"].values()]
        xs = [position + (index - len(names) / 2) * 0.07 for position in range(len(values))]
        ys = [3.0 if value is None else value for value in values]
        axis.plot(xs, ys, "o", label=name, markersize=6)
    axis.axhline(2.3026, color="grey", linewidth=0.8, linestyle="--")
    axis.text(-0.45, 2.6, "chance", color="grey", fontsize=8)
    axis.set_xticks(range(len(result["networks"])), list(result["networks"]))
    axis.set(yscale="log", ylabel="final training loss (median of 3 seeds)", xlim=(-0.5, len(SCALES) - 0.4))
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    save_picture(figure, path)


def run_method(trials: list[Candidate], make: Callable[[], torch.nn.Module], data: Any) -> dict[str, Any]:
    """Choose a rate, and train with it on three fresh seeds."""
    settings: dict[str, Any] = {"steps": 255, "batch_size": 64}
    best, log = tune(trials, make, data, 100, measure_every=255, **settings)
    records = repeat(best, make, data, 3, measure_every=51, **settings)
    row = {
        "settings": best.settings,
        "median_final_loss": compute_median(r.final_loss for r in records),
        "final_loss": [r.final_loss for r in records],
        "test_accuracy": [compute_accuracy(r) for r in records],
        "failures": [r.failure for r in records],
        "tuning": log,
    }
    print(f"    -> {row['median_final_loss']} {row['test_accuracy']} {best.settings}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods on badly scaled networks.")
    parser.add_argument(
        "--only", default="", help="run the methods whose names begin with this; keep the other figures"
    )
    only = parser.parse_args().only
    torch.set_num_threads(1)
    start, data = time.time(), read_digits()
    path = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(path.read_text()) if only else {"networks": {}}
    for network, scales in SCALES.items():
        make = functools.partial(make_mlp, WIDTHS, scales)
        rows = result["networks"].setdefault(network, {})
        for name, trials in list_methods().items():
            if name.startswith(only):
                print(f"  {network}: {name}", flush=True)
                rows[name] = run_method(trials, make, data)
    run = {"environment": describe_environment("cpu", 1), "minutes": round((time.time() - start) / 60, 1)}
    result.update({f"again: {only}": run} if only else run)
    write_json("bad_scaling.json", result)
    draw_picture(result, __file__.replace(".py", ".svg"))


if __name__ == "__main__":
    main()
