"""Compute the targets of the shipped workloads from the baselines that a bench has tuned.

    python benchmarks/arena/targets.py runs/arena/standard --commit 136fd13

The script writes src/plywise/arena/workloads/targets.json. It considers each workload of the bench whose
baselines were all tuned with enough trials, and stores the target, the easy target ("loose"), the number of
these trials, the commit of the code, and the command. It does not change stored targets: to compute them
again, delete them by hand and say so in the changelog.
"""

import argparse
import json
from pathlib import Path

from plywise._util.files import write_whole
from plywise.arena.reports.bench_page import read_bench
from plywise.arena.scoring.targets import ENOUGH, choose_loose_target, choose_target
from plywise.arena.workloads import WORKLOADS, targets

STORED = Path(__file__).parents[2] / "src" / "plywise" / "arena" / "workloads" / "targets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", required=True, help="commit of the code that ran the bench")
    options = parser.parse_args()
    bench, lines = read_bench(options.folder)
    baselines = {name for name, method in bench["methods"].items() if method["baseline"]}
    found = targets()
    for name in bench["workloads"]:
        trials = [line for line in lines if line["workload"] == name]
        tuning = [line for line in trials if line["purpose"] == "tuning" and line["method"] in baselines]
        if name in found or name not in WORKLOADS:
            continue
        if len(tuning) < max(ENOUGH, bench["trials"] * len(baselines)):
            print(f"{name:20} none: {len(tuning)} tuning trials of the baselines are too few or incomplete")
            continue
        found[name] = {
            "target": choose_target(trials, baselines),
            "loose": choose_loose_target(trials, baselines),
            "trials": len(tuning),
            "commit": options.commit,
            "made_by": bench["command"],
        }
        print(f"{name:20} {found[name]['target']:.6g}  loose {found[name]['loose']:.6g}")
    write_whole(STORED, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
