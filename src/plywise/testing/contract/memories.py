"""What a rule remembers, as its users see it: its part of ``optimizer.state``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from plywise import Rule
from plywise.testing.cases import Case
from plywise.testing.contract.models import compute_loss, copy_weights, make_batch, make_mlp, train

Data = tuple[Tensor, Tensor]
PREFIX = "plywise."


def copy_memory(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copy all statistics, such as ``"Foof/2/input"``, and the steps that each rule has counted."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return flatten_memory({names[p]: state for p, state in optimizer.state.items() if p in names})


def copy_saved_memory(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Tensor]:
    """Do as `copy_memory`, for a state dict of this optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [names[p] for group in optimizer.param_groups for p in group["params"]]
    return flatten_memory({parameters[index]: own for index, own in state["state"].items()})


def flatten_memory(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the statistics in the states of parameters, by name; templates (of step 0) do not count."""
    found = {}
    for parameter, state in states.items():
        for key, value in state.items():
            if not str(key).startswith(PREFIX):
                continue
            owner, _, name = key.removeprefix(PREFIX).partition(".")
            rule, _, part = owner.partition("[")
            steps = state[f"{PREFIX}{rule}.step"]
            if not steps or name == "name":  # the parameter's, not a layer's
                continue
            if name == "step":
                found[f"{rule}/step"] = torch.tensor(max(steps, int(found.get(f"{rule}/step", 0))))
            else:
                layer = parameter.removesuffix(".weight") + (f"[{part}" if part else "")
                found[f"{rule}/{layer}/{name}"] = torch.as_tensor(value).detach().clone()
    return found


def select_layer(memories: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return the part of one layer, e.g. ``"2"``."""
    return {key: value for key, value in memories.items() if key.split("/")[1:2] == [layer]}


def list_layers(memories: dict[str, Tensor]) -> set[str]:
    """List the layers that have statistics."""
    return {key.split("/")[1] for key in memories if key.count("/") == 2}


def select_tensors(memories: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rule's own tensors, without those that say in which step they are due."""
    return {key: value for key, value in memories.items() if value.is_floating_point()}


def select_statistics(memories: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return what a layer learned, without what is computed from it (whose size depends on the gradient)."""
    made = (".root", ".basis", ".vectors", ".weights", ".scale", "/scale", "/phase", "/in_backward")
    return {key: value for key, value in select_layer(memories, layer).items() if not key.endswith(made)}


ROWS = 4


def make_mixed(dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Sequential:
    """Make layers of every kind on (B, 2, 6, 6); only the first linear one has more outputs than rows."""
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
    "mlp": (make_mlp, (6,)),
    "mixed": (make_mixed, (2, 6, 6)),
}


@dataclass
class Run:
    """A model in training under a rule."""

    model: nn.Module
    optimizer: Optimizer
    rule: Rule
    shape: tuple[int, ...] = (6,)

    @classmethod
    def begin(cls, rule: Rule, model: nn.Module, shape: tuple[int, ...] = (6,)) -> "Run":
        """Attach a rule, with SGD with momentum."""
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        return cls(model, optimizer, rule.attach(model, optimizer), shape)

    def make_data(self, number: int) -> Data:
        """Make the batch of a step. It has few rows, so backward makes the updates of most linear layers."""
        return make_batch(self.shape, ROWS, next(self.model.parameters()).dtype, 40 + number)

    def backward(self, number: int) -> None:
        """Add the gradient of a step's batch to what is there."""
        compute_loss(self.model, self.make_data(number)).backward()

    def step(self, number: int) -> None:
        """Take one whole step."""
        self.step_on(self.make_data(number))

    def step_on(self, data: Data) -> None:
        """Take one whole step on other data than the step's own."""
        train(self.model, self.optimizer, data, 1)

    def record(self, numbers: Iterable[int]) -> list[dict[str, Tensor]]:
        """Take steps, and copy the state after each."""
        found = []
        for number in numbers:
            self.step(number)
            found.append(self.copy_state())
        return found

    def restart(self, optimizer: Optimizer | None = None, **options: Any) -> None:
        """Attach the rule again, which then remembers nothing; perhaps to another optimizer."""
        self.rule.detach()
        self.optimizer = optimizer or self.optimizer
        self.rule.attach(self.model, self.optimizer, **options)

    def read_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, without a copy."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> "Run":
        """Load what `read_state` gave; return this run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self

    def copy_memory(self) -> dict[str, Tensor]:
        """Copy all statistics."""
        return copy_memory(self.model, self.optimizer)

    def copy_state(self) -> dict[str, Tensor]:
        """Copy weights, buffers and statistics."""
        return {**copy_weights(self.model), **self.copy_memory()}


def start(
    case: Case, kind: str = "mlp", seed: int = 1, dtype: torch.dtype = torch.float32, steps: int = 0
) -> Run:
    """Start a run under SGD with momentum, and take a number of steps."""
    build, shape = KINDS[kind]
    run = Run.begin(case.make(), build(dtype, seed=seed), shape)
    for number in range(steps):
        run.step(number)
    return run


@contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers after the block: batch norm's statistics of forwards are not plywise's concern."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)
