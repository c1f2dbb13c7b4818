"""Count the targets that peers reach untuned at other rates than their former defaults in our benches.

The default rate of the recommended method, 0.02, was found on six data sets
(`benchmarks/recommended_defaults.py`). That of Muon, NorMuon and SOAP was 0.005, at which their untuned
results are worse than at better rates.

    cd benchmarks/arena    # the folder of this module, for rates:muon02
    plywise bench --workloads hidden --hidden-seed 20261130 --trials 0 --seeds 5
      --methods rates:muon01,rates:muon02,rates:normuon01,rates:normuon02,rates:soap01,recommended
      --out ../../runs/arena/rates-hidden
    python rates.py        # adds the results to rates.json

The folder rates-standard comes from the same command on the eight smallest standard workloads. The folder
rates-adamw comes from rates:adamw003, rates:adamw01, rates:adamw02 and rates:soap02 on the same eight. The
targets are those of the standard workloads and of the bench hidden.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from plywise._util.files import write_whole
from plywise.arena.method import Method
from plywise.arena.methods import find_method
from plywise.arena.reports.bench_page import read_bench
from plywise.arena.scoring.records import DEFAULTS
from plywise.arena.scoring.score import to_target
from plywise.arena.scoring.targets import choose_target
from plywise.arena.workloads import targets

RUNS = Path(__file__).parents[2] / "runs" / "arena"
FOLDERS = {"rates-standard": "standard", "rates-adamw": "standard", "rates-hidden": "hidden"}
"""Folders of untuned runs, and the bench that their workloads come from."""


def set_default(name: str, rate: float) -> Method:
    """Return a peer with this default rate and a weight decay of 0.1, as for the recommended method."""
    method = find_method(name)
    numbers = {"lr": rate, "weight_decay": 0.1}
    space = {key: replace(parameter, default=numbers[key]) for key, parameter in method.space.items()}
    return replace(method, name=f"{name}-{rate:g}", space=space, baseline=False)


muon01, muon02 = set_default("muon", 0.01), set_default("muon", 0.02)
normuon01, normuon02 = set_default("normuon", 0.01), set_default("normuon", 0.02)
soap01, soap02 = set_default("soap", 0.01), set_default("soap", 0.02)
adamw003, adamw01, adamw02 = (set_default("adamw", rate) for rate in (0.003, 0.01, 0.02))


def find_target(workload: str) -> float:
    """Return the stored target of a standard workload, or the target that a hidden bench's baselines set."""
    if (stored := targets().get(workload)) is not None:
        return float(stored["target"])
    bench, lines = read_bench(RUNS / "hidden")
    baselines = {name for name, method in bench["methods"].items() if method["baseline"]}
    found = choose_target([line for line in lines if line["workload"] == workload], baselines)
    return -math.inf if found is None else found


def count_reached(untuned: Path) -> dict[str, dict[str, int]]:
    """Count the untuned runs that reach the target, by method and workload."""
    lines = [line for line in read_bench(untuned)[1] if line["track"] == DEFAULTS]
    workload_targets = {name: find_target(name) for name in dict.fromkeys(line["workload"] for line in lines)}
    found: dict[str, Counter[str]] = {}
    for line in lines:
        reached = to_target(line, workload_targets[line["workload"]]) < math.inf
        found.setdefault(line["method"], Counter())[line["workload"]] += reached
    return {method: dict(counts) for method, counts in found.items()}


def main() -> None:
    out = Path(__file__).with_suffix(".json")
    found = json.loads(out.read_text())
    for folder, kind in FOLDERS.items():
        if (RUNS / folder).exists():
            found[kind].update(count_reached(RUNS / folder))
    for kind, methods in found.items():
        for method, counts in methods.items():
            print(f"{kind:10} {method:16} {sum(counts.values())} of {5 * len(counts)}")
    write_whole(out, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
