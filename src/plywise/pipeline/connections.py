"""The connections of one stage in a run: signals go to the next stage, gradients to the one before."""

from functools import partial

import torch
from torch import Tensor

from plywise.errors import PipelineError
from plywise.local.component import Signal
from plywise.local.learner import Neighbours
from plywise.pipeline.groups import Groups
from plywise.pipeline.links import Inbox, Outbox
from plywise.pipeline.watch import Watch


class Connections:
    """The connections of one stage in one run.

    Args:
        groups: the groups of processes.
        before: rank of the stage before; None for the first stage.
        following: rank of the stage after; None for the last one.
        watch: distinguishes a slow stage from a lost one.
        device: where this stage computes.

    Attributes:
        inbox: receives the signals of the stage before; None for the first stage.
    """

    def __init__(
        self, groups: Groups, before: int | None, following: int | None, watch: Watch, device: torch.device
    ) -> None:
        self.inbox = self._outbox = self._inbox_back = self._outbox_back = None
        if before is not None:
            self.inbox = Inbox(before, groups.links[before], watch, device)
            if groups.back:
                self._outbox_back = Outbox(before, groups.back[before], watch)
        if following is not None:
            self._outbox = Outbox(following, groups.links[following], watch)
            if groups.back:
                self._inbox_back = Inbox(following, groups.back[following], watch, device)

    def make_neighbours(self, step: int) -> Neighbours:
        """Return how the components of this stage reach the others in a step."""
        if self._outbox is None:
            return Neighbours(send_back=partial(self._send_back, step))
        emit = partial(self._outbox.put, step=step)
        return Neighbours(emit, partial(self._send_back, step), partial(self._receive_back, step))

    def _send_back(self, step: int, gradient: Tensor) -> None:
        assert self._outbox_back is not None
        self._outbox_back.put(Signal(gradient, gradient.new_zeros(0)), step)

    def _receive_back(self, step: int) -> Tensor:
        assert self._inbox_back is not None
        number, signal = self._inbox_back.get()
        if signal is None or number != step:
            what = "the end" if signal is None else f"a gradient of batch {number}"
            raise PipelineError(
                f"{what[0].upper()}{what[1:]} came where a gradient of batch {step} was due.",
                see="pipeline-batch",
            )
        return signal.s

    def end(self) -> None:
        """Tell the neighbours that nothing follows, and wait until everything has arrived."""
        if self._outbox is not None:
            self._outbox.end()
        if self._outbox_back is not None:
            self._outbox_back.end()
        if self._inbox_back is not None and self._inbox_back.get()[1] is not None:
            raise PipelineError("A gradient came after the last batch.", see="pipeline-batch")

    def close(self) -> None:
        """Let the threads end; their connections have been aborted."""
        for box in (self.inbox, self._outbox, self._inbox_back, self._outbox_back):
            if box is not None:
                box.close()
