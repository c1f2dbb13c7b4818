"""What a rule remembers, as its users see it: the part of ``optimizer.state_dict()`` that is its."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from plywise import Rule

from .models import batch, loss_of, mlp, weights
from .registry import Case

Data = tuple[Tensor, Tensor]


def memory(optimizer: Optimizer) -> dict[str, Tensor]:
    """A copy of all memories: tensors by rule, layer and name, and the number of steps."""
    return flat(optimizer.state_dict().get("plywise", []))


def flat(entries: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The entry of a state dict as tensors by name, copied."""
    found = {}
    for number, entry in enumerate(entries):
        start = f"{number}/{entry['rule']}"
        found[f"{start}/step"] = torch.tensor(entry["step"])
        for layer, tensors in entry["layers"].items():
            for key, value in tensors.items():
                found[f"{start}/{layer}/{key}"] = value.detach().clone()
    return found


def of_layer(memories: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The part of one layer, e.g. ``"2"``."""
    return {key: value for key, value in memories.items() if key.split("/")[2] == layer}


def statistics(memories: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """What a layer learned, without what is made of it (whose size follows the gradient)."""
    made = (".root", ".vectors", ".weights", ".scale", "/scale")
    return {key: value for key, value in of_layer(memories, layer).items() if not key.endswith(made)}


ROWS = 4


def mixed(dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Sequential:
    """Layers of every kind on (B, 2, 6, 6); only the first linear one has more outputs than rows."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ).to(dtype)


KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "mixed": (mixed, (2, 6, 6)),
}


@dataclass
class Run:
    """A model in training under a rule."""

    model: nn.Module
    optimizer: Optimizer
    rule: Rule
    shape: tuple[int, ...]

    def data(self, number: int) -> Data:
        """The batch of a step: few rows, so that of most linear layers backward makes the moves."""
        return batch(self.shape, ROWS, next(self.model.parameters()).dtype, 40 + number)

    def backward(self, number: int) -> None:
        """The gradient of a step's batch, added to what is there."""
        loss_of(self.model, self.data(number)).backward()

    def step(self, number: int) -> None:
        """One whole step."""
        self.optimizer.zero_grad()
        self.backward(number)
        self.optimizer.step()

    def seen(self) -> dict[str, Tensor]:
        """Weights, buffers and memories."""
        return {**weights(self.model), **memory(self.optimizer)}


def start(
    case: Case, kind: str = "mlp", seed: int = 1, dtype: torch.dtype = torch.float32, steps: int = 0
) -> Run:
    """A run under SGD with momentum, after so many steps."""
    build, shape = KINDS[kind]
    model = build(dtype, seed=seed)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = Run(model, optimizer, case.make().attach(model, optimizer), shape)
    for number in range(steps):
        run.step(number)
    return run


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm's own memory of forwards is torch's affair."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)
