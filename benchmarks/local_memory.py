"""Peak memory of training 16 blocks: backpropagation, activation checkpointing, local learning.

    python benchmarks/local_memory.py                 # writes benchmarks/local_memory.json

16 blocks of Linear(512, 512) and ReLU, a classifier of 10, batch 8192, SGD. Each way runs in a process of
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import plywise as pw
from plywise._util.environment import environment
from plywise._util.files import write_whole

WIDTH, BLOCKS, BATCH, CLASSES = 512, 16, 8192, 10
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


WAYS: dict[str, Callable[[], Step]] = {
    "backpropagation": backprop,
    "checkpointing, 4 segments": lambda: backprop(4),
    "checkpointing, 16 segments": lambda: backprop(16),
    "LocalLoss": lambda: local(lambda b: pw.LocalLoss(b, CLASSES, optimizer=sgd)),
    "AssociatedLearning, code 32": lambda: local(
        lambda b: pw.AssociatedLearning(b, CLASSES, code=32, optimizer=sgd)
    ),
}


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:"))


def measure(way: str) -> dict[str, float]:
    """Peak above base in MiB, CPU microseconds a sample; for a process of its own."""
    torch.set_num_threads(1)
    step = WAYS[way]()
    step(torch.zeros(2, WIDTH), torch.zeros(2, dtype=torch.long))  # imports and buffers of the libraries
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    base = status("VmRSS")
    step(x, y)
    peak = status("VmHWM") - base
    clocks = []
    for _ in range(STEPS):
        start = time.process_time()
        step(x, y)
        clocks.append(time.process_time() - start)
    return {"peak_mib": peak / 2**20, "cpu_us_per_sample": 1e6 * statistics.median(clocks) / BATCH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(REPEATS):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
            runs[way].append(json.loads(done.stdout))
    table = {
        way: {key: statistics.median(run[key] for run in own) for key in own[0]} for way, own in runs.items()
    }
    plain = table["backpropagation"]
    print(f"{'way':30} {'peak, MiB':>10} {'of backprop':>12} {'µs a sample':>12} {'of backprop':>12}")
    for way, row in table.items():
        relative = [row[key] / plain[key] for key in ("peak_mib", "cpu_us_per_sample")]
        print(
            f"{way:30} {row['peak_mib']:10.1f} {relative[0]:12.3f} {row['cpu_us_per_sample']:12.2f} "
            f"{relative[1]:12.2f}"
        )
    result = {"environment": environment(), "repeats": REPEATS, "ways": table, "runs": runs}
    write_whole(Path(__file__).with_suffix(".json"), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
