"""Forecast the speed of a pipeline with any number of stages, by a discrete-event model of its schedule."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """The cost of a batch in one stage.

    Attributes:
        forward: seconds until the signal for the next stage is ready.
        rest: seconds of the local backward and step after that.
        payload: bytes to send to the next stage.
    """

    forward: float
    rest: float
    payload: float = 0.0


@dataclass(frozen=True)
class Link:
    """A connection between neighbouring stages.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds.
        depth: batches that can wait in the link before the sender has to wait.
    """

    bandwidth: float = float("inf")
    latency: float = 0.0
    depth: int = 4


@dataclass(frozen=True)
class Forecast:
    """The forecast for a run.

    Attributes:
        seconds: time from the start of the first batch to the end of the last one.
        spans: for each stage, (start, end) of each batch.
    """

    seconds: float
    spans: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def bubble(self) -> float:
        """Return the share of time in which the stages are idle."""
        busy = sum(end - start for stage in self.spans for start, end in stage)
        return 1 - busy / (self.seconds * len(self.spans))


def forecast(stages: Sequence[StageCost], batches: int, link: Link | None = None) -> Forecast:
    """Simulate ``batches`` passing through the stages of a one-way pipeline.

    A stage starts batch k when it has finished batch k-1 and batch k has arrived. It sends its signal after
    ``forward``, as soon as the link has room; the transfer takes ``latency + payload / bandwidth`` seconds,
    one message at a time. With equal stages of c seconds and a link without delay, n batches on l stages take
    ``(n - 1 + l) c``, minus the overlap of ``rest``.

    Example:
        >>> from forecast import StageCost, forecast
        >>> forecast([StageCost(forward=1.0, rest=0.0)] * 3, batches=10).seconds
        12.0
    """
    link = link or Link()
    spans: list[list[tuple[float, float]]] = [[] for _ in stages]
    ready = [[0.0] * batches for _ in stages]  # when a batch has arrived at a stage
    wire = [0.0] * len(stages)  # when the link after a stage is free again
    for batch in range(batches):
        for i, cost in enumerate(stages):
            previous = spans[i][batch - 1][1] if batch else 0.0
            start = max(previous, ready[i][batch])
            sent = start + cost.forward
            if i + 1 < len(stages):
                received = spans[i + 1][batch - link.depth][0] if batch >= link.depth else 0.0
                sent = max(sent, received)  # there must be room in the link
                wire[i] = max(sent, wire[i]) + cost.payload / link.bandwidth
                ready[i + 1][batch] = wire[i] + link.latency
            spans[i].append((start, sent + cost.rest))
    return Forecast(
        max(stage_spans[-1][1] for stage_spans in spans), tuple(tuple(stage_spans) for stage_spans in spans)
    )
