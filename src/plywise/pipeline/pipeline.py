"""A one-way learner spread over processes: each trains its components and hands signals on.

Stage i of s holds a run of components; all stages have replicas in as many columns. Data enters at the first
stage and flows one way, so that every stage computes at the same time on different batches, and with the same
weights as in one process: a component has made k updates when batch k arrives, here as there.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from plywise.errors import PipelineError
from plywise.local.component import Signal
from plywise.local.learner import OneWayLearner, Report
from plywise.local.trainer import LocalTrainer
from plywise.pipeline import checkpoint
from plywise.pipeline.links import Inbox, Outbox, within
from plywise.pipeline.watch import Watch

Batch = tuple[Tensor, Tensor]

FOREVER = timedelta(days=30)
"""Timeout of torch's own waits: ours end by the watch, which knows a slow stage from a lost one."""


class Pipeline:
    """Trains a learner's components in the processes that torchrun started.

    Every process makes the same learner (same seed) and the same pipeline, and calls `run` alike; only the
    first stage reads the batches. Use as a context manager.

    Args:
        learner: the whole learner, the same in every process.
        cuts: the first component of each stage, e.g. ``[0, 1, 4]``. Default: equally many for each of
            as many stages as there are processes for one replica (see `measured_cuts` for balanced ones).
        replicas: how many processes share each stage's batches, data-parallel. Default 1.
        patience: seconds without a sign of life until a process counts as lost. Default 10.

    Raises:
        PipelineError: the number of processes does not fit, or a stage cannot be reached.
    """

    def __init__(
        self,
        learner: OneWayLearner,
        *,
        cuts: Sequence[int] | None = None,
        replicas: int = 1,
        patience: float = 10.0,
    ) -> None:
        if not isinstance(learner, OneWayLearner):
            raise PipelineError(
                f"{type(learner).__name__} needs gradients from later components; a pipeline flows one way."
            )
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            _join()
        world = dist.get_world_size()
        self.learner = learner
        self.cuts = _checked_cuts(cuts, len(learner.trainers), world, replicas)
        self.stages, self.replicas = len(self.cuts), replicas
        device = _device_of(learner)
        mesh = init_device_mesh(device.type, (self.stages, replicas), mesh_dim_names=("stage", "replica"))
        rank = dist.get_rank()
        self.stage, self.replica = divmod(rank, replicas)
        names = [self._name(other // replicas, other % replicas) for other in range(world)]
        self.name = names[rank]
        self._group = dist.new_group(timeout=FOREVER)
        self.watch = Watch(_own_store(patience), rank, names, patience)
        ends = [*self.cuts[1:], len(learner.trainers)]
        self.trainers = learner.trainers[self.cuts[self.stage] : ends[self.stage]]
        if replicas > 1:
            for trainer in self.trainers:
                _replicate(trainer, mesh.get_group("replica"))
        self._rank_before = rank - replicas if self.stage > 0 else None
        self._rank_after = rank + replicas if self.stage < self.stages - 1 else None
        self._links: dict[int, dist.ProcessGroup] = {}  # by the other's rank
        for here in range(world - replicas):  # every process takes part in making every group
            ends = [here, here + replicas]
            group = dist.new_group(ends, timeout=FOREVER)
            if rank in ends:
                self._links[ends[1 - ends.index(rank)]] = group
        self._names = names
        self._device = device
        self._outbox: Outbox | None = None

    def _name(self, stage: int, replica: int) -> str:
        return f"stage {stage}" + (f", replica {replica}" if self.replicas > 1 else "")

    # ---- training ----------------------------------------------------------------------------

    def run(self, batches: Iterable[Batch], after: Callable[[int], None] = lambda step: None) -> int:
        """Train on batches until the first stage has no more; the number of steps done in all.

        Args:
            batches: read by the first stage only; each replica its own share.
            after: called with the number of steps done after each, in every process.
        """
        before, following = self._rank_before, self._rank_after
        inbox = None
        if before is not None:
            inbox = Inbox(before, self._names[before], self._links[before], self.watch, self._device)
        if following is not None:
            self._outbox = Outbox(following, self._names[following], self._links[following], self.watch)
        try:
            for signal in self._signals(batches) if inbox is None else _received(inbox, self.learner.steps):
                self._learn(signal, after)
            if self._outbox is not None:
                self._outbox.end()
        except Exception as error:
            self.watch.tell(str(error))
            raise
        return self.learner.steps

    def _signals(self, batches: Iterable[Batch]) -> Iterator[Signal]:
        for x, y in batches:
            yield self.learner.signal(x, y)

    def _learn(self, signal: Signal, after: Callable[[int], None]) -> None:
        losses, step = [], self.learner.steps
        for trainer in self.trainers:
            trainer.begin()
            last = trainer is self.trainers[-1]
            emit = self._emit(step) if last and self._outbox is not None else (lambda _: None)
            signal, loss = trainer.learn(signal, step, emit)
            losses.append(loss)
        self.learner.steps += 1
        report = Report(self.learner.steps, torch.stack(losses))
        for callback in self.learner.callbacks:
            callback(report)
        after(self.learner.steps)

    def _emit(self, step: int) -> Callable[[Signal], None]:
        outbox = self._outbox
        assert outbox is not None
        return lambda signal: outbox.put(signal, step)

    # ---- state -------------------------------------------------------------------------------

    def gather(self) -> OneWayLearner:
        """Give every process every component's parameters and buffers: then any of them may predict."""
        for index, trainer in enumerate(self.learner.trainers):
            owner = max(i for i, cut in enumerate(self.cuts) if cut <= index) * self.replicas
            for tensor in trainer.component.state_dict().values():
                self._together(partial(dist.broadcast, tensor, owner, group=self._group))
        return self.learner

    def save(self, folder: Path, keep: int = 3) -> None:
        """Write a checkpoint; every process calls this after the same step."""
        states: dict[str, Any] = {}
        if self.replica == 0:
            states = {f"component {trainer.index}": trainer.state_dict() for trainer in self.trainers}
        if dist.get_rank() == 0:
            states["learner"] = {"learner": type(self.learner).__name__, "steps": self.learner.steps}
        steps = self.learner.steps
        self._together(lambda: checkpoint.save(folder, steps, states, keep, self._group))

    def restore(self, folder: Path, step: int | None = None) -> int:
        """Go on from a checkpoint, the last by default, whoever wrote it; the number of steps done."""
        names = ["learner", *(f"component {trainer.index}" for trainer in self.trainers)]
        states = checkpoint.load(folder, step, names)
        for trainer in self.trainers:
            trainer.load_state_dict(states[f"component {trainer.index}"])
        self.learner.steps = states["learner"]["steps"]
        return self.learner.steps

    def _together(self, work: Callable[[], Any]) -> Any:
        return within(self.watch, work, f"{self.name}: a collective of all stages broke")

    # ---- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the pipeline."""
        self.watch.close()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()


def _received(inbox: Inbox, step: int) -> Iterator[Signal]:
    for expected in count(step):
        number, signal = inbox.get()
        if signal is None:
            return
        if number != expected:
            raise PipelineError(
                f"Batch {number} came where {expected} was due: do all processes restore the same checkpoint?"
            )
        yield signal


def _join() -> None:
    if "RANK" not in os.environ:
        raise PipelineError(
            "This process was not started by torchrun. Start it so: torchrun --nproc-per-node 2 -m plywise "
            "pipeline ..., or call torch.distributed.init_process_group yourself."
        )
    if os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens to the outside unless told to
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def _own_store(patience: float) -> TCPStore:
    """A store of this pipeline alone, in the process of rank 0: a restart begins with an empty one."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = torch.zeros(1, dtype=torch.int64)
    store = None
    if dist.get_rank() == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port[0] = store.port
    dist.broadcast(port, 0)
    if store is None:
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=patience))
    return store


def _checked_cuts(cuts: Sequence[int] | None, components: int, world: int, replicas: int) -> list[int]:
    if replicas < 1 or world % replicas:
        raise PipelineError(f"{world} processes do not make stages of {replicas} replicas each.")
    stages = world // replicas
    if stages > components:
        raise PipelineError(
            f"{stages} stages are more than the {components} components of the learner: start "
            f"{components * replicas} processes at most, or split the network into more blocks."
        )
    if cuts is None:
        return [components * stage // stages for stage in range(stages)]
    if list(cuts) != sorted(set(cuts)) or not cuts or cuts[0] != 0 or cuts[-1] >= components:
        raise PipelineError(
            f"cuts are the first components of the stages, rising from 0 and below {components}, not {cuts}."
        )
    if len(cuts) != stages:
        raise PipelineError(
            f"{list(cuts)} makes {len(cuts)} stages, and {world} processes were started for {stages}."
        )
    return list(cuts)


def _device_of(learner: OneWayLearner) -> torch.device:
    for trainer in learner.trainers:
        for tensor in trainer.component.state_dict().values():
            return torch.device(tensor.device)
    return torch.device("cpu")


def _replicate(trainer: LocalTrainer, group: dist.ProcessGroup) -> None:
    if any(parameter.requires_grad for parameter in trainer.component.parameters()):
        trainer.module = DistributedDataParallel(trainer.component, process_group=group)
