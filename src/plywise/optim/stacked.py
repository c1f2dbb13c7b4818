"""Base class of optimizers for matrices, in which parameters of one shape move together."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from plywise.engine.sharding import is_spread
from plywise.errors import PlywiseError
from plywise.optim.plain import Group, PlainOptimizer

Shape = tuple[int, ...]


@dataclass
class Stack:
    """Parameters that move together, and their state.

    Attributes:
        params: k parameters with the same dtype, device and number of steps, and the same shape unless
            ``flat``.
        places: the index of each among the parameters of the group that have a gradient.
        flat: whether they have different shapes, and their elements are concatenated.
        step: the number of steps, including the present one.
        state: tensors by name, (k, *shape), or (elements,) if ``flat``. `optimizer.state` has their slices.
        turns: for each side that is refreshed, the step of a cycle in which it is refreshed for each
            parameter.
    """

    params: list[Tensor]
    places: list[int]
    flat: bool
    step: int
    state: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[int, list[int]] = field(default_factory=dict)
    slices: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """Shape of each parameter."""
        return tuple(self.params[0].shape)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join one tensor for each parameter to one tensor; that of a single parameter is not copied."""
        if self.flat:
            return torch.cat([tensor.reshape(-1) for tensor in tensors])
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)

    def split(self, joined: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """Return views of a joined tensor, in the shapes of the parameters."""
        if self.flat:
            pieces = joined.split([prod(shape) for shape in shapes])
            return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return list(joined.reshape(len(shapes), *shapes[0]).unbind())

    def add(self, update: Tensor, factor: float) -> None:
        """Add ``factor * update`` to the parameters; ``update`` is joined."""
        pieces = self.split(update.to(self.params[0].dtype), [tuple(p.shape) for p in self.params])
        torch._foreach_add_(self.params, pieces, alpha=factor)

    def shrink(self, lr: float, weight_decay: float) -> None:
        """Multiply the parameters by ``1 - lr * weight_decay``."""
        if weight_decay:
            torch._foreach_mul_(self.params, 1 - lr * weight_decay)


class StackedOptimizer(PlainOptimizer):
    """An optimizer that moves all parameters of one shape with one call of each function.

    The state of a parameter is a view of its stack. Stacks are made again from the state of each parameter
    when the state was loaded, copied or cleared, or when other parameters have gradients than in the last
    step.
    """

    @abstractmethod
    def get_shapes(self, group: Group, param: Tensor) -> Mapping[str, Shape] | None:
        """Return the shapes of the state of a parameter that moves as a matrix; None if it moves by Adam."""

    @abstractmethod
    def advance(self, group: Group, stack: Stack, gradient: Tensor) -> None:
        """Move the parameters of a stack; ``gradient`` is joined and must not change."""

    def finish(self, group: Group, stacks: list[Stack]) -> None:
        """Do what is left when all stacks of a group have moved."""

    def arrange(self, group: Group, stacks: list[Stack]) -> None:
        """Prepare the stacks of a group; called when they are new."""

    def move(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Take a step with all stacks."""
        stacks = self._find_stacks(group, params)
        for stack in stacks:
            stack.step += 1
            for param in stack.params:
                self.state[param]["step"] = stack.step
            self.advance(group, stack, stack.join([gradients[place] for place in stack.places]))
        self.finish(group, stacks)

    def collect_gradients(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters of the group that have a gradient, and the gradients to descend along.

        Raises:
            PlywiseError: a gradient is sparse or complex, or a parameter is spread over processes.
        """
        for param in group["params"]:
            if is_spread(param):
                raise PlywiseError(
                    f"{type(self).__name__} needs whole matrices; a parameter of shape {tuple(param.shape)} "
                    "is spread over processes (a DTensor, as fully_shard makes). Train it with "
                    "torch.optim.AdamW, or the model with DistributedDataParallel."
                )
        return super().collect_gradients(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a loaded or copied state, for which there are no stacks yet."""
        super().__setstate__(state)
        self._stacks: dict[int, tuple[tuple[int, ...], list[Stack]]] = {}

    def _find_stacks(self, group: Group, params: list[Tensor]) -> list[Stack]:
        known = self.__dict__.setdefault("_stacks", {})
        key = tuple(map(id, params))
        found = known.get(id(group))
        if found is None or found[0] != key or not all(map(self._is_current, found[1])):
            found = known[id(group)] = key, self._make_stacks(group, params)
            self.arrange(group, found[1])
        return found[1]

    def _is_current(self, stack: Stack) -> bool:
        name = next(iter(stack.state))
        return all(
            self.state[param].get(name) is piece
            for param, piece in zip(stack.params, stack.slices, strict=True)
        )

    def _make_stacks(self, group: Group, params: list[Tensor]) -> list[Stack]:
        stacks: dict[Any, Stack] = {}
        wanted: dict[Any, list[Mapping[str, Shape]]] = defaultdict(list)
        for place, param in enumerate(params):
            shapes = self.get_shapes(group, param)
            flat, step = shapes is None, self.state[param].get("step", 0)
            key = (None if flat else param.shape, param.dtype, param.device, step)
            stack = stacks.setdefault(key, Stack([], [], flat, step))
            stack.params.append(param)
            stack.places.append(place)
            own = tuple(param.shape)
            wanted[key].append({"exp_avg": own, "exp_avg_sq": own} if shapes is None else shapes)
        for key, stack in stacks.items():
            self._join_state(stack, wanted[key])
        return list(stacks.values())

    def _join_state(self, stack: Stack, wanted: list[Mapping[str, Shape]]) -> None:
        """Copy the state of the parameters into the stack (zeros if there is none), and keep slices of it."""
        first = stack.params[0]
        for name in wanted[0]:
            shapes = [shapes[name] for shapes in wanted]
            values = [self.state[param].get(name) for param in stack.params]
            tensors = [
                first.new_zeros(shape) if value is None else value.to(first)
                for value, shape in zip(values, shapes, strict=True)
            ]
            # copy even a single tensor: a loaded tensor may be shared
            stack.state[name] = stack.join(tensors).clone(memory_format=torch.contiguous_format)
            slices = stack.split(stack.state[name], shapes)
            for param, piece in zip(stack.params, slices, strict=True):
                self.state[param][name] = piece
            stack.slices = stack.slices or slices


def compute_adam_step(
    state: Mapping[str, Tensor],
    gradient: Tensor,
    betas: tuple[float, float],
    eps: float,
    step: int | None,
) -> Tensor:
    """Compute Adam's step at rate 1; change ``exp_avg`` and ``exp_avg_sq`` in place.

    ``step`` counts from 1 and corrects the means for their start at zero. With None they are not corrected.
    """
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    first, second = (1.0, 1.0) if step is None else (1 - betas[0] ** step, sqrt(1 - betas[1] ** step))
    below = square.sqrt().mul_(first / second).add_(eps * first)
    return torch.div(mean, below, out=below)
