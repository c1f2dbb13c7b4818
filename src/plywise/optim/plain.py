"""Base classes of the optimizers: they check the settings of each group, and run closures."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from plywise.errors import PlywiseError

Group = dict[str, Any]


class CheckedOptimizer(Optimizer):
    """An optimizer that checks each parameter group, also one that is added or loaded later."""

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range; called with the settings of each group."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, which may have settings of its own.

        Raises:
            ValueError: a setting is out of range.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def collect_gradients(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters of the group that have a gradient, and the gradients to descend along."""
        params = [param for param in group["params"] if param.grad is not None]
        gradients = [param.grad for param in params]
        for gradient in gradients:
            kind = "complex" if gradient.is_complex() else "sparse"
            if gradient.is_complex() or gradient.layout != torch.strided:
                raise PlywiseError(
                    f"{type(self).__name__} takes dense, real gradients; that of a parameter of shape "
                    f"{tuple(gradient.shape)} is {kind}. Give this parameter to another optimizer."
                )
        return params, [-gradient for gradient in gradients] if group.get("maximize") else gradients

    def require_range(self, name: str, value: Any, low: float, high: float) -> None:
        """Raise ValueError unless low ≤ value ≤ high; infinity and NaN are always refused."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        number = number or (isinstance(value, Tensor) and value.numel() == 1)
        if not (number and low <= float(value) <= high and math.isfinite(value)):
            least = f"a finite number of at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{type(self).__name__}: {name} must be {least}, not {value!r}.")

    def require_pair(self, name: str, value: Any) -> None:
        """Raise ValueError unless ``value`` is two numbers of at least 0 and below 1."""
        pair = isinstance(value, tuple | list) and len(value) == 2
        if not (pair and all(isinstance(one, int | float) and 0 <= one < 1 for one in value)):
            raise ValueError(
                f"{type(self).__name__}: {name} must be two numbers of at least 0 and below 1, not {value!r}."
            )


class PlainOptimizer(CheckedOptimizer):
    """An optimizer that moves one group after another; subclasses define `move`."""

    @abstractmethod
    def move(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Move ``params``, which have these gradients, in place; do not change ``gradients``."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; ``closure`` computes loss and gradients again, and its loss is returned.

        Raises:
            PlywiseError: a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # every gradient is checked before the first parameter moves
        ready = [(group, *self.collect_gradients(group)) for group in self.param_groups]
        for group, params, gradients in ready:
            if params:
                self.move(group, params, gradients)
        return loss
