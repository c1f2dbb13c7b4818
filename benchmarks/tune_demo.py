"""Tune the methods of `plywise demo` as a bench does, with the same number of trials for each.

    python benchmarks/tune_demo.py            # writes benchmarks/tune_demo.json in a few minutes on one core
    python benchmarks/tune_demo.py sgd muon   # tune only these methods; keep the others in that file

Each method gets the same number of settings (Sobol points of the ranges that it has in the arena), one run
each with a seed that is not the demo's. Chosen is what reaches the demo's target, a validation error, in the
fewest steps; the lowest validation error decides between equals. The test split is not touched.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from plywise._util.environment import environment
from plywise.arena.demo.preset import DemoConfig, make_workload
from plywise.arena.demo.setups import SETUPS
from plywise.arena.methods import find_method
from plywise.arena.run.experiment import TUNING_SEED, Design, run_arms
from plywise.arena.scoring.score import choose_best, to_target
from plywise.arena.workload import Workload

TRIALS = 16


def tune(name: str, workload: Workload) -> dict[str, Any]:
    """Run the trials of a method, and choose the best."""
    start = time.process_time()
    design = Design(seeds=0, trials=TRIALS, tracks=())
    lines = run_arms(workload, [find_method(name)], design).tuning(workload.name, name)
    best = choose_best(lines, workload.target)
    assert best is not None
    trials = [
        {**line["numbers"], "steps": line["steps"][-1], "failure": line["failure"]}
        | {"to_target": _keep_finite(to_target(line, workload.target)), "validation": line["validation"][-1]}
        for line in lines
    ]
    return {
        "numbers": best["numbers"],
        "cpu_seconds": round(time.process_time() - start, 1),
        "trials": trials,
    }


def _keep_finite(steps: float) -> float | None:
    return steps if steps < float("inf") else None


def main() -> None:
    torch.set_num_threads(1)
    workload, out = make_workload(DemoConfig()), Path(__file__).with_suffix(".json")
    stored = json.loads(out.read_text(encoding="utf-8"))["methods"] if sys.argv[1:] else {}
    results = dict(stored)
    for name in sys.argv[1:] or SETUPS:
        results[name] = tune(name, workload)
        failed = sum(trial["failure"] is not None for trial in results[name]["trials"])
        print(f"{name}: {results[name]['numbers']}, {failed} of {TRIALS} failed", file=sys.stderr)
    study = {
        "protocol": __doc__.split("\n\n")[2].replace("\n", " ").strip(),
        "steps": workload.steps,
        "batch_size": workload.batch_size,
        "target": workload.target,
        "trials_per_method": TRIALS,
        "seed": TUNING_SEED,
        "environment": environment(),
        "methods": results,
    }
    out.write_text(json.dumps(study, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
