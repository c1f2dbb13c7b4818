"""Compare the runs at defaults of two benches: do they have the same losses and the same CPU time?

plywise bench --workloads quadratic,digits-mlp --methods sgd,muon --trials 0 --seeds 3 --out runs/again
python benchmarks/arena/again.py runs/arena/standard runs/again
"""

import argparse
import json
from pathlib import Path
from statistics import geometric_mean, median

from plywise.arena.run.ledger import read
from plywise.arena.scoring.records import DEFAULTS, FINAL


def read_runs(folder: Path) -> dict[tuple[str, str, int], dict]:
    """Read the final runs at the defaults that did not fail."""
    lines = read(folder / "trials.jsonl")
    return {
        (line["workload"], line["method"], line["seed"]): line
        for line in lines
        if (line["purpose"], line["track"], line["failure"]) == (FINAL, DEFAULTS, None)
    }


def compare_runs(first: dict, second: dict) -> dict[str, dict]:
    """Return for each workload the ratio of CPU times, second over first, and the difference of losses."""
    workloads: dict[str, dict] = {}
    for key in first.keys() & second.keys():
        before, after = first[key], second[key]
        difference = max(abs(b / a - 1) for a, b in zip(before["loss"], after["loss"], strict=True))
        entry = workloads.setdefault(key[0], {"ratios": [], "apart": (0.0, ""), "methods": set()})
        entry["ratios"].append(after["cpu"][-1] / before["cpu"][-1])
        entry["apart"] = max(entry["apart"], (difference, key[1]))
        entry["methods"].add(key[1])
    return {
        name: {
            "methods": sorted(entry["methods"]),
            "runs": len(entry["ratios"]),
            "cpu_ratio": median(entry["ratios"]),
            "cpu_ratio_least": min(entry["ratios"]),
            "cpu_ratio_most": max(entry["ratios"]),
            "loss_apart": entry["apart"][0],
            "furthest": entry["apart"][1],
        }
        for name, entry in sorted(workloads.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a bench")
    parser.add_argument("again", type=Path, help="folder of a later bench")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    workloads = compare_runs(read_runs(options.folder), read_runs(options.again))
    print("workload             runs  CPU time, again over before  largest difference of training losses")
    for name, row in workloads.items():
        span = f"{row['cpu_ratio']:.2f} ({row['cpu_ratio_least']:.2f} to {row['cpu_ratio_most']:.2f})"
        print(f"{name:20} {row['runs']:4}  {span:27}  {row['loss_apart']:.1e}  {row['furthest']}")
    print(f"geometric mean: {geometric_mean(row['cpu_ratio'] for row in workloads.values()):.2f}")
    if options.json:
        bench = json.loads((options.again / "bench.json").read_text())
        result = {"command": bench["command"], "created": bench["created"], "workloads": workloads}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
