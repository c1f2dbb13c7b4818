"""How much memory the tensors that a step makes take at once."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, as long as somebody holds them.

    Attributes:
        most: the largest number of bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # what it did not make is not counted: parameters, inputs
                self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self._now += size
        self.most = max(self.most, self._now)

    def _free(self, size: int) -> None:
        self._now -= size


def most_alive(step: Callable[[], object]) -> int:
    """The most bytes that tensors made in ``step`` take at once, gradients and temporary ones included."""
    with Alive() as alive:
        step()
    return alive.most
