"""What a rule remembers, as its users see it: the part of ``optimizer.state`` that is its."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from plywise import Rule
from plywise.testing.cases import Case
from plywise.testing.contract.models import batch, loss_of, mlp, weights

Data = tuple[Tensor, Tensor]
PREFIX = "plywise."


def memory(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """A copy of all statistics, ``"Foof/2/input"``, and of the steps that each rule has counted."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return flat({names[p]: state for p, state in optimizer.state.items() if p in names})


def saved_memory(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Tensor]:
    """The same of a state dict of this optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [names[p] for group in optimizer.param_groups for p in group["params"]]
    return flat({parameters[index]: own for index, own in state["state"].items()})


def flat(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The statistics in the states of parameters, given by name; a template (of step 0) is none."""
    found = {}
    for parameter, state in states.items():
        for key, value in state.items():
            if not str(key).startswith(PREFIX):
                continue
            owner, _, name = key.removeprefix(PREFIX).partition(".")
            rule, _, part = owner.partition("[")
            steps = state[f"{PREFIX}{rule}.step"]
            if not steps:
                continue
            if name == "step":
                found[f"{rule}/step"] = torch.tensor(max(steps, int(found.get(f"{rule}/step", 0))))
            else:
                layer = parameter.removesuffix(".weight") + (f"[{part}" if part else "")
                found[f"{rule}/{layer}/{name}"] = torch.as_tensor(value).detach().clone()
    return found


def of_layer(memories: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The part of one layer, e.g. ``"2"``."""
    return {key: value for key, value in memories.items() if key.split("/")[1:2] == [layer]}


def layers_of(memories: dict[str, Tensor]) -> set[str]:
    """The layers that have statistics."""
    return {key.split("/")[1] for key in memories if key.count("/") == 2}


def tensors_of(memories: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rule's own tensors, without what says in which step they are due."""
    return {key: value for key, value in memories.items() if value.is_floating_point()}


def statistics(memories: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """What a layer learned, without what is made of it (whose size follows the gradient)."""
    made = (".root", ".basis", ".vectors", ".weights", ".scale", "/scale", "/phase", "/in_backward")
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

    def memory(self) -> dict[str, Tensor]:
        """A copy of all statistics."""
        return memory(self.model, self.optimizer)

    def seen(self) -> dict[str, Tensor]:
        """Weights, buffers and memories."""
        return {**weights(self.model), **self.memory()}


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
