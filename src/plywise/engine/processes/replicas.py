"""Processes that train replicas of one model: they add their evidence and share out the expensive work.

Every wait is a collective of torch.distributed and ends with its group's timeout.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from plywise.errors import PlywiseError

if TYPE_CHECKING:
    from plywise.engine.sites import ParameterEntry

Tensors = Mapping[str, Tensor]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Job:
    """Work that one process does for all.

    Attributes:
        cost: what it costs, in any unit.
        blank: tensors of the result's shapes.
        run: makes the result.
    """

    cost: float
    blank: Callable[[], Tensors]
    run: Callable[[], Tensors]


class Replicas:
    """The processes that train replicas of this model; only this process if there is no group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def ranks(self) -> list[int] | None:
        """The processes, by their numbers among all; None where there is no group."""
        return None if self._group is None else dist.get_process_group_ranks(self._group)

    def add_up(self, parts: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
        """Return the sum of ``parts`` over all processes, by one collective for each device and dtype."""
        if self.size == 1:
            return parts
        sums = {layer: dict(tensors) for layer, tensors in parts.items()}
        for places in _group_alike(sums).values():
            flat = torch.cat([sums[layer][name].reshape(-1) for layer, name in places])
            dist.all_reduce(flat, group=self._group)
            _unpack(flat, places, sums)
        return sums

    def find_range(self, values: list[int], device: torch.device) -> tuple[list[int], list[int]]:
        """Return the lowest and the highest of each value over all processes, by one collective."""
        both = torch.tensor([*values, *(-value for value in values)], device=device)
        if self.size > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        found = both.tolist()
        return [-value for value in found[len(values) :]], found[: len(values)]

    def share_out(self, jobs: Mapping[str, Job]) -> Mapping[str, Tensors]:
        """Run each job on one process, send its result to the others, and return all results."""
        if self.size == 1:
            return {name: job.run() for name, job in jobs.items()}
        owner = deal_out({name: job.cost for name, job in jobs.items()}, [0.0] * self.size)
        parts = {name: job.run() if owner[name] == self.rank else job.blank() for name, job in jobs.items()}
        return self.send_from_owners(parts, owner)

    def send_from_owners(
        self, parts: Mapping[str, Tensors], owner: Mapping[str, int]
    ) -> Mapping[str, Tensors]:
        """Send each layer's tensors from its owner to all others, which pass tensors of the same shapes."""
        results = {name: dict(tensors) for name, tensors in parts.items()}
        for rank in range(self.size):
            its = {name: results[name] for name in parts if owner[name] == rank}
            for places in _group_alike(its).values():
                flat = torch.cat([results[layer][name].reshape(-1) for layer, name in places])
                dist.broadcast(flat, group=self._group, group_src=rank)
                _unpack(flat, places, results)
        return results

    def agree(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Return for each flag whether it is set on any process."""
        if self.size == 1 or not flags:
            return list(flags)
        whole = torch.tensor(flags, dtype=torch.uint8, device=device)
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in whole.tolist()]


def deal_out(costs: Mapping[K, float], load: list[float]) -> dict[K, int]:
    """Assign jobs to processes: the most expensive first, each to the process with the least work so far.

    Args:
        costs: what each job costs; jobs of equal cost are assigned in the given order.
        load: the work that each process has already; what is assigned is added to it.
    """
    owner = {}
    for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
        owner[name] = load.index(min(load))
        load[owner[name]] += cost
    return owner


def find_running_wrapper() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward is running, if any."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def find_data_parallel_group() -> dist.ProcessGroup | None:
    """Return the processes of the DistributedDataParallel whose forward is running, if any."""
    wrapper = find_running_wrapper()
    return None if wrapper is None else wrapper.process_group


def find_training_group(entries: "Iterable[ParameterEntry]") -> dist.ProcessGroup | None:
    """Find the processes that average these parameters' gradients: those of fully_shard or a running DDP."""
    for entry in entries:
        if entry.sharding is not None:
            return entry.sharding.group
    return find_data_parallel_group()


def is_joining() -> bool:
    """Return whether the DistributedDataParallel whose forward runs is inside ``with ddp.join()``."""
    wrapper = find_running_wrapper()
    return wrapper is not None and wrapper._join_config.enable


def refuse_join(rule: str) -> None:
    """Raise PlywiseError inside ``with ddp.join()``: collectives would wait for finished processes."""
    if is_joining():
        raise PlywiseError(
            f"{rule} exchanges statistics between the processes at every step, so it cannot train inside "
            "DistributedDataParallel.join(): a process without batches takes no more steps, and the others "
            "would wait for it. Give all processes equally many batches (DistributedSampler does that), or "
            "use a rule without running statistics."
        )


def _group_alike(
    tensors: Mapping[str, Tensors],
) -> dict[tuple[torch.device, torch.dtype], list[tuple[str, str]]]:
    """Return the places (layer, name) of the tensors by device and dtype, in order."""
    places: dict[tuple[torch.device, torch.dtype], list[tuple[str, str]]] = {}
    for layer, named in tensors.items():
        for name, tensor in named.items():
            places.setdefault((tensor.device, tensor.dtype), []).append((layer, name))
    return places


def _unpack(flat: Tensor, places: list[tuple[str, str]], into: dict[str, dict[str, Tensor]]) -> None:
    pieces = flat.split([into[layer][name].numel() for layer, name in places])
    for (layer, name), piece in zip(places, pieces, strict=True):
        into[layer][name] = piece.reshape(into[layer][name].shape)
