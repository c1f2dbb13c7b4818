"""Measure how memory and time of a step grow with depth and width, for every local learner and baseline.

    python benchmarks/local_growth.py run        # takes some minutes; writes benchmarks/local_growth.json
    python benchmarks/local_growth.py draw       # draws the picture

The network has blocks of Linear(width) and ReLU, a batch of 1,024 and 10 classes: 2 to 32 blocks of width
128, and 8 blocks of widths 32 to 512. Memory is the peak size of all tensors that a step creates, including
gradients and temporary tensors, without parameters and optimizer states. It is counted, so the load of the
machine does not matter. Time is the CPU time of a step on one thread, with methods taking turns, as the
median of five.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import plywise as pw
from local_baselines import Trainer
from local_table import BASELINES, ON_IMAGES, Problem, most_alive
from pictures import save_picture
from plywise._util.environment import environment
from plywise._util.files import write_whole

OUT = Path(__file__).with_suffix(".json")
METHODS = {**BASELINES, **ON_IMAGES}
DEPTHS, WIDTHS, WIDTH, DEPTH, BATCH, ROUNDS = (2, 4, 8, 16, 32), (32, 64, 128, 256, 512), 128, 8, 1024, 5


def make_blocks(depth: int, width: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]


def measure(depth: int, width: int) -> dict[str, dict[str, float]]:
    """Measure the memory and CPU time of a step of every method."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, width, generator=generator)
    y = torch.randint(0, 10, (BATCH,), generator=generator)
    problem = Problem(lambda: {}, partial(make_blocks, depth, width), 10, 0)
    trainers: dict[str, Trainer] = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        trainers[name] = method(problem, pw.Blocks(problem.blocks(), x[:2]), 1e-4)
        trainers[name].step(x, y)
    memory = {
        name: most_alive(lambda trainer=trainer: trainer.step(x, y)) for name, trainer in trainers.items()
    }
    rounds = [{name: time_step(trainer, x, y) for name, trainer in trainers.items()} for _ in range(ROUNDS)]
    return {
        name: {
            "bytes": memory[name],
            "cpu_seconds": round(statistics.median(times[name] for times in rounds), 5),
        }
        for name in trainers
    }


def time_step(trainer: Trainer, x: Tensor, y: Tensor) -> float:
    start = time.process_time()
    trainer.step(x, y)
    return time.process_time() - start


def run() -> None:
    result: dict[str, Any] = {"environment": environment(), "depth": {}, "width": {}}
    for axis, sizes in (("depth", [(d, WIDTH) for d in DEPTHS]), ("width", [(DEPTH, w) for w in WIDTHS])):
        for depth, width in sizes:
            result[axis][str(depth if axis == "depth" else width)] = measure(depth, width)
            print(f"{axis}: {depth} blocks of width {width}", flush=True)
    write_whole(OUT, json.dumps(result) + "\n")


def draw() -> None:
    """Draw memory (top) and time (bottom) over depth (left) and width (right)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # glyphs as paths would be most of the file
    import matplotlib.pyplot as plt

    result = json.loads(OUT.read_text())
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row")
    for column, axis in enumerate(("depth", "width")):
        for row, (key, scale, label) in enumerate(
            (("bytes", 2.0**-20, "memory of a step, MiB"), ("cpu_seconds", 1e3, "CPU time of a step, ms"))
        ):
            plot = axes[row, column]
            for number, name in enumerate(PLOTTED):
                sizes = result[axis]
                values = [scale * figures[name][key] for figures in sizes.values()]
                plot.plot(
                    [int(size) for size in sizes],
                    values,
                    "--" if name in BASELINES else ":" if number >= 10 else "-",
                    label=name,
                    color=f"C{number % 10}",
                )
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            plot.minorticks_off()
            plot.set_ylabel(label if column == 0 else "")
            plot.set_xlabel(f"blocks of width {WIDTH}" if axis == "depth" else f"width of {DEPTH} blocks")
    axes[0, 1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    save_picture(figure, OUT.with_suffix(".svg"))


PLOTTED = [name for name in METHODS if name not in ("deep supervision", "checkpointing", "one-step delay")]
"""The methods of the picture. The three others need as much as backpropagation."""


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("run", "draw"))
    run() if parser.parse_args().command == "run" else draw()


if __name__ == "__main__":
    sys.exit(main())
