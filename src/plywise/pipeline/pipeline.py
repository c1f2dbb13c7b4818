"""A learner spread over processes: each trains its components and hands signals on.

Stage i of s holds a run of components; all stages have replicas in as many columns. Data enters at the first
stage and flows one way, so that every stage computes at the same time on different batches, and with the same
weights as in one process: a component has made k updates when batch k arrives, here as there. Interlocking
backpropagation sends gradients back as well, from the first blocks of a stage to the last ones before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from plywise._util.optimizers import list_parameters
from plywise._util.renamed import serve_old_arguments
from plywise.data.batches import count_samples
from plywise.errors import PipelineError, PlywiseError, StateError
from plywise.local import checkpoint
from plywise.local.component import Signal
from plywise.local.learner import Report, StagedLearner, take_batch
from plywise.local.trainer import LocalTrainer
from plywise.pipeline.connections import Connections
from plywise.pipeline.groups import Groups, join, own_store
from plywise.pipeline.links import Inbox, within
from plywise.pipeline.watch import EVERY, Watch

Batch = tuple[Tensor, Tensor]

NO_STAGES = "{} trains its components together, not in stages: it runs in one process."
"""What a pipeline says of a learner that is no `StagedLearner`."""


class Pipeline:
    """Trains a learner's components in the processes that torchrun started.

    Every process makes the same learner (same seed) and the same pipeline, and calls `run` alike; only the
    first stage reads the batches. Use as a context manager: the first process has to stay until the others
    are done, and leaving tells the others not to wait for this one.

    Args:
        learner: the whole learner, the same in every process.
        cuts: the first component of each stage, e.g. ``[0, 1, 4]``. Default: equally many for each of
            as many stages as there are processes for one replica (see `measure_cuts` for balanced ones).
        replicas: how many processes share each stage's batches, data-parallel. Default 1.
        timeout_s: seconds without a sign of life until a process counts as lost. Default 10.

    Raises:
        PipelineError: the number of processes does not fit, or a stage cannot be reached.
    """

    @serve_old_arguments(patience="timeout_s")
    def __init__(
        self,
        learner: StagedLearner,
        *,
        cuts: Sequence[int] | None = None,
        replicas: int = 1,
        timeout_s: float = 10.0,
    ) -> None:
        _check(learner, replicas, timeout_s)
        with ExitStack() as stack:  # undone in reverse order, should something fail
            if not dist.is_initialized():
                join()
                stack.callback(dist.destroy_process_group)
            rank, world = dist.get_rank(), dist.get_world_size()
            self.learner = learner
            self.cuts = check_cuts(cuts, len(learner.trainers), world, replicas)
            self.stages, self.replicas = len(self.cuts), replicas
            self.stage, self.replica = divmod(rank, replicas)
            names = [self._name(*divmod(other, replicas)) for other in range(world)]
            self.name = names[rank]
            ends = [*self.cuts[1:], len(learner.trainers)]
            self.trainers = learner.trainers[self.cuts[self.stage] : ends[self.stage]]
            self._rank_before = rank - replicas if self.stage > 0 else None
            self._rank_after = rank + replicas if self.stage < self.stages - 1 else None
            self._device = _device_of(learner)
            self._connections: Connections | None = None
            self._groups = Groups()
            store = own_store(
                f"{type(learner).__name__} of {len(learner.trainers)} components in stages that begin at "
                f"{self.cuts}, with {replicas} replicas",
                timeout_s,
            )
            stack.callback(self._part)
            self.watch = Watch(store, rank, names, timeout_s, self._groups.abort)
            stack.callback(self.watch.close)
            self._together(self._meet)
            self._leaving = stack.pop_all()

    def _name(self, stage: int, replica: int) -> str:
        return f"stage {stage}" + (f", replica {replica}" if self.replicas > 1 else "")

    def _meet(self) -> None:
        self._groups.make(self.stages, self.replicas, self.learner.sends_back)
        if self._groups.replicas is not None:
            for trainer in self.trainers:
                _replicate(trainer, self._groups.replicas)

    # ---- training ----------------------------------------------------------------------------

    def run(self, batches: Iterable[Batch], after: Callable[[int], None] = lambda step: None) -> int:
        """Train on batches until the first stage has no more; the number of steps done in all.

        Args:
            batches: read by the first stage only; each replica its own share, all equally large.
            after: called with the number of steps done after each, in every process.

        Raises:
            PipelineError: a process is lost, or has failed.
            PlywiseError: a batch is empty, or inputs and targets differ in number.
        """
        before, following = self._rank_before, self._rank_after
        self._connections = links = Connections(self._groups, before, following, self.watch, self._device)
        inbox = links.inbox
        try:
            for signal in (
                self._signals(batches) if inbox is None else _receive_signals(inbox, self.learner.steps)
            ):
                self._learn(signal, links, after)
            links.end()
        except BaseException as error:
            if self.replicas > 1 and isinstance(error, RuntimeError) and not isinstance(error, PlywiseError):
                self.watch.wait_for_failure()  # was it an exchange between replicas that broke?
                self.watch.check(error)
            self.watch.report_failure(f"{type(error).__name__}: {error}")
            raise
        return self.learner.steps

    def ask_to_stop(self) -> None:
        """Ask the first stage to read no more batches; any process may, from a signal handler too."""
        self.watch.ask_to_stop()

    def stopping(self) -> bool:
        """Whether some process has asked to stop; the first stage's replicas call this before each batch."""
        asked = torch.tensor([int(self.watch.stop_asked)])
        if self._groups.replicas is not None:  # one replica may learn of it before the others
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._groups.replicas)
        return bool(asked)

    def _signals(self, batches: Iterable[Batch]) -> Iterator[Signal]:
        for x, y in batches if self.replicas == 1 else self._share(batches):
            yield self.learner.signal(*take_batch(x, y))

    def _share(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of this replica, as long as all replicas have some."""
        own = iter(batches)
        while True:
            batch = next(own, None)
            size = 0 if batch is None else count_samples(batch[0])
            sizes = torch.tensor([size, -size])
            dist.all_reduce(sizes, dist.ReduceOp.MIN, group=self._groups.replicas)
            least, most = int(sizes[0]), -int(sizes[1])
            if least != most:
                raise PipelineError(
                    f"{self.name} has a batch of {size}, and other replicas have {least} to {most}: "
                    "gradients are averaged over replicas, so give each equally many samples in every step.",
                    see="pipeline-batch",
                )
            if batch is None:
                return
            yield batch

    def _learn(self, signal: Signal, links: Connections, after: Callable[[int], None]) -> None:
        self.watch.check()
        for trainer in self.trainers:
            trainer.begin()
        first = self.cuts[self.stage]
        stop = first + len(self.trainers)
        losses = self.learner.learn_stage(first, stop, signal, links.make_neighbours(self.learner.steps))
        self.learner.steps += 1
        report = Report(self.learner.steps, torch.stack(losses))
        for callback in self.learner.callbacks:
            callback(report)
        after(self.learner.steps)

    # ---- state -------------------------------------------------------------------------------

    def gather(self) -> StagedLearner:
        """Give every process every component's parameters and buffers: then any of them may predict."""
        for index, trainer in enumerate(self.learner.trainers):
            owner = max(i for i, cut in enumerate(self.cuts) if cut <= index) * self.replicas
            state = trainer.component.state_dict()
            if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
                raise PipelineError(f"{odd[0]} of component {index} is not a tensor, and cannot be gathered.")
            flat = torch.cat([torch.empty(0, dtype=torch.uint8), *map(_bytes, state.values())])
            self._together(partial(dist.broadcast, flat, owner, group=self._groups.everyone))
            parts = flat.split([tensor.nbytes for tensor in state.values()])
            for tensor, part in zip(state.values(), parts, strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
            trainer.component.load_state_dict(state)  # a module may keep what it has made of its tensors
        return self.learner

    def save(self, folder: Path, keep: int = 3) -> None:
        """Write a checkpoint; every process calls this after the same step, and sees the same folder.

        Raises:
            StateError: a process could not write.
        """
        states: dict[str, Any] = {}
        if self.replica == 0:
            states = {f"component {trainer.index}": trainer.state_dict() for trainer in self.trainers}
        first = dist.get_rank() == 0
        if first:
            states["learner"] = {"learner": type(self.learner).__name__, "steps": self.learner.steps}
        checkpoint.save(folder, self.learner.steps, states, keep, first=first, agree=self.agree)

    def restore(self, folder: Path, step: int | None = None) -> int:
        """Go on from a checkpoint, the last by default, whatever process wrote it; the number of steps done.

        Raises:
            StateError: there is none, or it is another learner's.
        """
        names = ["learner", *(f"component {trainer.index}" for trainer in self.trainers)]
        every = ["learner", *(f"component {trainer.index}" for trainer in self.learner.trainers)]
        states = checkpoint.load(folder, step, names, every)
        if (saved := states["learner"]["learner"]) != type(self.learner).__name__:
            raise StateError(
                f"The checkpoint is one of {saved}; this is {type(self.learner).__name__}.", see="state-run"
            )
        for trainer in self.trainers:
            trainer.load_state_dict(states[f"component {trainer.index}"])
        self.learner.steps = states["learner"]["steps"]
        return self.learner.steps

    def agree(self, ok: bool) -> bool:
        """Return whether all processes say so; each waits here for the others."""
        answer = torch.tensor([int(ok)])
        everyone = self._groups.everyone
        self._together(lambda: dist.all_reduce(answer, dist.ReduceOp.MIN, group=everyone))
        return bool(answer)

    def _together(self, work: Callable[[], Any]) -> Any:
        return within(self.watch, work, "an exchange between all stages broke")

    # ---- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the pipeline; the learner is one of this process alone again."""
        self._leaving.close()

    def _part(self) -> None:
        self._groups.abort()
        if self._connections is not None:
            self._connections.close()
        for trainer in self.trainers:
            trainer.module = trainer.component
        self._groups.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(learner: object, replicas: int, timeout_s: float) -> None:
    if not isinstance(learner, StagedLearner):
        raise PipelineError(NO_STAGES.format(type(learner).__name__), see="pipeline-start")
    if learner.sends_back and replicas > 1:
        raise PipelineError(
            f"{type(learner).__name__} sends gradients from stage to stage, and its stages have no "
            "replicas: use more stages.",
            see="pipeline-start",
        )
    if timeout_s < 4 * EVERY:
        raise PipelineError(
            f"Signs of life come every {EVERY} s: timeout_s must be {4 * EVERY} s or more.",
            see="pipeline-start",
        )


def _receive_signals(inbox: Inbox, step: int) -> Iterator[Signal]:
    for expected in count(step):
        number, signal = inbox.get()
        if signal is None:
            return
        if number != expected:
            raise PipelineError(
                f"Batch {number} came where {expected} was due: do all processes restore the same "
                "checkpoint?",
                see="pipeline-batch",
            )
        yield signal


def check_cuts(cuts: Sequence[int] | None, components: int, world: int, replicas: int) -> list[int]:
    """Return the first component of each stage: as given if that fits, or equally many for each.

    Raises:
        PipelineError: the number of processes, replicas, components or cuts does not fit.
    """
    if replicas < 1 or world % replicas:
        raise PipelineError(
            f"{world} processes do not make stages of {replicas} replicas each.", see="pipeline-start"
        )
    stages = world // replicas
    if stages > components:
        raise PipelineError(
            f"{stages} stages are more than the {components} components of the learner: start "
            f"{components * replicas} processes at most, or split the network into more blocks.",
            see="pipeline-start",
        )
    if cuts is None:
        return [components * stage // stages for stage in range(stages)]
    if list(cuts) != sorted(set(cuts)) or not cuts or cuts[0] != 0 or cuts[-1] >= components:
        raise PipelineError(
            f"cuts are the first components of the stages, rising from 0 and below {components}, not {cuts}.",
            see="pipeline-start",
        )
    if len(cuts) != stages:
        raise PipelineError(
            f"{list(cuts)} makes {len(cuts)} stages, and {world} processes were started for {stages}.",
            see="pipeline-start",
        )
    return list(cuts)


def _device_of(learner: StagedLearner) -> torch.device:
    for trainer in learner.trainers:
        for tensor in trainer.component.state_dict().values():
            return torch.device(tensor.device)
    return torch.device("cpu")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _replicate(trainer: LocalTrainer, group: dist.ProcessGroup) -> None:
    if trainer.optimizer is None:
        raise PipelineError(
            f"Component {trainer.index} learns in closed form: replicas of it would learn nothing of each "
            "other's batches. Use one replica, and more stages.",
            see="pipeline-start",
        )
    learning = set(list_parameters(trainer.optimizer))
    still = any(p.requires_grad and p not in learning for p in trainer.component.parameters())
    trainer.module = DistributedDataParallel(
        trainer.component, process_group=group, find_unused_parameters=still
    )
