"""How fast a pipeline of any number of stages would be: a discrete-event model of the schedule."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """What a batch costs in one stage.

    Attributes:
        forward: seconds until the signal for the next stage is ready.
        rest: seconds of local backward and step after that.
        payload: bytes that go on to the next stage.
    """

    forward: float
    rest: float
    payload: float = 0.0


@dataclass(frozen=True)
class Link:
    """A connection between neighbouring stages.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds.
        depth: batches that may wait in it before the sender has to.
    """

    bandwidth: float = float("inf")
    latency: float = 0.0
    depth: int = 4


@dataclass(frozen=True)
class Forecast:
    """What the model says of a run.

    Attributes:
        seconds: from the first batch's start to the last one's end.
        spans: for each stage, (start, end) of each batch.
    """

    seconds: float
    spans: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they do nothing."""
        busy = sum(end - start for stage in self.spans for start, end in stage)
        return 1 - busy / (self.seconds * len(self.spans))


def forecast(stages: Sequence[StageCost], batches: int, link: Link | None = None) -> Forecast:
    """Play ``batches`` through the stages of a one-way pipeline.

    A stage begins batch k when it has done batch k-1 and batch k has arrived; its signal leaves after
    ``forward`` (once there is room in the link) and travels ``latency + payload / bandwidth`` seconds, one
    message at a time. With equal stages of c seconds and a link that takes no time, n batches on l stages
    take ``(n - 1 + l) c`` less what ``rest`` overlaps.

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
                taken = spans[i + 1][batch - link.depth][0] if batch >= link.depth else 0.0
                sent = max(sent, taken)  # there must be room in the link
                wire[i] = max(sent, wire[i]) + cost.payload / link.bandwidth
                ready[i + 1][batch] = wire[i] + link.latency
            spans[i].append((start, sent + cost.rest))
    return Forecast(max(own[-1][1] for own in spans), tuple(tuple(own) for own in spans))
