"""Collectives for sharded parameters: they make each gradient whole on one process.

A whole gradient is on one process only, and for the time of a step: each process makes the updates of its
share of the layers, the expensive ones dealt out first. So neither the work nor the memory is multiplied by
the number of processes. All processes call these functions with the same layers in the same order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from plywise.engine.contract import State, StatefulContract
from plywise.engine.processes.replicas import Replicas, deal_out
from plywise.engine.sharding import find_local
from plywise.engine.sites import ParameterEntry
from plywise.engine.statistics.layer_handle import LayerHandle, find_trained
from plywise.errors import AttachError

Memories = dict[str, State]


class Exchange:
    """Makes sharded tensors whole, each on one process.

    Args:
        shards: DTensors, each cut along one dimension over all processes of the group.
        owners: the process that gets each of them.
        group: the processes.
    """

    def __init__(self, shards: Sequence[Tensor], owners: Sequence[int], group: dist.ProcessGroup) -> None:
        self._shards = shards
        self._owners = owners
        self._group = group
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def collect(self) -> list[Tensor | None]:
        """Return the tensors of which this process is the owner, whole; None for the others."""
        wholes: list[Tensor | None] = [None] * len(self._shards)
        for places in self._group_alike():
            sent = [
                find_local(self._shards[i])
                for rank in range(self._size)
                for i in self._find_part(places, rank)
            ]
            mine = self._find_part(places, self._rank)
            pieces = [(rank, i) for rank in range(self._size) for i in mine]
            received = self._swap(sent, self._count_sent(places), self._count_received(mine))
            parts = received.split([self._shape(i, rank).numel() for rank, i in pieces])
            found: dict[int, list[Tensor]] = {i: [] for i in mine}
            for (rank, i), part in zip(pieces, parts, strict=True):
                found[i].append(part.view(self._shape(i, rank)))
            for i in mine:
                wholes[i] = torch.cat(found[i], self._dim(i))
        return wholes

    def give_back(self, wholes: Sequence[Tensor | None]) -> None:
        """Scatter the whole tensors back into the shards of all processes, in place."""
        for places in self._group_alike():
            mine = self._find_part(places, self._rank)
            cut = {
                i: cast(Tensor, wholes[i]).split(
                    [self._shape(i, rank)[self._dim(i)] for rank in range(self._size)], self._dim(i)
                )
                for i in mine
            }
            sent = [cut[i][rank] for rank in range(self._size) for i in mine]
            like = find_local(self._shards[places[0]])
            received = self._swap(sent, self._count_received(mine), self._count_sent(places), like)
            order = [i for rank in range(self._size) for i in self._find_part(places, rank)]
            locals_ = [find_local(self._shards[i]) for i in order]
            for local, part in zip(locals_, received.split([t.numel() for t in locals_]), strict=True):
                local.copy_(part.view(local.shape))

    def _swap(
        self, sent: list[Tensor], send: list[int], receive: list[int], like: Tensor | None = None
    ) -> Tensor:
        like = sent[0] if like is None else like
        flat = torch.cat([part.reshape(-1) for part in sent]) if sent else like.new_empty(0)
        received = like.new_empty(sum(receive))
        dist.all_to_all_single(received, flat, receive, send, group=self._group)
        return received

    def _group_alike(self) -> list[list[int]]:
        """Return the places of tensors of one device and dtype: they travel together."""
        found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, shard in enumerate(self._shards):
            found.setdefault((shard.device, shard.dtype), []).append(i)
        return list(found.values())

    def _find_part(self, places: Sequence[int], rank: int) -> list[int]:
        return [i for i in places if self._owners[i] == rank]

    def _count_sent(self, places: Sequence[int]) -> list[int]:
        """Return the numbers that this process has for each owner."""
        return [
            sum(find_local(self._shards[i]).numel() for i in self._find_part(places, rank))
            for rank in range(self._size)
        ]

    def _count_received(self, mine: Sequence[int]) -> list[int]:
        """Return the numbers that each process has of the tensors that this one owns."""
        return [sum(self._shape(i, rank).numel() for i in mine) for rank in range(self._size)]

    def _dim(self, i: int) -> int:
        return cast(int, cast(Any, self._shards[i]).placements[0].dim)

    def _shape(self, i: int, rank: int) -> torch.Size:
        """Return the shape of a process's part, cut as `torch.chunk` cuts."""
        shape, dim = list(self._shards[i].shape), self._dim(i)
        chunk = -(-shape[dim] // self._size)
        shape[dim] = max(0, min(chunk, shape[dim] - rank * chunk))
        return torch.Size(shape)


# ---- what the step does to whole tensors ----------------------------------------------------------


@contextmanager
def share_out_gradients(
    layers: list[LayerHandle],
    memories: Memories,
    replicas: Replicas,
    rule: StatefulContract,
) -> Iterator[list[LayerHandle]]:
    """Give the whole gradients of sharded layers to one process each.

    Args:
        layers: the layers whose gradients wait for their update.
        memories: each layer's state; what the block puts into it reaches all processes.
        replicas: the processes.
        rule: says what a layer's state may hold.

    Yields:
        The layers for which this process has to make the update: those that are not sharded, and its share.
    """
    plain = [layer for layer in layers if layer.entry.sharding is None]
    sharded = [layer for layer in layers if layer.has_sharded_gradient and memories[layer.name]]
    if not sharded:
        yield plain
        return
    before = dict(memories)
    with gather_whole(sharded, get_layer_gradient, replicas) as mine:
        yield plain + mine
    _share_news(sharded, _find_owners(sharded, replicas), before, memories, replicas, rule)


@contextmanager
def gather_whole(
    layers: list[LayerHandle], find_shard: Callable[[Tensor], Tensor], replicas: Replicas
) -> Iterator[list[LayerHandle]]:
    """Give what belongs to sharded layers' parameters to one process each, whole; then cut it up again.

    Args:
        layers: sharded layers.
        find_shard: the shard that belongs to a parameter: its gradient, or something else of its shape.
        replicas: the processes.

    Yields:
        This process's share of the layers; their ``stand_ins`` are the whole tensors, which may be changed.
    """
    owner = _find_owners(layers, replicas)
    parameters = find_trained(layers)
    owners = {id(p): owner[layer.name] for layer in layers for p in layer.trained}
    group = cast(Any, layers[0].entry.sharding).group
    shards = [find_shard(parameter) for parameter in parameters.values()]
    exchange = Exchange(shards, [owners[key] for key in parameters], group)
    wholes = exchange.collect()
    mine = [layer for layer in layers if owner[layer.name] == replicas.rank]
    for layer in mine:
        layer.stand_ins = {key: w for key, w in zip(parameters, wholes, strict=True) if w is not None}
    try:
        yield mine
        exchange.give_back(wholes)
    finally:
        for layer in mine:
            layer.stand_ins = {}


def get_layer_gradient(parameter: Tensor) -> Tensor:
    """Return a sharded parameter's gradient; zeros where it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _find_owners(layers: list[LayerHandle], replicas: Replicas) -> dict[str, int]:
    """Return which process makes a layer's update: the same for all layers that share a parameter."""
    bundles: dict[int, str] = {}
    first = {}
    costs: dict[str, float] = {}
    for layer in layers:
        known = [bundles[id(p)] for p in layer.trained if id(p) in bundles]
        first[layer.name] = known[0] if known else layer.name
        for parameter in layer.trained:
            bundles.setdefault(id(parameter), first[layer.name])
        shape = layer.shape
        cost = float(shape.groups) * shape.outputs * shape.columns * (shape.outputs + shape.columns)
        costs[first[layer.name]] = costs.get(first[layer.name], 0.0) + cost
    rank = deal_out(costs, [0.0] * replicas.size)
    return {layer.name: rank[first[layer.name]] for layer in layers}


def _share_news(
    layers: list[LayerHandle],
    owner: dict[str, int],
    before: Memories,
    memories: Memories,
    replicas: Replicas,
    rule: StatefulContract,
) -> None:
    """Send what an update has changed in a layer's state to the processes that did not make it."""
    shapes = {layer.name: layer.shape for layer in layers}
    declared = {n: {**rule.learned_shapes(s), **rule.refreshed_shapes(s)} for n, s in shapes.items()}
    keys = [(name, key) for name in declared for key in sorted(declared[name])]
    changed = [
        owner[name] == replicas.rank and memories[name].get(key) is not before[name].get(key)
        for name, key in keys
    ]
    parts: dict[str, dict[str, Tensor]] = {}
    for (name, key), flag in zip(keys, replicas.agree(changed, layers[0].device), strict=True):
        if not flag:
            continue
        value = memories[name].get(key)
        if owner[name] != replicas.rank or value is None:
            value = torch.zeros(declared[name][key], dtype=shapes[name].dtype, device=shapes[name].device)
        parts.setdefault(name, {})[key] = value
    for name, news in replicas.send_from_owners(parts, owner).items():
        memories[name] = {**memories[name], **news}


def find_held(
    layers: list[LayerHandle],
    marks: Mapping[str, tuple[int, int]],
    entries: Sequence[ParameterEntry],
    replicas: Replicas,
) -> set[str]:
    """Return the layers whose accumulated gradient is still there; of sharded ones any process may say so.

    Args:
        layers: the layers that the optimizer steps.
        marks: for each layer with evidence, which tensor its gradient was.
        entries: the model's parameters, the same on all processes.
        replicas: the processes.
    """
    marked = [layer for layer in layers if layer.name in marks]
    held = {layer.name: layer.entry for layer in marked if layer.holds_gradient(marks[layer.name])}
    sharded = [entry for entry in entries if entry.sharding is not None]
    if not sharded:
        return set(held)
    _refuse_other_processes(sharded[0], replicas)
    parameter = sharded[0].parameter()
    device = torch.device("cpu") if parameter is None else parameter.device
    here = set(held.values())
    flags = replicas.agree([entry in here for entry in sharded], device)
    everywhere = {entry for entry, flag in zip(sharded, flags, strict=True) if flag}
    return {layer.name for layer in marked if layer.entry in everywhere or layer.name in held}


def _refuse_other_processes(entry: ParameterEntry, replicas: Replicas) -> None:
    """Raise AttachError if statistics and shards belong to different processes."""
    assert entry.sharding is not None
    ranks = dist.get_process_group_ranks(entry.sharding.group)
    if replicas.ranks is not None and ranks != replicas.ranks:
        raise AttachError(
            f"fully_shard spreads {entry.name!r} over the processes {ranks}, and attach(process_group=...) "
            f"names {replicas.ranks}. Leave process_group out: the rule finds the processes by itself."
        )
