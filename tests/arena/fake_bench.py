"""A made-up ledger of a bench, with curves of a known shape and therefore a known winner."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SPEEDS = {"sgd": 1.0, "sgd-again": 1.0, "adamw": 1.3, "proxprop": 2.6, "nlms": 1.2, "local": 0.5, "bad": 0.1}
"""How much faster than SGD the error falls with the steps; bad never arrives."""
COSTS = {
    "sgd": 1.0,
    "sgd-again": 1.0,
    "adamw": 1.1,
    "proxprop": 1.3,
    "nlms": 3.0,
    "local": 0.8,
    "bad": 1.0,
}
"""What a step costs, relative to SGD's."""
WORKLOADS = {"digits": 1.0, "convs": 0.6, "words": 0.4}
"""How quickly anything is learnt there."""
STEPS = 400


def line(
    workload: str = "digits",
    method: str = "sgd",
    purpose: str = "tuning",
    track: str = "tuned",
    trial: int = 0,
    seed: int = 0,
    **other: Any,
) -> dict[str, Any]:
    """Make one line of the ledger; by default a plain run from 0.9 to 0.1 in 40 steps."""
    return {
        "workload": workload,
        "method": method,
        "purpose": purpose,
        "track": track,
        "trial": trial,
        "seed": seed,
        "numbers": {"lr": 0.1},
        "steps": [0, 20, 40],
        "loss": [2.3, 1.0, 0.2],
        "validation": [0.9, 0.4, 0.1],
        "cpu": [0.0, 1.0, 2.0],
        "wall": [0.0, 1.1, 2.2],
        "gradients": 1.0,
        "test": None,
        "peak_mib": None,
        "failure": None,
        "layers": None,
        **other,
    }


def make_line(workload: str, method: str, purpose: str, track: str, trial: int, seed: int) -> dict[str, Any]:
    """Make a trial: a noisy exponential fall; a rate far from the best is slower, a high one fails."""
    chance = random.Random(f"{workload} {method} {purpose} {track} {trial} {seed}")
    rate = 0.1 if trial == 3 else 10 ** (-4 + 4 * ((trial * 0.382 + 0.1) % 1)) if trial >= 0 else 0.03
    off = abs(math.log10(rate / 0.1))
    speed = SPEEDS.get(method, 1.0) * WORKLOADS.get(workload, 1.0) * 0.012 / (1 + 2 * off)
    speed *= math.exp(chance.gauss(0, 0.06))
    cost = 0.004 * COSTS.get(method, 1.0)
    failed = rate > 0.6 or (method == "nlms" and purpose == "final" and seed == 102)
    steps = list(range(0, STEPS + 1, 20))[: 4 if failed else None]
    validation = [0.9 * math.exp(-speed * s) + chance.uniform(0, 0.002) for s in steps]
    cpu = [cost * s * chance.uniform(0.99, 1.01) for s in steps]
    return line(
        workload,
        method,
        purpose,
        track,
        trial,
        seed,
        numbers={"lr": rate},
        steps=steps,
        loss=[2.3 * math.exp(-1.4 * speed * s) + 0.001 for s in steps],
        validation=validation,
        cpu=cpu,
        wall=[1.2 * value for value in cpu],
        gradients=2.0 if method == "local" else 1.0,
        test=validation[-1] + 0.003 if purpose == "final" and not failed else None,
        peak_mib=20.0 + len(method) if purpose == "final" else None,
        failure="diverged at step 61: the batch loss is nan" if failed else None,
        layers={"names": ["0", "2", "4"], "backward": [speed * 10, 0.5, 1.0], "weights": [1.0, 0.4, 0.3]}
        if purpose == "final" and method != "local" and not failed
        else None,
    )


def make_bench(
    methods: Any = tuple(SPEEDS), workloads: Any = tuple(WORKLOADS), **other: Any
) -> dict[str, Any]:
    return {
        "title": "plywise bench: three small workloads",
        "command": "plywise bench digits convs words --trials 8",
        "created": "2026-11-21T12:00:00+00:00",
        "environment": {"plywise": "0.1.0", "torch": "2.13.0+cpu", "cpu": "AMD EPYC 9654 96-Core Processor"},
        "commit": "0123456789abcdef",
        "workloads": {
            name: {
                "about": f"What {name} are for.",
                "metric": "error rate",
                "chance": 0.9,
                "batch_size": 64,
                "steps": STEPS,
                "measure_every": 20,
                "target": 0.3 if name == "words" else None,
                "train": 1000,
                "validation": 397,
                "test": 400,
            }
            for name in workloads
        },
        "methods": {
            name: {
                "about": f"What {name} is.",
                "baseline": name in ("sgd", "adamw"),
                "null": "sgd" if name == "sgd-again" else None,
                "gradients": 2.0 if name == "local" else 1.0,
                "local": name == "local",
                "space": {"lr": {"low": 1e-4, "high": 1.0, "default": 0.03, "log": True}},
            }
            for name in methods
        },
        "trials": 8,
        "seeds": [100, 101, 102],
        "tracks": ["defaults", "tuned"],
        "workers": 2,
        "threads": 1,
        "device": "cpu",
        "refused": [
            {"workload": name, "method": "local", "reason": "the network cannot be cut into blocks"}
            for name in workloads
            if name == "words" and "local" in methods
        ],
        "unfinished": [],
        **other,
    }


def make_lines(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the whole ledger of a bench."""
    refused = {(one["workload"], one["method"]) for one in bench["refused"]}
    lines = []
    for workload in bench["workloads"]:
        for method in bench["methods"]:
            if (workload, method) in refused:
                continue
            lines += [make_line(workload, method, "tuning", "tuned", t, 0) for t in range(bench["trials"])]
            for seed in bench["seeds"]:
                lines.append(make_line(workload, method, "final", "defaults", -1, seed))
                lines.append(make_line(workload, method, "final", "tuned", 3, seed))
    return lines


def write_bench(folder: Path, bench: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    """Write the files of a bench into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(bench), encoding="utf-8")
    text = "".join(json.dumps(each, allow_nan=False) + "\n" for each in lines)
    (folder / "trials.jsonl").write_text(text, encoding="utf-8")
    return folder
