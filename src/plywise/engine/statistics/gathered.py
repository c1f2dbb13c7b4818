"""Evidence between backward and the optimizer's step: first staged, then pending."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from plywise.engine.contract import Evidence

KEPT_PASSES = 64
"""Backward passes whose evidence is kept until their gradient arrives."""


@dataclass
class Pending:
    """Evidence whose gradient is in ``.grad``, waiting for the step.

    Attributes:
        waits: whether that gradient is the plain one, from which the step makes the update.
        evidence: summed over the backward passes so far; empty in a step that gathers none.
        mark: which tensor ``.grad`` was when the last one arrived, and how often written to.
    """

    waits: bool
    evidence: Evidence
    mark: tuple[int, int]


class GatheredEvidence:
    """The evidence of a step so far.

    Attributes:
        pending: the evidence of each layer that will be learned if the step is taken.
    """

    def __init__(self) -> None:
        self.pending: dict[str, Pending] = {}
        self._staged: dict[str, dict[int, tuple[bool, Evidence]]] = {}

    def stage(self, name: str, waits: bool, evidence: Evidence) -> None:
        """Keep the running backward pass's evidence of a layer; it does not count yet."""
        passes, task = self._staged.setdefault(name, {}), torch._C._current_graph_task_id()
        earlier = passes.get(task)
        if earlier is not None:  # a layer called several times
            evidence = add_evidence(earlier[1], evidence)
        else:
            for other in [other for other in passes if other < task - KEPT_PASSES]:
                del passes[other]  # they never arrived
        passes[task] = waits, evidence

    def arrive(self, name: str, mark: tuple[int, int]) -> None:
        """Count the evidence of a layer, if there is any: its weight's gradient has arrived in ``.grad``."""
        passes = self._staged.get(name, {})
        for task in list_passes(passes):
            waits, evidence = passes.pop(task)
            pending = self.pending.get(name)
            if pending is not None:
                evidence = add_evidence(pending.evidence, evidence)
            self.pending[name] = Pending(waits, evidence, mark)

    def drop(self) -> None:
        """Forget all evidence: the step does not happen, or has been taken."""
        self._staged.clear()
        self.pending.clear()


def list_passes(tasks: Collection[int]) -> list[int]:
    """Return which of these backward passes have made a gradient that arrives now.

    That is the running pass; or those inside of it, which began later, if a function makes its gradients by
    `torch.autograd.grad` in its own backward (adjoint and reversible networks).
    """
    current = torch._C._current_graph_task_id()
    return [current] if current in tasks else [task for task in tasks if task > current]


def add_evidence(first: Evidence, second: Evidence) -> Evidence:
    """Add the evidence of two passes; it is empty in a step that gathers none."""
    return {key: first[key] + second[key] for key in second} if first and second else first or second
