"""Evidence between backward and the optimizer's step: first staged, then pending."""

from dataclasses import dataclass

from plywise.engine.contract import Evidence
from plywise.engine.passes import RecentPasses, find_pass, list_arriving


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
        self._staged: dict[str, RecentPasses[tuple[bool, Evidence]]] = {}

    def stage(self, name: str, waits: bool, evidence: Evidence) -> None:
        """Keep the running backward pass's evidence of a layer; it does not count yet."""
        passes = self._staged.setdefault(name, RecentPasses())
        earlier = passes.get(find_pass())
        if earlier is not None:  # a layer called several times
            evidence = add_evidence(earlier[1], evidence)
        passes[find_pass()] = waits, evidence

    def arrive(self, name: str, mark: tuple[int, int]) -> None:
        """Count the evidence of a layer, if there is any: its weight's gradient has arrived in ``.grad``."""
        passes = self._staged.setdefault(name, RecentPasses())
        for task in list_arriving(passes):
            waits, evidence = passes.pop(task)
            pending = self.pending.get(name)
            if pending is not None:
                evidence = add_evidence(pending.evidence, evidence)
            self.pending[name] = Pending(waits, evidence, mark)

    def drop(self) -> None:
        """Forget all evidence: the step does not happen, or has been taken."""
        self._staged.clear()
        self.pending.clear()


def add_evidence(first: Evidence, second: Evidence) -> Evidence:
    """Add the evidence of two passes; it is empty in a step that gathers none."""
    return {key: first[key] + second[key] for key in second} if first and second else first or second
