"""How many targets the peers reach untuned at other rates than the defaults that they had in our benches.

The default of the recommended method, 0.02, was found on six sets (`benchmarks/recommended_defaults.py`).
That of Muon, NorMuon and SOAP was 0.005, which made them look worse untuned than they are.

    cd benchmarks/arena    # so that rates:muon02 is found
    plywise bench --workloads hidden --hidden-seed 20261130 --trials 0 --seeds 5
      --methods rates:muon01,rates:muon02,rates:normuon01,rates:normuon02,rates:soap01,recommended
      --out ../../runs/arena/rates-hidden
    python rates.py        # writes rates.json

The folder rates-standard is of the same command on the eight smallest of the standard workloads. The targets
are those of the benches recommended and hidden.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from plywise._util.files import write_whole
from plywise.arena.method import Method
from plywise.arena.methods import find_method
from plywise.arena.reports.bench_page import read_bench
from plywise.arena.scoring.records import DEFAULTS
from plywise.arena.scoring.score import to_target
from plywise.arena.scoring.targets import target_of
from plywise.arena.workloads import targets

RUNS = Path(__file__).parents[2] / "runs" / "arena"
BENCHES = {"standard": ("rates-standard", "recommended"), "hidden": ("rates-hidden", "hidden")}
"""The untuned runs, and the bench whose peers set the targets."""


def set_default(name: str, rate: float) -> Method:
    """A peer whose defaults are this rate and a weight decay of 0.1, as for the recommended method."""
    method = find_method(name)
    numbers = {"lr": rate, "weight_decay": 0.1}
    space = {key: replace(one, default=numbers[key]) for key, one in method.space.items()}
    return replace(method, name=f"{name}-{rate:g}", space=space, baseline=False)


muon01, muon02 = set_default("muon", 0.01), set_default("muon", 0.02)
normuon01, normuon02 = set_default("normuon", 0.01), set_default("normuon", 0.02)
soap01 = set_default("soap", 0.01)


def count_reached(untuned: Path, tuned: Path) -> dict[str, dict[str, int]]:
    """By method and workload: how many untuned runs reach the target."""
    bench, lines = read_bench(tuned)
    baselines = {name for name, method in bench["methods"].items() if method["baseline"]}
    found: dict[str, Counter[str]] = {}
    for line in read_bench(untuned)[1]:
        if line["track"] != DEFAULTS:
            continue
        name = line["workload"]
        stored = targets().get(name)
        target = (
            stored["target"]
            if stored
            else target_of([one for one in lines if one["workload"] == name], baselines)
        )
        reached = target is not None and to_target(line, target) < float("inf")
        found.setdefault(line["method"], Counter())[name] += reached
    return {method: dict(counts) for method, counts in found.items()}


def main() -> None:
    found = {name: count_reached(*(RUNS / folder for folder in pair)) for name, pair in BENCHES.items()}
    for name, methods in found.items():
        for method, counts in methods.items():
            print(f"{name:10} {method:16} {sum(counts.values())} of {5 * len(counts)}")
    write_whole(Path(__file__).with_suffix(".json"), json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
