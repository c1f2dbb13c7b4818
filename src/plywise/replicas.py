"""Processes that train replicas of one model: they add their evidence and share out the dear work.

Every wait is a collective of torch.distributed and ends with its group's timeout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

Tensors = Mapping[str, Tensor]


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
    """The processes that train replicas of this model; just this one where there is no group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)

    def total(self, parts: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
        """The sum of ``parts`` over all processes, by one collective for each device and dtype."""
        if self.size == 1:
            return parts
        sums = {layer: dict(tensors) for layer, tensors in parts.items()}
        for places in _alike(sums).values():
            flat = torch.cat([sums[layer][name].reshape(-1) for layer, name in places])
            dist.all_reduce(flat, group=self._group)
            _unpack(flat, places, sums)
        return sums

    def share_out(self, jobs: Mapping[str, Job]) -> Mapping[str, Tensors]:
        """Every job's result, each run by one process and sent to the others."""
        if self.size == 1:
            return {name: job.run() for name, job in jobs.items()}
        owner = shares(jobs, self.size)
        own = dist.get_rank(self._group)
        results = {name: dict(job.run() if owner[name] == own else job.blank()) for name, job in jobs.items()}
        for rank in range(self.size):
            its = {name: results[name] for name in jobs if owner[name] == rank}
            for places in _alike(its).values():
                flat = torch.cat([results[layer][name].reshape(-1) for layer, name in places])
                dist.broadcast(flat, group=self._group, group_src=rank)
                _unpack(flat, places, results)
        return results


def shares(jobs: Mapping[str, Job], size: int) -> dict[str, int]:
    """Which process runs which job: the dearest first, each to the process with the least so far."""
    load = [0.0] * size
    owner = {}
    for name, job in sorted(jobs.items(), key=lambda item: -item[1].cost):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += job.cost
    return owner


def data_parallel_group() -> dist.ProcessGroup | None:
    """The process group of the DistributedDataParallel whose forward is running, if any."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return None if wrapper is None else wrapper.process_group


def _alike(tensors: Mapping[str, Tensors]) -> dict[tuple[torch.device, torch.dtype], list[tuple[str, str]]]:
    """The places (layer, name) of the tensors by device and dtype, in order."""
    places: dict[tuple[torch.device, torch.dtype], list[tuple[str, str]]] = {}
    for layer, named in tensors.items():
        for name, tensor in named.items():
            places.setdefault((tensor.device, tensor.dtype), []).append((layer, name))
    return places


def _unpack(flat: Tensor, places: list[tuple[str, str]], into: dict[str, dict[str, Tensor]]) -> None:
    pieces = flat.split([into[layer][name].numel() for layer, name in places])
    for (layer, name), piece in zip(places, pieces, strict=True):
        into[layer][name] = piece.reshape(into[layer][name].shape)
