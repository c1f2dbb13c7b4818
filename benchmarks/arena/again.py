"""Runs at the defaults of one bench against the same runs of another: are they the same, and as dear?

plywise bench --workloads quadratic,digits-mlp --methods sgd,muon --trials 0 --seeds 3 --out runs/again
python benchmarks/arena/again.py runs/arena/standard runs/again
"""

import argparse
import json
from pathlib import Path
from statistics import geometric_mean, median

from plywise.arena.run.ledger import read
from plywise.arena.scoring.records import DEFAULTS, FINAL


def runs(folder: Path) -> dict[tuple[str, str, int], dict]:
    """Final runs at the defaults that did not fail."""
    lines = read(folder / "trials.jsonl")
    return {
        (line["workload"], line["method"], line["seed"]): line
        for line in lines
        if (line["purpose"], line["track"], line["failure"]) == (FINAL, DEFAULTS, None)
    }


def compared(first: dict, second: dict) -> dict[str, dict]:
    """By workload: CPU time of the second over that of the first, and how far their losses lie apart."""
    found: dict[str, dict] = {}
    for key in first.keys() & second.keys():
        one, other = first[key], second[key]
        apart = max(abs(b / a - 1) for a, b in zip(one["loss"], other["loss"], strict=True))
        own = found.setdefault(key[0], {"ratios": [], "apart": (0.0, ""), "methods": set()})
        own["ratios"].append(other["cpu"][-1] / one["cpu"][-1])
        own["apart"] = max(own["apart"], (apart, key[1]))
        own["methods"].add(key[1])
    return {
        name: {
            "methods": sorted(found[name]["methods"]),
            "runs": len(found[name]["ratios"]),
            "cpu_ratio": median(found[name]["ratios"]),
            "cpu_ratio_least": min(found[name]["ratios"]),
            "cpu_ratio_most": max(found[name]["ratios"]),
            "loss_apart": found[name]["apart"][0],
            "furthest": found[name]["apart"][1],
        }
        for name in sorted(found)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="a bench")
    parser.add_argument("again", type=Path, help="a later one")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    options = parser.parse_args()
    found = compared(runs(options.folder), runs(options.again))
    print("workload             runs  CPU time, again over before  training loss apart by, at most")
    for name, one in found.items():
        span = f"{one['cpu_ratio']:.2f} ({one['cpu_ratio_least']:.2f} to {one['cpu_ratio_most']:.2f})"
        print(f"{name:20} {one['runs']:4}  {span:27}  {one['loss_apart']:.1e}  {one['furthest']}")
    print(f"geometric mean: {geometric_mean(one['cpu_ratio'] for one in found.values()):.2f}")
    if options.json:
        about = json.loads((options.again / "bench.json").read_text())
        kept = {"command": about["command"], "created": about["created"], "workloads": found}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
