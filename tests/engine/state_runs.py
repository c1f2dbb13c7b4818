"""Runs whose optimizer state is saved in many ways: models with layers of every kind, and what is seen."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from contract.registry import CASES
from plywise import Rule, recommend
from plywise.testing.contract.memories import copy_memory
from plywise.testing.contract.models import copy_weights, make_batch

RULES: dict[str, Callable[[], Rule]] = {
    case.name: case.make
    for case in CASES
    if case.name in ("rls", "foof", "adabk", "precondition-two-sided-low-rank", "coordinates")
    or case.name in ("gradient_amplification-gradient", "back_matching-mean", "nlms")
}
"""Rules whose statistics differ in kind, and one without; most have layers that are refreshed in different
steps."""

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05),  # has no state of its own
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "adamw-fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01),
}


class Transposed(nn.Module):
    """A linear layer whose weight is (inputs, outputs), as GPT-2 has it: only its calls show what it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Varied(nn.Module):
    """Layers known at attach and not, attention with its weight in parts, a branch that begins at zero.

    ``position`` has the shape of a weight, and no call ever uses it as one.
    """

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.late, self.later = nn.Linear(6, 8), Transposed(8, 8), Transposed(8, 8)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.branch = nn.Linear(8, 8)
        nn.init.zeros_(self.branch.weight)
        self.scale = nn.Parameter(torch.zeros(8))  # the branch's first gradient is zero
        self.position = nn.Parameter(torch.randn(2, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, late: bool = True) -> Tensor:
        h = torch.tanh(self.first(x))
        if late:
            h = h + torch.tanh(self.later(torch.tanh(self.late(h))))
        h = h + self.scale * self.branch(h)
        parts = h.view(-1, 2, 4) + self.position
        attended, _ = self.attention(parts[:, :1], parts, parts, need_weights=False)
        return self.head(h + attended.repeat(1, 2, 1).view(-1, 8))


class Stacked(nn.Module):
    """Two equal layers in one weight; the order of their calls is free."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight, self.head = nn.Parameter(torch.randn(12, 6) / 3), nn.Linear(12, 3)

    def forward(self, x: Tensor, turned: bool = False) -> Tensor:
        places = (slice(6, 12), slice(0, 6)) if turned else (slice(0, 6), slice(6, 12))
        found = {place.start: torch.tanh(F.linear(x, self.weight[place])) for place in places}
        return self.head(torch.cat([found[0], found[6]], 1))


class Run:
    """A model in training under a rule.

    Args:
        rule: the rule, attached at once unless that is left for later.
        optimizer: makes the optimizer.
        seed: of the model.
        attach: whether to attach.
        model: another model.
    """

    def __init__(
        self,
        rule: Rule,
        optimizer: Callable[[Any], Optimizer],
        seed: int = 1,
        attach: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        self.model = Varied(seed) if model is None else model
        self.optimizer = optimizer(self.model.parameters())
        self.rule = rule
        if attach:
            self.attach()

    def attach(self) -> "Run":
        self.rule.attach(self.model, self.optimizer)
        return self

    def compute_loss(self, number: int, rows: slice = slice(None), **options: Any) -> Tensor:
        """The loss of a step's batch: so few rows that backward makes the updates of most layers."""
        x, y = make_batch((6,), 4, next(self.model.parameters()).dtype, 40 + number)
        return F.cross_entropy(self.model(x[rows], **options), y[rows])

    def step(self, number: int, **options: Any) -> None:
        self.optimizer.zero_grad()
        self.compute_loss(number, **options).backward()
        self.optimizer.step()

    def steps(self, *numbers: int) -> "Run":
        for number in numbers:
            self.step(number)
        return self

    def copy_memory(self) -> dict[str, Tensor]:
        return copy_memory(self.model, self.optimizer)

    def copy_state(self) -> dict[str, Tensor]:
        """Weights, statistics, and the optimizer's own tensors."""
        own = {
            f"{number}/{key}": value.clone()
            for number, state in enumerate(self.optimizer.state[p] for p in self.model.parameters())
            for key, value in state.items()
            if isinstance(value, Tensor) and not key.startswith("plywise.")
        }
        return {**copy_weights(self.model), **self.copy_memory(), **own}


class RecommendedRun(Run):
    """A run with the optimizer and the rule of `plywise.recommend`."""

    def __init__(self, seed: int = 1, attach: bool = True) -> None:
        self.model = Varied(seed)
        self.optimizer, self.rule = recommend(self.model, lr=0.01, budget=math.inf)
        if not attach:
            self.rule.detach()


def start_run(rule: str, optimizer: str, seed: int = 1, attach: bool = True) -> Run:
    """Start a run under the rule and the optimizer of these names; "recommended" has its own optimizer."""
    if rule == "recommended":
        return RecommendedRun(seed, attach)
    return Run(RULES[rule](), OPTIMIZERS[optimizer], seed, attach)
