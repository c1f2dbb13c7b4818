"""Count Python calls and host synchronisations of a training step, with and without a rule.

A host synchronisation copies numbers from a tensor to Python (``item()``, ``bool(tensor)``, ``tolist()``);
each one stalls a GPU. They are counted on a CPU, where they cost nothing, since the code is the same.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SYNCHRONISATION = "aten::_local_scalar_dense"


def count_python_calls(run: Callable[[], Any]) -> int:
    """Count calls of Python and built-in functions while ``run`` runs."""
    count = 0

    def count_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_event)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def count_synchronisations(run: Callable[[], Any]) -> int:
    """Count how often ``run`` copies numbers from a tensor to Python."""
    lists = 0

    def count_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal lists
        is_tensor = isinstance(getattr(argument, "__self__", None), torch.Tensor)
        lists += event == "c_call" and is_tensor and argument.__name__ == "tolist"

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sys.setprofile(count_event)  # the profiler does not see `tolist`
        try:
            run()
        finally:
            sys.setprofile(None)
    return lists + sum(event.count for event in profiler.key_averages() if event.key == SYNCHRONISATION)


def count_step(model: torch.nn.Module, optimizer: Any, loss: Callable[[], Any]) -> dict[str, int]:
    """Count Python calls of a whole step, and synchronisations of its forward, backward and step."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    for _ in range(4):
        step()
    counts = {"python_calls": count_python_calls(step)}
    optimizer.zero_grad()
    losses: list[Any] = []
    counts["synchronisations_forward"] = count_synchronisations(lambda: losses.append(loss()))
    counts["synchronisations_backward"] = count_synchronisations(lambda: losses[0].backward())
    counts["synchronisations_step"] = count_synchronisations(optimizer.step)
    return counts
