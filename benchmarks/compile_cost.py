"""Measure what torch.compile does with a model under a rule: graphs, breaks, and the cost of a step.

    python benchmarks/compile_cost.py    # resumes if interrupted

Two models with the same weights take turns in one process, one eager and one compiled with torch's default
backend. They run blocks of 20 steps, 2 blocks before any is timed; a step is zero_grad, forward, loss,
backward and the optimizer's step. A ratio is the CPU time of a compiled block over the mean of the eager
blocks before and after it; the figures are medians. Both models get the same batches. The largest difference
between their weights is stored too.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import plywise as pw
from plywise._util.environment import environment
from plywise._util.files import write_whole
from step_cost import make_mlp
from tuning import HERE

STEPS, WARM, ROUNDS = 20, 2, 5


class Encoder(nn.Module):
    """A transformer encoder on vectors with a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores for inputs (B, T, 64)."""
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "64-128-128-128-10, batch 128": (lambda: make_mlp(64, 128, 128, 128, 10), (128, 64)),
    "transformer encoder, 32 × 16 tokens of 64": (Encoder, (32, 16, 64)),
}

RULES: dict[str, Callable[[], pw.Rule] | None] = {
    "no rule": None,
    "Backprop": pw.Backprop,
    "ProxProp": pw.ProxProp,
    "Foof": pw.Foof,
    "Coordinates": pw.Coordinates,
}


class Stepper:
    """A model, compiled or not, with its optimizer and batch."""

    def __init__(self, net: str, rule: Callable[[], pw.Rule] | None, backend: Any) -> None:
        make, shape = NETS[net]
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.rule = None if rule is None else rule().attach(self.model, self.optimizer)
        self.x, self.y = torch.randn(shape), torch.randint(10, shape[:1])
        self.call = self.model if backend is None else torch.compile(self.model, backend=backend)

    def time_block(self) -> float:
        """Return the CPU seconds of a block of steps."""
        start = time.process_time()
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            F.cross_entropy(self.call(self.x), self.y).backward()
            self.optimizer.step()
        return time.process_time() - start


def measure(net: str, rule: Callable[[], pw.Rule] | None) -> dict[str, float]:
    """Measure graphs, their operations, breaks, the ratio of costs, and the difference of the weights."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("inductor")
    eager, compiled = Stepper(net, rule, None), Stepper(net, rule, counter)
    for _ in range(WARM):
        before = eager.time_block()
        compiled.time_block()
    ratios = []
    for _ in range(ROUNDS):
        middle, after = compiled.time_block(), eager.time_block()
        ratios.append(2 * middle / (before + after))
        before = after
    pairs = zip(eager.model.parameters(), compiled.model.parameters(), strict=True)
    return {
        "graphs": counter.frame_count,
        "operations": counter.op_count,
        "breaks": sum(counters["graph_break"].values()),
        "cpu": statistics.median(ratios),
        "difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def main() -> None:
    """Measure all networks and rules, and write the figures; skip those that the file already has."""
    torch.set_num_threads(1)
    out = HERE / "compile_cost.json"
    figures: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"nets": {}}
    for net in NETS:
        table = figures["nets"].setdefault(net, {})
        for name, rule in RULES.items():
            if name not in table:
                table[name] = measure(net, rule)
                print(f"{net:44} {name:12} {table[name]}", flush=True)
                write_whole(out, json.dumps(figures | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
