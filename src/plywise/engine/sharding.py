"""Parameters that are spread over processes: the engine follows those of fully_shard and leaves others alone.

`torch.distributed.fsdp.fully_shard` replaces each parameter by a DTensor, of which every process has a shard
and which the optimizer steps. While the module runs, forward and backward, a plain tensor stands in its
place: the *whole* parameter. So a rule answers in backward as it always does, and torch averages over the
processes what arrives in the whole parameter's gradient. What a rule does at the optimizer's step needs whole
gradients, too: `plywise.engine.statistics.shard_exchange` makes them.
"""

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

Place = tuple[int, str]
"""Where a parameter is: the identity of its module and its name there."""


class Sharding:
    """How fully_shard keeps one parameter.

    Args:
        source: what torch knows of it (``FSDPParam``).

    Attributes:
        mesh: the processes that have a shard.
        dim: the dimension along which it is cut.
        mark: which tensor the shard's gradient was when the last one arrived, and how often written to.
    """

    def __init__(self, source: Any) -> None:
        self._source = weakref.ref(source)
        self.mesh = source.sharded_param.device_mesh
        self.dim: int = source.sharded_param.placements[0].dim
        self.mark: tuple[int, int] | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that have a shard."""
        return self.mesh.get_group()

    @property
    def whole(self) -> Tensor | None:
        """The tensor in the parameter's place while its module runs; None before the first time."""
        return getattr(self._source(), "_unsharded_param", None)

    @property
    def is_accumulating(self) -> bool:
        """Whether a whole gradient waits to be averaged (``set_requires_gradient_sync(False)``)."""
        whole = self.whole
        waiting = getattr(self._source(), "unsharded_accumulated_grad", None)
        return waiting is not None or (whole is not None and whole.grad is not None)

    def set_mark(self, parameter: Tensor) -> None:
        """Remember the averaged gradient that has arrived in the shard's ``.grad``."""
        self.mark = None if parameter.grad is None else mark_gradient(parameter.grad)

    def holds_gradient(self, parameter: Tensor) -> bool:
        """Return whether what was accumulated is still there, in the part of this process."""
        if self.is_accumulating:
            return True
        gradient = parameter.grad
        if gradient is None:
            return False
        return mark_gradient(gradient) == self.mark or bool(find_local(gradient).any())


# ---- what is spread ---------------------------------------------------------------------------------


def is_spread(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a DTensor: a process has only its part of it."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def find_local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it, unless it is a DTensor."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def mark_gradient(gradient: Tensor) -> tuple[int, int]:
    """Return which tensor a gradient is, and how often it has been written to.

    Shards of several gradients are views of one tensor, so the version of one also counts writes to the
    others. For a DTensor, the version counts what the user (``zero_grad``) has done to it as a whole.
    """
    return find_local(gradient).data_ptr(), gradient._version


def find_groups(model: nn.Module) -> list[Any]:
    """Find the groups of parameters (``FSDPParamGroup``) that fully_shard keeps for a model's modules."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # an older torch has one
                groups = [state._fsdp_param_group]
            found.update({id(group): group for group in groups if group is not None})
    return list(found.values())


def find_shards(model: nn.Module) -> dict[Place, Any]:
    """Return what torch knows of each parameter under fully_shard (``FSDPParam``), by its places."""
    places = {}
    for group in find_groups(model):
        for source in group.fsdp_params:
            info = source._module_info
            places[id(info.module), info.param_name] = source
            for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                places[id(module), name] = source
    return places


@contextmanager
def keep_whole(model: nn.Module) -> Iterator[None]:
    """Leave parameters whole for a while, where backward would reshard them."""
    groups = find_groups(model)
    before = [group.reshard_after_backward for group in groups]
    for group in groups:
        group.reshard_after_backward = False
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group.reshard_after_backward = value


def agree_on_all(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Return whether the flag is set on every process that has a part of these tensors."""
    return _reduce_flag(flag, tensors, dist.ReduceOp.MIN)


def is_any_nonzero(tensors: Sequence[Tensor]) -> bool:
    """Return whether any number is not zero, in the parts of all processes.

    Sums come first: a sum that is not zero is an answer, and takes a tenth of the time of ``any``. Tensors on
    the meta device have no numbers.
    """
    parts = [part for part in map(find_local, tensors) if not part.is_meta]
    flag = any(bool(part.sum() != 0) or bool(part.any()) for part in parts)
    return _reduce_flag(flag, tensors, dist.ReduceOp.MAX)


def _reduce_flag(flag: bool, tensors: Sequence[Tensor], how: Any) -> bool:
    for mesh in dict.fromkeys(cast(Any, tensor).device_mesh for tensor in tensors if is_spread(tensor)):
        whole = torch.tensor(float(flag), device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(whole, how, group=mesh.get_group(dim))
        flag = bool(whole)
    return flag
