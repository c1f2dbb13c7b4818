"""Peak memory of a training step: backpropagation in the forms that save memory, and local learning.

    python benchmarks/local_memory.py                         # writes benchmarks/local_memory.json
    python benchmarks/local_memory.py --network transformer   # of one network only

"blocks": 16 blocks of Linear(512, 512) and ReLU, a classifier of 10, batch 8192, SGD. "transformer": 4 blocks
of width 256 with 8 heads, 65 characters, batch 16 of 128 characters, SGD. Each way runs in a process of
its own: the peak of its resident memory (VmHWM) above what it had after a step on two rows. Large tensors
are mapped and unmapped (``MALLOC_MMAP_THRESHOLD_``), so that what was freed is not counted. The time per
sample is taken in the same processes, after the peak; all on one thread, ways taking turns, medians.
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


def blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    hidden: list[nn.Module] = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(BLOCKS - 1)]
    return [*hidden, nn.Linear(WIDTH, CLASSES)]


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def backprop(segments: int | None = None) -> Step:
    model = nn.Sequential(*blocks())
    optimizer = sgd(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        scores = (
            model(x) if segments is None else checkpoint_sequential(model, segments, x, use_reentrant=False)
        )
        F.cross_entropy(scores, y).backward()
        optimizer.step()

    return step


def local(learner: Callable[[pw.Blocks], object]) -> Step:
    return learner(pw.Blocks(blocks(), torch.zeros(2, WIDTH))).step


class Embed(nn.Module):
    """Characters and where they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, TOKEN), nn.Embedding(CONTEXT, TOKEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.characters(tokens) + self.places.weight


def token_blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    first, *others = (TransformerBlock(TOKEN, 8) for _ in range(TOKEN_BLOCKS))
    return [nn.Sequential(Embed(), first), *others]


def token_backprop(pieces: int = 1, checkpointed: bool = False) -> Step:
    """Each piece of the batch, backward included, one after another; or each block again in backward."""
    model = nn.Sequential(*token_blocks(), linear_head(TOKEN, CHARACTERS))
    optimizer = sgd(model.parameters())

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


def next_token(pieces: int) -> Step:
    blocks = pw.Blocks(token_blocks(), torch.zeros(2, CONTEXT, dtype=torch.long))
    return pw.LocalNextToken(blocks, CHARACTERS, pieces=pieces, optimizer=sgd).step


def rows_of_numbers(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, WIDTH), torch.randint(CLASSES, (count,))


def rows_of_characters(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(CHARACTERS, (count, CONTEXT)), torch.randint(CHARACTERS, (count, CONTEXT))


@dataclass(frozen=True)
class Network:
    """How a batch is made, how large it is, and the ways to train."""

    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int
    ways: dict[str, Callable[[], Step]]


NETWORKS = {
    "blocks": Network(
        rows_of_numbers,
        BATCH,
        {
            "backpropagation": backprop,
            "checkpointing, 4 segments": lambda: backprop(4),
            "checkpointing, 16 segments": lambda: backprop(16),
            "LocalLoss": lambda: local(lambda b: pw.LocalLoss(b, CLASSES, optimizer=sgd)),
            "AssociatedLearning, code 32": lambda: local(
                lambda b: pw.AssociatedLearning(b, CLASSES, code=32, optimizer=sgd)
            ),
        },
    ),
    "transformer": Network(
        rows_of_characters,
        TOKEN_BATCH,
        {
            "backpropagation": token_backprop,
            "accumulation, 4 parts": lambda: token_backprop(4),
            "checkpointing, each block": lambda: token_backprop(checkpointed=True),
            **{f"LocalNextToken, pieces={n}": partial(next_token, n) for n in (1, 2, 4)},
        },
    ),
}


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:"))


def measure(network: Network, way: str) -> dict[str, float]:
    """Peak above base in MiB, CPU microseconds a sample; for a process of its own."""
    torch.set_num_threads(1)
    step = network.ways[way]()
    step(*network.data(2))  # imports and buffers of the libraries
    x, y = network.data(network.batch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    base = status("VmRSS")
    step(x, y)
    peak = status("VmHWM") - base
    clocks = []
    for _ in range(STEPS):
        start = time.process_time()
        step(x, y)
        clocks.append(time.process_time() - start)
    return {"peak_mib": peak / 2**20, "cpu_us_per_sample": 1e6 * statistics.median(clocks) / network.batch}


def measure_all(name: str, repeats: int) -> dict[str, Any]:
    """All ways of one network, taking turns, and the medians."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in NETWORKS[name].ways}
    for _ in range(repeats):
        for way, one in runs.items():
            command = [sys.executable, __file__, "--network", name, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
            one.append(json.loads(done.stdout))
    table = {
        way: {key: statistics.median(run[key] for run in own) for key in own[0]} for way, own in runs.items()
    }
    plain = table["backpropagation"]
    print(f"{name:30} {'peak, MiB':>10} {'of backprop':>12} {'µs a sample':>12} {'of backprop':>12}")
    for way, row in table.items():
        relative = [row[key] / plain[key] for key in ("peak_mib", "cpu_us_per_sample")]
        print(
            f"{way:30} {row['peak_mib']:10.1f} {relative[0]:12.3f} {row['cpu_us_per_sample']:12.2f} "
            f"{relative[1]:12.2f}"
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
