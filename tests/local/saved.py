"""How much memory a step keeps for its backward passes."""

from collections.abc import Callable

import torch
from torch import Tensor


class Held:
    """A tensor kept for backward, which counts as long as autograd keeps it."""

    def __init__(self, tensor: Tensor, count: dict[int, list[int]]) -> None:
        self.tensor, self._count = tensor, count
        storage = tensor.untyped_storage()
        self._key = storage.data_ptr()
        self._count.setdefault(self._key, [0, storage.nbytes()])[0] += 1

    def __del__(self) -> None:
        entry = self._count[self._key]
        entry[0] -= 1
        if not entry[0]:
            del self._count[self._key]


def most_saved(step: Callable[[], object]) -> int:
    """The largest number of bytes that are kept for backward at once; parameters do not count."""
    count: dict[int, list[int]] = {}
    most = 0

    def pack(tensor: Tensor) -> object:
        nonlocal most
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        held = Held(tensor, count)
        most = max(most, sum(size for _, size in count.values()))
        return held

    def unpack(held: object) -> Tensor:
        return held.tensor if isinstance(held, Held) else held

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    return most
