"""Detects stages of `torch.distributed.pipelining`.

A stage's module runs for each micro-batch, and its backward may come in two parts: first the gradient at the
stage's input, later those of the weights (ZeroBubble). The second part assigns ``.grad`` by hand: no gradient
arrives there through autograd.
"""

import sys
from types import FrameType
from typing import Any

from plywise.errors import PlywiseError

FARTHEST = 64
"""Frames between a stage's call of its module and the module's hooks, at most (wrappers come in between)."""


def runs_in_pipeline() -> bool:
    """Return whether the forward that begins is called by a stage of a pipeline."""
    stages: Any = sys.modules.get("torch.distributed.pipelining.stage")
    if stages is None:
        return False
    code = stages._PipelineStageBase.forward_maybe_with_nosync.__code__
    frame: FrameType | None = sys._getframe()
    for _ in range(FARTHEST):
        if frame is None:
            return False
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def refuse_pipeline(rule: str) -> None:
    """Raise PlywiseError in a stage of a pipeline, for a rule that needs the whole backward graph."""
    if runs_in_pipeline():
        raise PlywiseError(
            f"{rule} multiplies factors of all layers above, and a stage of torch.distributed.pipelining "
            "does not see those of later stages. Train without the pipeline, or use a rule whose layers need "
            "no others (BackMatching(mode='exact') is one)."
        )
