"""Cuts a learner into stages by the measured costs of its components."""

import copy
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from plywise._util.renamed import serve_old_names
from plywise.errors import PipelineError
from plywise.local.learner import StagedLearner
from plywise.local.split import balance
from plywise.pipeline.pipeline import check_cuts

_REPEATS = 5


def measure_cuts(learner: StagedLearner, x: Tensor, y: Tensor, *, replicas: int = 1) -> list[int]:
    """Return the first component of each stage for cuts that make the slowest stage as fast as possible.

    Rank 0 measures and tells the others; all call this alike, before they make the pipeline. The processes
    have met: by `plywise.pipeline.groups.join`, or ``torch.distributed.init_process_group``.

    Args:
        learner: the learner, as it stays.
        x: a batch's inputs.
        y: its targets.
        replicas: how many processes share each stage.

    Raises:
        PipelineError: the processes do not make stages of so many replicas, or more than there are
            components; or one of them is lost.
    """
    world = dist.get_world_size()
    stages = len(check_cuts(None, len(learner.trainers), world, replicas))
    if stages == 1:
        return [0]
    cuts = []
    if dist.get_rank() == 0:
        cuts = [part.start for part in balance(time_components(learner, x, y), stages)]
    return from_first(cuts)


def time_components(learner: StagedLearner, x: Tensor, y: Tensor) -> list[float]:
    """Median seconds of a step of each component on a batch. The learner stays as it is."""
    before = copy.deepcopy([trainer.state_dict() for trainer in learner.trainers])
    seconds: list[list[float]] = [[] for _ in learner.trainers]
    for _ in range(_REPEATS + 1):
        signal = learner.signal(x, y)
        for own, trainer in zip(seconds, learner.trainers, strict=True):
            trainer.begin()
            start = time.perf_counter()
            signal, loss = trainer.learn(signal, learner.steps)
            loss.item()  # an accelerator is done by then
            own.append(time.perf_counter() - start)
    for trainer, state in zip(learner.trainers, before, strict=True):
        trainer.load_state_dict(state)
    return [statistics.median(own[1:]) for own in seconds]  # the first one warms up


def from_first(values: Sequence[int]) -> list[int]:
    """Return rank 0's whole numbers; all processes call this alike.

    Raises:
        PipelineError: a process is lost.
    """
    try:
        size = torch.tensor([len(values)])
        dist.broadcast(size, 0)
        received = torch.zeros(int(size), dtype=torch.int64)
        if dist.get_rank() == 0:
            received = torch.tensor(list(values), dtype=torch.int64)
        if len(received):
            dist.broadcast(received, 0)
    except RuntimeError as error:
        raise PipelineError(
            "Another process has stopped before all were ready; it says why.", see="pipeline-start"
        ) from error
    return received.tolist()


if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(__name__, {"measured_cuts": "measure_cuts"})
