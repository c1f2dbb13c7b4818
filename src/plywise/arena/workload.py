"""A workload of the arena: a model, data, a task, and a number of steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from plywise.arena.task import Task, token_cross_entropy
from plywise.data.parts import Data
from plywise.errors import BenchError

__all__ = ["Data", "Workload"]

MEASUREMENTS = 25
"""Number of measurements in a run, unless its workload gives an interval."""


@dataclass(frozen=True)
class Workload:
    """A problem on which methods are compared.

    Attributes:
        name: its name.
        about: one line on what it is and what it tests.
        make_model: makes the network; called with the trial's seed set.
        make_data: reads the data. Raises PlywiseError where a file is missing.
        task: loss and metric.
        batch_size: samples a batch.
        steps: steps of a run.
        target: the target of the validation metric; None: taken from the baselines of the same bench.
        blocks: how many blocks local learners cut the network into; 0: it cannot be cut.
        classes: number of classes of a sample, or of each token, for local learners; 0 for other tasks.
        guesses: what was guessed about the user's data, a sentence each.
        measure_every: steps between two measurements; None: a 25th of the steps.
        train_eval_size: training samples that the training loss is measured on.
        calls: how a user's model is called (`plywise.arena.workloads.own_calls`); empty for a plain call.
    """

    name: str
    about: str
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], Data]
    task: Task
    batch_size: int = 128
    steps: int = 500
    target: float | None = None
    blocks: int = 0
    classes: int = 0
    guesses: tuple[str, ...] = ()
    calls: str = ""
    measure_every: int | None = None
    train_eval_size: int = 500

    @property
    def interval(self) -> int:
        """Steps between two measurements; there is one before the first step, too."""
        return self.measure_every or max(1, self.steps // MEASUREMENTS)

    @property
    def labels_tokens(self) -> bool:
        """Whether each token of a sample has a class, and not the sample."""
        return bool(self.classes) and self.task.loss is token_cross_entropy

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("steps", 1), ("blocks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BenchError(
                    f"Workload {self.name}: {name} must be a whole number of at least {least}, not {value!r}."
                )
