"""Compare the cost of a training step with optimizers for matrices: plywise's and those of other packages.

plywise's optimizers batch matrices by shape. Each arm has its own model; the arms take turns in shuffled
order, a cycle of ten steps each, in one process. The figures are CPU times of the mean step of a cycle over
that of fused AdamW in the same round, as medians and quartiles over the rounds; a second fused AdamW is the
null control. "slowest" is the slowest step of a cycle over its median step. "over package" is our time over
the package's in the same round.

    OMP_NUM_THREADS=1 python benchmarks/peers_cost.py --json benchmarks/peers_cost.json
"""

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_optimizer import SOAP as PACKAGE_SOAP
from pytorch_optimizer import NorMuon as PackageNorMuon
from torch import Tensor, nn

from peers import split_hidden, torch_muon
from plywise.optim import KLSOAP, SOAP, Muon, NorMuon
from step_cost import make_mlp

CYCLE, WARM, RATE = 10, 11, 1e-4


class Transformer(nn.Module):
    """Encoder layers on tokens, given as one row per sample, with a classifier of the mean token."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.width = width
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the mean token."""
        return self.head(self.body(x.view(len(x), -1, self.width)).mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "64-128-128-128-10, batch 128": (lambda: make_mlp(64, 128, 128, 128, 10), (128, 64)),
    "8-64-64-2, batch 64": (lambda: make_mlp(8, 64, 64, 2), (64, 8)),
    "transformer, 2 layers of 64, batch 16": (Transformer, (16, 32 * 64)),
    "784-1024-1024-10, batch 256": (lambda: make_mlp(784, 1024, 1024, 10), (256, 784)),
}


def make_grouped(kind: Callable[..., Any], **settings: Any) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        hidden, rest = split_hidden(parameters)
        groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]
        return kind([{**group, "lr": RATE} for group in groups], **settings)

    return make


ARMS: dict[str, Callable[[Any], Any]] = {
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, RATE, fused=True),
    "AdamW, fused, again (null control)": lambda parameters: torch.optim.AdamW(parameters, RATE, fused=True),
    "Muon (torch) + AdamW": lambda parameters: torch_muon(parameters, RATE),
    "Muon": make_grouped(Muon, adjust_lr_fn="match_rms_adamw"),
    "NorMuon (pytorch_optimizer)": make_grouped(PackageNorMuon, update_scale="match_rms"),
    "NorMuon": make_grouped(NorMuon),
    "SOAP (pytorch_optimizer)": lambda parameters: PACKAGE_SOAP(parameters, RATE),
    "SOAP": lambda parameters: SOAP(parameters, RATE),
    "SOAP, staggered": lambda parameters: SOAP(parameters, RATE, stagger=True),
    "SOAP, one side": lambda parameters: SOAP(parameters, RATE, one_sided=True),
    "KL-SOAP": lambda parameters: KLSOAP(parameters, RATE),
}
PACKAGE_OF = {
    "AdamW, fused, again (null control)": "AdamW, fused",
    "Muon": "Muon (torch) + AdamW",
    "NorMuon": "NorMuon (pytorch_optimizer)",
    "SOAP": "SOAP (pytorch_optimizer)",
    "SOAP, staggered": "SOAP (pytorch_optimizer)",
    "SOAP, one side": "SOAP (pytorch_optimizer)",
}


class Runner:
    """The model, optimizer and batch of one arm."""

    def __init__(self, make: Callable[[], nn.Module], size: tuple[int, int], arm: str, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.model = device, make().to(device)
        self.optimizer = ARMS[arm]([p for p in self.model.parameters() if p.requires_grad])
        self.x = torch.rand(size, device=device)
        self.y = torch.arange(len(self.x), device=device) % 2

    def run_steps(self, steps: int) -> list[float]:
        """Run some steps, and return the CPU seconds of each; wall seconds on a GPU."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        clocks = []
        for _ in range(steps):
            start = clock()
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            if self.device != "cpu":
                torch.cuda.synchronize()
            clocks.append(clock() - start)
        return clocks


def measure(net: str, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Measure all arms on one network."""
    runners = {arm: Runner(*NETS[net], arm, device) for arm in ARMS}
    for runner in runners.values():
        runner.run_steps(WARM)
    means: dict[str, list[float]] = {arm: [] for arm in ARMS}
    slowest: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    for _ in range(rounds):
        for arm in order.sample(list(runners), len(runners)):
            clocks = runners[arm].run_steps(CYCLE)
            means[arm].append(statistics.fmean(clocks))
            slowest[arm].append(max(clocks) / statistics.median(clocks))
    table = {}
    for arm, seconds in means.items():
        low, middle, high = statistics.quantiles(compute_ratios(seconds, means["AdamW, fused"]), n=4)
        table[arm] = {"cost": middle, "low": low, "high": high, "ms": 1e3 * statistics.median(seconds)}
        table[arm]["slowest"] = statistics.median(slowest[arm])
        if arm in PACKAGE_OF:
            table[arm]["over_package"] = statistics.median(compute_ratios(seconds, means[PACKAGE_OF[arm]]))
    return table


def compute_ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [our_time / their_time for our_time, their_time in zip(ours, theirs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="measure the networks whose name contains this text")
    parser.add_argument(
        "--json", type=Path, help="file to write after each network; it keeps the other networks"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    about = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "threads": 1}
    about |= {"processor": platform.processor() or platform.machine(), "device": options.device}
    stored = options.json and options.json.exists() and json.loads(options.json.read_text())["tables"]
    tables = dict(stored or {})
    for net in [net for net in NETS if options.only in net]:
        wide = "1024" in net and options.device == "cpu"
        tables[net] = measure(net, max(3, options.rounds // 4) if wide else options.rounds, options.device)
        print(
            f"\n{net}\n{'arm':38} {'ms':>8} {'cost':>6} {'quartiles':>14} {'slowest':>8} {'over package':>13}"
        )
        for arm, row in tables[net].items():
            spread = f"{row['low']:.2f} - {row['high']:.2f}"
            over = f"{row['over_package']:.2f}" if "over_package" in row else ""
            print(
                f"{arm:38} {row['ms']:8.2f} {row['cost']:6.2f} {spread:>14} {row['slowest']:8.2f} {over:>13}"
            )
        if options.json:
            options.json.write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
