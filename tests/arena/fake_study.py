"""A study like the demo's, made up."""

from __future__ import annotations

import math
import random
from typing import Any

NAMES = ["SGD", "AdamW", "Backprop", "ProxProp", "BackMatching", "NLMS", "Consequentialism"]


def make_run(name: str, seed: int, *, failing: bool = False) -> dict[str, Any]:
    """A plausible run: exponential decay to a floor, with noise."""
    chance = random.Random(f"{name} {seed}")
    order = NAMES.index(name)
    rate, floor, cost = (
        0.006 + 0.003 * (order * 3 % 7),
        0.004 * 1.9 ** (order * 5 % 7),
        0.004 + 0.0012 * order,
    )
    steps = list(range(0, 401, 5))
    loss = [(2.3 * math.exp(-rate * s) + floor) * math.exp(chance.gauss(0, 0.12)) for s in steps]
    failure = None
    if failing:
        loss = [v if s < 30 else math.nan for s, v in zip(steps, loss, strict=True)][:8]
        steps, failure = steps[:8], "diverged at step 31: loss is nan"
    return {
        "seed": seed,
        "steps": steps,
        "loss": loss,
        "cpu_seconds": [cost * s * chance.uniform(0.97, 1.03) for s in steps],
        "test_accuracy": None if failing else 0.975 - 0.012 * (order * 5 % 7) + chance.gauss(0, 0.004),
        "final_loss": None if failing else loss[-1],
        "failure": failure,
    }


def make_study() -> dict[str, Any]:
    ratios = [10 ** (k / 3 - 2) for k in range(13)]
    layers = [
        "0 Linear 64→64",
        "1 Tanh",
        "2 Linear 64→64",
        "3 Tanh",
        "4 Linear 64→32",
        "5 Tanh",
        "6 Linear 32→10",
    ]
    return {
        "title": "plywise demo: handwritten digits",
        "summary": "Seven ways to train one network on 1,797 handwritten digits, three seeds each.",
        "reading": [
            "ProxProp reached the lowest training loss in as many steps, but each of them costs more.",
            "AdamW was the best of the baselines: 97.1 % of the test digits right.",
            "One run of NLMS diverged; its other two seeds trained to the end.",
        ],
        "command": "plywise demo --seeds 3",
        "created": "2026-11-21T12:00:00+00:00",
        "elapsed_seconds": 48.2,
        "environment": {
            "plywise": "0.1.0",
            "torch": "2.13.0+cpu",
            "python": "3.11.7",
            "cpu": "AMD EPYC 9654 96-Core Processor",
            "threads": 1,
        },
        "attribution": "Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak (1998), UCI "
        "Machine Learning Repository, CC BY 4.0.",
        "methods": [
            {
                "name": name,
                "settings": f"{name}(tau=1.0) + SGD(lr=5.0, momentum=0.9)",
                "runs": [make_run(name, seed, failing=name == "NLMS" and seed == 1) for seed in range(3)],
                "relative_step_cost": 1 + 0.21 * i,
            }
            for i, name in enumerate(NAMES)
        ],
        "sensitivity": [
            {
                "name": name,
                "default_rate": 5.0 / (i + 1),
                "rates": [5.0 / (i + 1) * ratio for ratio in ratios],
                "final_loss": [
                    None
                    if math.log10(ratio) > 0.5 + 0.25 * i
                    else 0.01 * (i + 1) * 10 ** (abs(math.log10(ratio)) * 1.6 / (1 + 0.3 * i))
                    for ratio in ratios
                ],
            }
            for i, name in enumerate(NAMES)
        ],
        "layers": {
            "names": layers,
            "series": [
                {"name": name, "sizes": [10 ** (-0.12 * i * (6 - depth)) for depth in range(7)]}
                for i, name in enumerate(NAMES)
            ],
            "caption": "",
        },
    }


# Without a browser ---------------------------------------------------------------------------------
