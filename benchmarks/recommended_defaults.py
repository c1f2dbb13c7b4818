"""Find the defaults of `plywise.recommend` on six small data sets that none of our benches uses.

    python benchmarks/recommended_defaults.py    # writes recommended_defaults.json in half an hour; resumes

The data sets are wine quality and yachts (tables), MNIST with an MLP, a ConvNet and a small ResNet, and
characters of film reviews with a transformer. Each arm differs from the defaults in one setting; nothing is
tuned. The table shows the final training loss and the lowest loss on held-out data (medians of three seeds).
It also shows the ratios of both losses and of the CPU time to those of the defaults, as geometric means over
the data sets. The defaults with other seeds are the null control.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

import plywise as pw
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.method import Method, Trainer, TrialContext, end_to_end
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.run.ledger import Ledger
from plywise.arena.scoring.records import DEFAULTS, TrialRecord
from plywise.arena.task import REGRESSION, SEQUENCES, Task
from plywise.arena.workload import Workload
from plywise.arena.workloads.networks import CharTransformer, conv_net, mlp, resnet
from plywise.arena.workloads.tables import prepare_table
from plywise.data.digits import Split
from plywise.data.parts import Data, draw_parts
from plywise.data.sets import load_grey_images, load_numeric_table
from plywise.data.tables import read_rows
from tuning import CROSS_ENTROPY, DATA, HERE

OUT = HERE / "recommended_defaults.json"
SEEDS, BATCH = 3, 64
Row = dict[str, dict[str, float]]
CHARACTERS, CONTEXT = 100, 32

# ---- the sets ----------------------------------------------------------------------------------------


def read_images(flat: bool) -> Data:
    """Read 4,000 images of MNIST and two parts of 1,000 others; pixels are from 0 to 1."""
    images, labels, *_ = load_grey_images("mnist")
    x, y = torch.from_numpy(images).float().div(255).unsqueeze(1), torch.from_numpy(labels).long()
    parts = draw_parts(x, y, (4000, 1000, 1000))
    return Data(*(Split(part.x.flatten(1) if flat else part.x, part.y) for part in parts))


def read_characters() -> Data:
    """Read windows of 32 characters of film reviews and their next characters; rare ones share a code."""
    text = " ".join(row["text"] for row in read_rows(DATA / "imdb_subset.csv.gz")[:400])
    codes = torch.tensor([min(max(ord(character) - 32, 0), CHARACTERS - 1) for character in text])
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    parts = windows.split([len(windows) - 800, 400, 400])
    return Data(*(Split(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts))


def make_workload(
    name: str, network: Callable[[], nn.Module], read: Callable[[], Data], task: Task, steps: int
) -> Workload:
    """Make a workload from a data set and a network; nothing is tuned, so it needs no target."""
    return Workload(name, "", network, read, task, BATCH, steps, target=0.0)


TABLES = {"wine": ("uci_wine_quality_red", 11), "yacht": ("uci_yacht", 6)}
WORKLOADS = [
    *(
        make_workload(
            name,
            partial(mlp, columns, 64, 64, 1),
            partial(prepare_table, partial(load_numeric_table, file)),
            REGRESSION,
            400,
        )
        for name, (file, columns) in TABLES.items()
    ),
    make_workload("MLP", partial(mlp, 784, 128, 128, 10), partial(read_images, True), CROSS_ENTROPY, 300),
    make_workload(
        "ConvNet",
        partial(conv_net, (1, 28, 28), (8, 16), (64, 10)),
        partial(read_images, False),
        CROSS_ENTROPY,
        200,
    ),
    make_workload(
        "ResNet",
        lambda: nn.Sequential(nn.Conv2d(1, 3, 1), *resnet(8, 16)),
        partial(read_images, False),
        CROSS_ENTROPY,
        120,
    ),
    make_workload(
        "characters",
        partial(CharTransformer, CHARACTERS, CONTEXT, width=64, depth=2, heads=4),
        read_characters,
        Task(SEQUENCES.loss, SEQUENCES.loss, "nats"),
        250,
    ),
]

# ---- the arms ----------------------------------------------------------------------------------------

INTERVALS = {"stats_every": 10, "refresh_every": 10, "slowdown": 1}
ARMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "defaults, other seeds": {},
    **{f"lr {lr:g}": {"lr": lr} for lr in (0.01, 0.03)},
    **{f"damping {damping:g}": {"damping": damping} for damping in (0.3, 3.0)},
    "power 0": {"power": 0.0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "renewed every 10 steps": INTERVALS,
}
"""The arms, by their settings of `plywise.recommend` or of its rule."""

ADAMW = (0.003, 0.01)


def make_recommended(name: str, settings: dict[str, Any]) -> Method:
    """Make a method from `recommend` with these settings."""

    def begin(context: TrialContext) -> Trainer:
        chosen = recommend(context, {key: value for key, value in settings.items() if key not in INTERVALS})
        if intervals := {key: value for key, value in settings.items() if key in INTERVALS}:
            assert isinstance(chosen.rule, pw.Coordinates)
            chosen.rule.detach()
            replace(chosen.rule, **intervals).attach(
                context.model, chosen.optimizer, on_nonfinite="propagate"
            )
        return end_to_end(context, chosen.optimizer)

    return Method(name, "", {}, begin, null="defaults" if "seeds" in name else None)


def recommend(context: TrialContext, settings: dict[str, Any]) -> pw.Recommendation:
    """Return the recommendation for a trial's model."""
    batch = (context.example,)
    return pw.recommend(context.model, batch=batch, batch_size=BATCH, on_nonfinite="propagate", **settings)


def train_with_plain_sizes(context: TrialContext) -> Trainer:
    """Scale Muon's steps to the size of AdamW's, as is usual."""
    optimizer = recommend(context, {}).optimizer
    for group in optimizer.param_groups:
        group["adjust_lr_fn"] = "match_rms_adamw"
    return end_to_end(context, optimizer)


def train_by_adamw(context: TrialContext) -> Trainer:
    """Use AdamW for all parameters, in the same coordinates, with settings that suit it."""
    optimizer = AdamW(context.model.parameters(), 0.015, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return end_to_end(context, optimizer, pw.Coordinates(damping=0.3))


OTHERS = {"steps as large as AdamW's": train_with_plain_sizes, "AdamW for all parameters": train_by_adamw}


def make_adamw(rate: float) -> Method:
    """Make a method: AdamW without a rule."""

    def begin(context: TrialContext) -> Trainer:
        return end_to_end(context, AdamW(context.model.parameters(), rate, fused=True))

    return Method(f"AdamW, lr {rate:g}", "", {}, begin)


def summarise(lines: list[TrialRecord]) -> dict[str, float]:
    """Return the medians of some runs; the losses are infinite if a run has failed."""
    failed = any(line["failure"] for line in lines)
    found = [[line["loss"][-1], min(line["validation"])] for line in lines if not failed]
    training, validation = map(statistics.median, zip(*found, strict=True)) if found else (math.inf, math.inf)
    return {
        "training": training,
        "validation": validation,
        "cpu": statistics.median(max(line["cpu"], default=0.0) for line in lines),
    }


def compare(row: Row, others: Row) -> dict[str, float]:
    """Return the ratios of this arm's figures to another's, as geometric means over the sets."""
    return {
        key: statistics.geometric_mean(row[name][key] / others[name][key] for name in others)
        for key in ("training", "validation", "cpu")
    }


def report(table: dict[str, Row], first: str, path: Path) -> None:
    """Print and write the results of each arm, and the ratios to the first one."""
    ratios = {name: compare(row, table[first]) for name, row in table.items()}
    for name, row in table.items():
        losses = "  ".join(
            f"{figures['training']:.4f} {figures['validation']:.4f}" for figures in row.values()
        )
        texts = [f"{key} {value:.2f}" for key, value in ratios[name].items()]
        print(f"{name:24} {losses}  over {first}: {', '.join(texts)}")
    found = {"arms": table, "ratios": ratios}
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.3g}"))
    write_whole(path, json.dumps({**rounded, "environment": environment()}) + "\n")


def run_untuned(arms: list[Method], path: Path) -> None:
    """Run the missing trials of these arms on all sets, then print and write the table."""
    torch.set_num_threads(1)
    ledger = Ledger(HERE.parent / "runs" / path.with_suffix(".jsonl").name)
    design = Design(SEEDS, tracks=(DEFAULTS,))
    table: dict[str, Row] = {arm.name: {} for arm in arms}
    for workload in WORKLOADS:
        found = run_arms(workload, arms, design, ledger)
        for arm in arms:
            table[arm.name][workload.name] = summarise(found.lines(workload.name, arm.name))
    report(table, arms[0].name, path)


def main() -> None:
    """Run the arms."""
    others = [Method(name, "", {}, begin) for name, begin in OTHERS.items()]
    run_untuned([*(make_recommended(*arm) for arm in ARMS.items()), *others, *map(make_adamw, ADAMW)], OUT)


if __name__ == "__main__":
    main()
