"""Layers of one shape, stacked: their matrices (gradients, or steps) and their states."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_not

import torch
from torch import Tensor

from plywise.engine.call import Update
from plywise.engine.contract import State

LARGEST_STACKED = 2**17
"""Above this number of entries of a weight or statistic, a copy costs more than a separate call."""


class Scratch:
    """Memory for the matrices of one large layer at a time, which would be slow to allocate in each step."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def get(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of any numbers, until the next call."""
        size = math.prod(shape)
        kept = self._kept.get((dtype, device))
        if kept is None or kept.numel() < size:
            kept = self._kept[dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)


class Stack:
    """Matrices of layers of one shape.

    Args:
        places: where the layers are in the list from which the stack was made.
        like: one of these layers' updates.
        groups: g.
        scratch: gives the memory of a stack that is not kept.
        state: the states of such a stack, which are kept.

    Attributes:
        places: as given.
        state: the layers' states.
        matrices: (layers, g, m, k): the weight's columns, then the bias's; float32 at least.
        views: each layer's part of `matrices`, in the shapes of its weight and bias.
    """

    def __init__(
        self,
        places: list[int],
        like: Update,
        groups: int,
        scratch: Scratch | None = None,
        state: "StackedState | None" = None,
    ) -> None:
        assert like.weight is not None
        self.places = places
        self.state = StackedState() if state is None else state
        rows, width = like.weight.shape[0], like.weight[0].numel()
        dtype = torch.promote_types(like.weight.dtype, torch.float32)
        shape = len(places), groups, rows // groups, width + (like.bias is not None)
        if scratch is None:
            self.matrices = like.weight.new_empty(shape, dtype=dtype)
        else:
            self.matrices = scratch.get(shape, dtype, like.weight.device)
        weights = [part[..., :width].view(like.weight.shape) for part in self.matrices]
        biases: list[Tensor | None] = [None] * len(places)
        if like.bias is not None:
            biases = [part[..., -1].view(-1) for part in self.matrices]
        self.views = [Update(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


class StackedState(Mapping[str, Tensor]):
    """The states of layers of one shape, each tensor stacked when it is first asked for.

    States change at a refresh only, so a stack is kept, and updated where a tensor has been replaced.
    """

    def __init__(self) -> None:
        self._states: Sequence[State] = []
        self._stacked: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._current: dict[str, Tensor] = {}
        self._derived: list[float] | None = None

    def holds(self, states: Sequence[State]) -> bool:
        """Return whether these are the states already."""
        return len(states) == len(self._states) and not any(map(is_not, states, self._states))

    def follow(self, states: Sequence[State]) -> "StackedState":
        """Take these states."""
        if not self.holds(states):
            self._states = states
            self._current = {}
            self._derived = None
        return self

    def derive(self, make: Callable[[State], list[float]]) -> list[float]:
        """Return what a function makes of the states; it is called again when these have changed."""
        if self._derived is None:
            self._derived = make(self)
        return self._derived

    def __getitem__(self, key: str) -> Tensor:
        found = self._current.get(key)
        if found is None:
            found = self._current[key] = self._stack([state[key] for state in self._states], key)
        return found

    def _stack(self, sources: list[Tensor], key: str) -> Tensor:
        if len(sources) == 1:
            return sources[0].unsqueeze(0)
        before, stacked = self._stacked.get(key, ([], None))
        if stacked is None or (stacked.dtype, stacked.device) != (sources[0].dtype, sources[0].device):
            stacked = torch.stack(sources)
        else:
            for i, (old, new) in enumerate(zip(before, sources, strict=True)):
                if old is not new:
                    stacked[i].copy_(new)
        self._stacked[key] = sources, stacked
        return stacked

    def __contains__(self, key: object) -> bool:
        return key in self._states[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[0])

    def __len__(self) -> int:
        return len(self._states[0])


def arrange(
    updates: Sequence[Update], groups: Sequence[int], states: Sequence[State]
) -> tuple[list[list[Stack]], list[int]]:
    """Stack small layers of one shape and device; return the stacks, and the places of large layers."""
    small: dict[object, list[int]] = {}
    large: list[int] = []
    for place, (update, state) in enumerate(zip(updates, states, strict=True)):
        assert update.weight is not None
        sizes = {key: value.shape for key, value in state.items()}
        if max(update.weight.numel(), *(size.numel() for size in sizes.values())) > LARGEST_STACKED:
            large.append(place)
        else:
            key = make_signature(update), groups[place], tuple(sizes.items())
            small.setdefault(key, []).append(place)
    by_device: dict[torch.device, list[Stack]] = {}
    for places in small.values():
        stack = Stack(places, updates[places[0]], groups[places[0]])
        by_device.setdefault(stack.matrices.device, []).append(stack)
    return list(by_device.values()), large


def make_signature(update: Update) -> tuple[object, ...]:
    """Return what must be equal for two updates to be stacked."""
    weight = update.weight
    assert weight is not None
    return weight.shape, weight.dtype, weight.device, update.bias is not None


def list_parts(update: Update) -> list[Tensor]:
    """Return the weight's part of an update, and the bias's if there is one."""
    assert update.weight is not None
    return [update.weight] if update.bias is None else [update.weight, update.bias]


def convert_state(state: State, like: Tensor) -> State:
    """Return a state on the device and in the dtype of a tensor: models move between steps."""
    return {key: value.to(like) for key, value in state.items()}


def separate_state(state: State) -> State:
    """Return statistics, each in one order of memory and in memory of its own.

    Products would differ in their last bits after some ways of loading. A rule may give one tensor two names
    (a count is the number of rows, at first), and savers that load in place would write both values into it.
    """
    separate: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in state.items():
        value = value.contiguous()
        if value.data_ptr() in places:
            value = value.clone()
        places.add(value.data_ptr())
        separate[key] = value
    return separate
