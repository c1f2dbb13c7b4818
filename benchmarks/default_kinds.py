"""Measure whether rules help on embeddings and norms too, to choose the kinds of maps they take by default.

    python benchmarks/default_kinds.py char-transformer    # resumes if interrupted
    python benchmarks/default_kinds.py cifar-resnet

Each rule, on AdamW, trains a workload of the arena twice: with its default kinds (matrices) and with all
kinds. In both cases the rate is tuned (0.003, 0.01 or 0.03, by the last validation loss), and fresh seeds
follow. The table shows the validation loss at the end and the steps to the arena's target.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW

import plywise as pw
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.method import Method, Trainer, TrialContext, end_to_end
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.run.ledger import Ledger
from plywise.arena.scoring.records import FINAL, TUNED, TrialRecord
from plywise.arena.workloads import find_workload
from tuning import HERE

RULES = {"ProxProp": pw.ProxProp, "Foof": pw.Foof, "Coordinates": pw.Coordinates}
KINDS = {"matrices": None, "all": "all"}
RATES = (0.003, 0.01, 0.03)
OUT = HERE / "default_kinds.json"


def make_arm(rule: str, kinds: str) -> Method:
    """Make a method: a rule on AdamW that takes some kinds of maps."""

    def begin(context: TrialContext) -> Trainer:
        rate = context.numbers["rate"]
        optimizer = AdamW(context.model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
        if rule:
            RULES[rule]().attach(context.model, optimizer, kinds=KINDS[kinds])
        return end_to_end(context, optimizer)

    name = f"{rule}, {kinds}" if rule else "AdamW"
    return Method(name, "", {}, begin, grid=tuple({"rate": rate} for rate in RATES))


def choose_last(lines: Sequence[TrialRecord], _: float | None) -> TrialRecord | None:
    """Choose the rate with the lowest validation loss at the end."""
    finished = [line for line in lines if line["failure"] is None]
    return min(finished, key=lambda line: line["validation"][-1], default=None)


def summarise(lines: Sequence[TrialRecord], target: float) -> dict[str, Any]:
    """Summarise the final runs of an arm."""
    final = [line for line in lines if line["purpose"] == FINAL]
    if not final:  # all tuning trials failed
        return {"rate": None, "validation": [], "steps to target": []}
    ends = [None if line["failure"] else round(line["validation"][-1], 4) for line in final]
    steps = []
    for line in final:
        pairs = zip(line["steps"], line["validation"], strict=True)
        hits = [step for step, value in pairs if value <= target] if line["failure"] is None else []
        steps.append(hits[0] if hits else None)
    return {"rate": final[0]["numbers"]["rate"], "validation": ends, "steps to target": steps}


def main() -> None:
    """Run the missing arms of one workload, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    workload = find_workload(arguments.workload)
    target = workload.target or 0.0
    ledger = Ledger(HERE.parent / "runs" / f"default_kinds_{workload.name}.jsonl")
    design = Design(arguments.seeds, tracks=(TUNED,), choose=choose_last)
    arms = [make_arm("", "")] + [make_arm(rule, kinds) for rule in RULES for kinds in KINDS]
    results: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    table: dict[str, Any] = {}
    for arm in arms:
        lines = run_arms(workload, [arm], design, ledger).lines(workload.name, arm.name)
        table[arm.name] = summarise(lines, target)
        ends = [end for end in table[arm.name]["validation"] if end is not None]
        middle = f"{statistics.median(ends):.4f}" if ends else "failed"
        print(f"{arm.name:24} rate {table[arm.name]['rate']!s:<6} {middle}  {table[arm.name]}", flush=True)
        results[workload.name] = {"target": target, "arms": table, "environment": environment()}
        write_whole(OUT, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
