"""Tune the methods of `plywise demo`: the same number of trials for each, judged on the validation split.

    python benchmarks/tune_demo.py            # writes benchmarks/tune_demo.json, a few minutes on one core
    python benchmarks/tune_demo.py Foof       # this method alone; the others stay as they are in that file

Each method gets the same number of settings (Sobol points of its own ranges), each trained with the same
two seeds, which are not the demo's. The score is the mean over the training of the logarithm of the
validation loss: both quick and good count, and a network that is sure of its mistakes is punished. The
test split is not touched. Backprop, the null control, takes the settings of SGD.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from plywise._util.environment import environment
from plywise.arena.demo.setups import Setup
from plywise.arena.run.trial import run_trial
from plywise.arena.task import Task
from plywise.arena.workload import Workload
from plywise.arena.workloads import find_workload
from plywise.data.digits import load_digits
from plywise.data.parts import Data

TRIALS = 32
SEEDS = (100, 101)
ON_ADAMW = ("AdamW", "Coordinates")
# (low, high) is a range on a logarithmic scale, a list is a choice
SPACES = {
    "SGD": {"rate": (0.01, 1.0)},
    "AdamW": {"rate": (3e-4, 3e-2), "opt.weight_decay": (1e-4, 1e-1)},
    "ProxProp": {"rate": (0.3, 100.0), "rule.tau": (0.01, 100.0), "opt.momentum": [0.0, 0.9]},
    "BackMatching": {
        "rate": (0.003, 0.3),
        "rule.scalar": ["mean", "rank"],
        "opt.momentum": [0.0, 0.9],
    },
    "NLMS": {"rate": (0.03, 10.0), "rule.eps": (0.01, 1.0), "opt.momentum": [0.0, 0.9]},
    "Consequentialism": {"rate": (0.01, 1.0), "rule.eps": (0.001, 1.0), "opt.momentum": [0.0, 0.9]},
    "RLS": {"rate": (0.01, 1.0), "rule.gain": (0.01, 10.0), "opt.momentum": [0.0, 0.9]},
    "FeatureWhitening": {"rate": (0.01, 1.0), "rule.damping": (1e-5, 0.1), "opt.momentum": [0.0, 0.9]},
    "AdaBK": {"rate": (0.01, 1.0), "rule.damping": (1e-5, 0.1), "opt.momentum": [0.0, 0.9]},
    "KFAC": {"rate": (0.003, 0.3), "rule.damping": (0.01, 10.0), "opt.momentum": [0.0, 0.9]},
    "Coordinates": {"rate": (1e-3, 1e-1), "rule.damping": (1e-3, 10.0), "opt.weight_decay": (1e-4, 1e-1)},
    "Foof": {"rate": (0.003, 0.3), "rule.damping": (0.01, 10.0), "opt.momentum": [0.0, 0.9]},
}


def points(space: dict, count: int) -> list[dict]:
    """``count`` settings that fill the space evenly."""
    unit = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(count, dtype=torch.float64)
    return [
        {name: place(scope, u) for (name, scope), u in zip(space.items(), row, strict=True)}
        for row in unit.tolist()
    ]


def place(scope: tuple | list, u: float):
    if isinstance(scope, list):
        return scope[min(int(u * len(scope)), len(scope) - 1)]
    low, high = map(math.log, scope)
    return float(f"{math.exp(low + u * (high - low)):.2g}")


def setup_of(method: str, point: dict) -> Setup:
    def pick(prefix: str) -> dict:
        return {k.removeprefix(prefix): v for k, v in point.items() if k.startswith(prefix)}

    plain = method in ("SGD", "AdamW")
    optimizer_settings = {name: value for name, value in pick("opt.").items() if value}  # 0 is the default
    if method == "SGD":
        optimizer_settings["momentum"] = 0.9
    return Setup(
        method,
        point["rate"],
        None if plain else method,
        pick("rule."),
        "AdamW" if method in ON_ADAMW else "SGD",
        optimizer_settings,
    )


def score(workload: Workload, setup: Setup, splits) -> dict:
    train, validation, _ = splits
    records = [
        run_trial(
            lambda: setup.train(workload.make_model),
            Data(train, validation, validation),  # the accuracy is told of the validation set, too
            Task(F.cross_entropy, F.cross_entropy, "cross entropy"),
            seed=seed,
            steps=workload.steps,
            batch_size=workload.batch_size,
        )
        for seed in SEEDS
    ]
    failures = [record.failure for record in records if record.failure]
    if failures:
        return {"score": None, "failure": failures[0]}
    return {
        "score": round(statistics.fmean(_mean_log(record.validation) for record in records), 4),
        "final_training_loss": statistics.fmean(record.final_loss for record in records),
    }


def _mean_log(losses: list[float]) -> float:
    return statistics.fmean(math.log(loss) for loss in losses)


def main() -> None:
    torch.set_num_threads(1)
    workload, splits = find_workload("digits-mlp"), load_digits()
    out = Path(__file__).with_suffix(".json")
    results = json.loads(out.read_text(encoding="utf-8"))["methods"] if sys.argv[1:] else {}
    for method, space in ((name, SPACES[name]) for name in sys.argv[1:] or SPACES):
        start, trials = time.process_time(), []
        for point in points(space, TRIALS):
            trials.append({**point, **score(workload, setup_of(method, point), splits)})
        finished = sorted((t for t in trials if t["score"] is not None), key=lambda t: t["score"])
        if not finished:
            raise SystemExit(f"{method}: every trial failed, the first with {trials[0]['failure']!r}")
        best = {name: finished[0][name] for name in space}
        results[method] = {
            "setup": str(setup_of(method, best)),
            "best": best,
            "cpu_seconds": round(time.process_time() - start, 1),
            "trials": trials,
        }
        failed = len(trials) - len(finished)
        print(f"{results[method]['setup']}  {finished[0]}  ({failed} of {TRIALS} failed)", file=sys.stderr)
    study = {
        "protocol": __doc__.split("\n\n")[2].replace("\n", " ").strip(),
        "steps": workload.steps,
        "batch_size": workload.batch_size,
        "trials_per_method": TRIALS,
        "seeds": SEEDS,
        "environment": environment(),
        "methods": results,
    }
    text = json.dumps(study, indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
