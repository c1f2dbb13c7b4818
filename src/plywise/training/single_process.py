"""Trains a learner in one process, with the interface that a session uses of a pipeline, too."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from plywise.local import checkpoint
from plywise.local.learner import Learner


class SingleProcessEngine:
    """Trains a learner in this process. Its checkpoints and a `Pipeline`'s are the same.

    Args:
        learner: the learner.
    """

    stage = replica = 0
    replicas = 1

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.trainers = learner.trainers
        self._asked = False

    def ask_to_stop(self) -> None:
        """Let `stopping` say so."""
        self._asked = True

    def stopping(self) -> bool:
        """Return whether a stop has been requested."""
        return self._asked

    def run(self, batches: Iterator[tuple[Tensor, Tensor]], after: Callable[[int], None]) -> int:
        """Train on batches; ``after`` is called with the number of steps done after each."""
        for x, y in batches:
            self.learner.step(x, y)
            after(self.learner.steps)
        return self.learner.steps

    def save(self, folder: Path, keep: int = 3) -> None:
        """Write a checkpoint."""
        state = self.learner.state_dict()
        states = {f"component {index}": part for index, part in enumerate(state.pop("trainers"))}
        checkpoint.save(folder, self.learner.steps, {**states, "learner": state}, keep)

    def restore(self, folder: Path, step: int | None = None) -> int:
        """Go on from a checkpoint, the last by default, whatever process wrote it; the number of steps done.

        Raises:
            StateError: there is none, or it is another learner's.
        """
        names = [f"component {trainer.index}" for trainer in self.trainers]
        states = checkpoint.load(folder, step, ["learner", *names])
        self.learner.load_state_dict({**states["learner"], "trainers": [states[name] for name in names]})
        return self.learner.steps

    def gather(self) -> Learner:
        """Do nothing: all components are in this process."""
        return self.learner
