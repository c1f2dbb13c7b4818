"""Measure the peak memory of a step: local learning, and backpropagation with ways to save memory.

    python benchmarks/local_memory.py                         # writes benchmarks/local_memory.json
    python benchmarks/local_memory.py --network transformer   # one network only

The network "blocks" has 16 blocks of Linear(512, 512) and ReLU and a classifier of 10, with batch 8192 and
SGD. "transformer" has 4 blocks of width 256 with 8 heads and 65 characters, with batches of 16 × 128
characters and SGD. Each method runs in its own process. Its memory is the peak of the resident memory (VmHWM)
above that after a step on two rows. Large tensors are mapped and unmapped (``MALLOC_MMAP_THRESHOLD_``), so
freed memory is not counted. The time per sample is measured in the same processes, after the peak. Everything
runs on one thread, with methods taking turns; the figures are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import plywise as pw
from plywise._util.environment import environment
from plywise._util.files import write_whole
from plywise.arena.workloads.networks import TransformerBlock
from plywise.local.next_token import linear_head

WIDTH, BLOCKS, BATCH, CLASSES = 512, 16, 8192, 10
TOKEN, TOKEN_BLOCKS, TOKEN_BATCH, CONTEXT, CHARACTERS = 256, 4, 16, 128, 65
REPEATS, STEPS = 5, 3
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
Step = Callable[[Tensor, Tensor], object]


def make_blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    hidden: list[nn.Module] = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(BLOCKS - 1)]
    return [*hidden, nn.Linear(WIDTH, CLASSES)]


def make_sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def make_backprop(segments: int | None = None) -> Step:
    model = nn.Sequential(*make_blocks())
    optimizer = make_sgd(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        scores = (
            model(x) if segments is None else checkpoint_sequential(model, segments, x, use_reentrant=False)
        )
        F.cross_entropy(scores, y).backward()
        optimizer.step()

    return step


def make_local(learner: Callable[[pw.Blocks], object]) -> Step:
    return learner(pw.Blocks(make_blocks(), torch.zeros(2, WIDTH))).step


class Embed(nn.Module):
    """Embeds characters and their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(CHARACTERS, TOKEN), nn.Embedding(CONTEXT, TOKEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.characters(tokens) + self.positions.weight


def make_token_blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    first, *others = (TransformerBlock(TOKEN, 8) for _ in range(TOKEN_BLOCKS))
    return [nn.Sequential(Embed(), first), *others]


def make_token_backprop(pieces: int = 1, checkpointed: bool = False) -> Step:
    """Make a step that processes a batch in pieces, or runs each block again in backward."""
    model = nn.Sequential(*make_token_blocks(), linear_head(TOKEN, CHARACTERS))
    optimizer = make_sgd(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for a, b in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
            scores = (
                checkpoint_sequential(model, TOKEN_BLOCKS, a, use_reentrant=False)
                if checkpointed
                else model(a)
            )
            (F.cross_entropy(scores.flatten(0, 1), b.flatten()) * (len(a) / len(x))).backward()
            del scores
        optimizer.step()

    return step


def make_next_token(pieces: int) -> Step:
    blocks = pw.Blocks(make_token_blocks(), torch.zeros(2, CONTEXT, dtype=torch.long))
    return pw.LocalNextToken(blocks, CHARACTERS, pieces=pieces, optimizer=make_sgd).step


def draw_numbers(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, WIDTH), torch.randint(CLASSES, (count,))


def draw_characters(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(CHARACTERS, (count, CONTEXT)), torch.randint(CHARACTERS, (count, CONTEXT))


@dataclass(frozen=True)
class Network:
    """How a batch is drawn, its size, and the methods to train with."""

    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int
    methods: dict[str, Callable[[], Step]]


NETWORKS = {
    "blocks": Network(
        draw_numbers,
        BATCH,
        {
            "backpropagation": make_backprop,
            "checkpointing, 4 segments": lambda: make_backprop(4),
            "checkpointing, 16 segments": lambda: make_backprop(16),
            "LocalLoss": lambda: make_local(lambda b: pw.LocalLoss(b, CLASSES, optimizer=make_sgd)),
            "AssociatedLearning, code 32": lambda: make_local(
                lambda b: pw.AssociatedLearning(b, CLASSES, code=32, optimizer=make_sgd)
            ),
        },
    ),
    "transformer": Network(
        draw_characters,
        TOKEN_BATCH,
        {
            "backpropagation": make_token_backprop,
            "accumulation, 4 parts": lambda: make_token_backprop(4),
            "checkpointing, each block": lambda: make_token_backprop(checkpointed=True),
            **{f"LocalNextToken, pieces={n}": partial(make_next_token, n) for n in (1, 2, 4)},
        },
    ),
}


def read_status(key: str) -> int:
    """Read a line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:"))


def measure(network: Network, method: str) -> dict[str, float]:
    """Measure the peak in MiB and the CPU microseconds per sample of one method, in this process."""
    torch.set_num_threads(1)
    step = network.methods[method]()
    step(*network.data(2))  # imports and buffers of the libraries
    x, y = network.data(network.batch)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    base = read_status("VmRSS")
    step(x, y)
    peak = read_status("VmHWM") - base
    clocks = []
    for _ in range(STEPS):
        start = time.process_time()
        step(x, y)
        clocks.append(time.process_time() - start)
    return {"peak_mib": peak / 2**20, "cpu_us_per_sample": 1e6 * statistics.median(clocks) / network.batch}


def measure_all(name: str, repeats: int) -> dict[str, Any]:
    """Measure all methods of one network, taking turns, and return the medians."""
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in NETWORKS[name].methods}
    for _ in range(repeats):
        for method, results in runs.items():
            command = [sys.executable, __file__, "--network", name, "--way", method]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
            results.append(json.loads(done.stdout))
    table = {
        method: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for method, results in runs.items()
    }
    plain = table["backpropagation"]
    print(f"{name:30} {'peak, MiB':>10} {'of backprop':>12} {'µs per sample':>13} {'of backprop':>12}")
    for method, row in table.items():
        relative = [row[key] / plain[key] for key in ("peak_mib", "cpu_us_per_sample")]
        print(
            f"{method:30} {row['peak_mib']:10.1f} {relative[0]:12.3f} {row['cpu_us_per_sample']:12.2f} "
            f"{relative[1]:13.2f}"
        )
    return {"environment": environment(), "repeats": repeats, "ways": table, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), help="default: both")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(NETWORKS[options.network], options.way)))
        return
    out = Path(__file__).with_suffix(".json")
    result = json.loads(out.read_text()) if out.exists() else {}
    for name in [options.network] if options.network else NETWORKS:
        result[name] = measure_all(name, options.repeats)
        write_whole(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
