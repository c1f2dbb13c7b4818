"""Applies a rule's cap to accumulated gradients, without reading from the device, alike on all processes."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from plywise.engine.finite import measure_norms
from plywise.engine.processes.replicas import find_data_parallel_group, is_joining
from plywise.engine.sharding import find_local, is_spread
from plywise.engine.sites import ParameterEntry

Clip = Callable[[Tensor, Tensor], Tensor]
"""`RuleContract.clip_update`."""


class Clipping:
    """Shrinks accumulated gradients just before the optimizer's step.

    A weight and the biases of its layer are multiplied by one factor. Under DistributedDataParallel every
    process has the averaged gradient of a layer, but a process that has never called the layer does not know
    that the rule takes it. So the processes first agree on what is clipped, by one collective a step.

    Args:
        clip: the factors, from the norms of weights and of their updates.
        entries: gives the parameters of the model, the same on all processes.
        process_group: the processes that average gradients; by default those of DistributedDataParallel.
    """

    def __init__(
        self, clip: Clip, entries: Callable[[], Sequence[ParameterEntry]], process_group: ProcessGroup | None
    ) -> None:
        self._clip = clip
        self._entries = entries
        self._group = self._named = process_group

    def find_group(self) -> None:
        """Note which processes average the gradients of the forward that begins.

        Inside ``ddp.join()`` a process may step alone, and must not wait for the others.
        """
        if not dist.is_available() or not dist.is_initialized():
            return
        group = find_data_parallel_group()
        if group is not None:
            self._group = None if is_joining() else self._named or group

    def apply(self, loss_scale: Tensor | None, overflows: bool = False) -> None:
        """Multiply the gradients by their factors; nothing is read from the device.

        Args:
            loss_scale: what the optimizer will divide the gradients by; None if it has been done.
            overflows: whether squares of gradients are known to leave the range of float32.
        """
        entries = self._entries()
        leaders = self._find_leaders(entries)
        held = [
            place
            for place, entry in enumerate(entries)
            if (leaders[place] >= 0 or self._group is not None) and _find_gradient(entry) is not None
        ]
        chosen = self._agree(leaders, entries)
        if not held:
            return
        dtype = torch.float64 if overflows else None
        factors = self._find_factors([entries[place] for place in held], loss_scale, dtype)
        of_entry = factors.new_ones(len(entries))
        of_entry[torch.tensor(held, device=factors.device)] = factors
        chosen = chosen.to(factors.device)
        of_entry = torch.where(chosen < 0, 1, of_entry[chosen.clamp(min=0)])
        for place, factor in zip(held, of_entry[held].unbind(), strict=True):
            gradient = _find_gradient(entries[place])
            assert gradient is not None
            gradient.mul_(factor.to(gradient.device))

    def _find_leaders(self, entries: Sequence[ParameterEntry]) -> list[int]:
        """Find the place of the weight whose factor each parameter gets, or -1, as this process knows it."""
        places = {id(entry.parameter()): place for place, entry in enumerate(entries)}
        leaders = [-1] * len(entries)
        for place, entry in enumerate(entries):
            sites = [site for site in entry.sites.values() if not site.computed]
            if not sites or entry.why_left or entry.leave_next or _find_gradient(entry) is None:
                continue
            biases = [site.bias() for site in sites if site.bias is not None and site.takes_bias]
            for follower in (place, *(places.get(id(bias), place) for bias in biases)):
                if leaders[follower] < 0:  # the first weight decides
                    leaders[follower] = place
        return leaders

    def _agree(self, leaders: list[int], entries: Sequence[ParameterEntry]) -> Tensor:
        """Return the leaders that any process knows of."""
        count = len(entries)
        if self._group is None:
            return torch.tensor(leaders, device="cpu")
        parameter = entries[0].parameter()
        device = torch.device("cpu") if parameter is None else parameter.device
        codes = [count - leader if leader >= 0 else 0 for leader in leaders]  # the first is the largest
        whole = torch.tensor(codes, device=device)
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=self._group)
        return torch.where(whole > 0, count - whole, -1)

    def _find_factors(
        self, entries: Sequence[ParameterEntry], loss_scale: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        weights = [find_local(entry.parameter().detach()) for entry in entries]  # type: ignore[union-attr]
        updates = [gradient for entry in entries if (gradient := _find_gradient(entry)) is not None]
        norms = measure_norms([*weights, *updates], dtype)
        for group, places in _group_sharded(entries).items():
            both = torch.tensor([*places, *(place + len(entries) for place in places)], device=norms.device)
            squares = norms[both].square()
            dist.all_reduce(squares, group=group)
            norms[both] = squares.sqrt()
        of_weight, of_update = norms.split(len(entries))
        if loss_scale is not None:
            of_update = of_update / loss_scale.to(of_update.device)
        return self._clip(of_weight, of_update)


def _find_gradient(entry: ParameterEntry) -> Tensor | None:
    """Return this process's part of a parameter's gradient; None if no rule can have made it."""
    parameter = entry.parameter()
    gradient = None if parameter is None else parameter.grad
    if gradient is None or gradient.is_sparse or gradient.is_complex():
        return None
    if is_spread(parameter) and entry.sharding is None:
        return None
    return find_local(gradient)


def _group_sharded(entries: Sequence[ParameterEntry]) -> dict[ProcessGroup, list[int]]:
    """Return the places of sharded parameters, by the processes that have a shard."""
    found: dict[ProcessGroup, list[int]] = {}
    for place, entry in enumerate(entries):
        if entry.sharding is not None:
            found.setdefault(entry.sharding.group, []).append(place)
    return found
