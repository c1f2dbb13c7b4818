"""Backward passes by their numbers, and what is remembered of the latest ones."""

from collections.abc import Callable, Collection
from typing import TypeVar

import torch

KEPT_PASSES = 64
"""Several passes may run at the same time, and the gradients of `torch.autograd.grad` never arrive."""

V = TypeVar("V")

find_pass: Callable[[], int] = torch._C._current_graph_task_id
"""Return the number of the backward pass that runs; -1 if none does."""


class RecentPasses(dict[int, V]):
    """Values by the number of a backward pass; the oldest is dropped when there are too many."""

    def __setitem__(self, number: int, value: V) -> None:
        if number not in self and len(self) >= KEPT_PASSES:
            del self[next(iter(self))]
        super().__setitem__(number, value)


def list_arriving(passes: Collection[int]) -> list[int]:
    """Return which of these backward passes have made a gradient that arrives now.

    That is the running pass; or those inside of it, which began later, if a function makes its gradients by
    `torch.autograd.grad` in its own backward (adjoint and reversible networks).
    """
    current = find_pass()
    return [current] if current in passes else [number for number in passes if number > current]
