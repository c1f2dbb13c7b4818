"""Between backward and the optimizer's step: non-finite gradients never enter weights."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from plywise.engine import health
from plywise.engine.health import Health
from plywise.engine.sharding import agree_on_all, find_local
from plywise.errors import NonFiniteError

STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__
"""Code of the function that runs an optimizer's hooks around its step."""

SMALL = 2**14
"""Entries of a gradient below which copying it costs less than another call."""


class StepGuard:
    """Watches one optimizer: skips a step whose gradients are not finite, counts and names it.

    A skipped step hides the gradients from the optimizer (``grad = None``), which then leaves weights,
    momenta and decay alone, and puts them back afterwards. With a closure (LBFGS, Lightning) the
    gradients are judged when the closure has made them.

    Args:
        optimizer: the optimizer.
        names: names of its parameters by id.
        health_: where skipped steps are counted.
        on_nonfinite: ``"skip"``, ``"raise"`` or ``"propagate"``.
        before_step: called before each step that is taken.
        skipped: called for each step that is not.
        after_step: called after each step that was taken.

    Attributes:
        stepping: whether the optimizer's step is running.
        nonzero: ids of parameters whose gradients, or this process's parts of them, were seen not to be zero
            as this step began.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: dict[int, str],
        health_: Health,
        on_nonfinite: str,
        before_step: Callable[[Optimizer], None],
        skipped: Callable[[], None],
        after_step: Callable[[Optimizer], None] = lambda optimizer: None,
    ) -> None:
        self._names = names
        self._health = health_
        self._on_nonfinite = on_nonfinite
        self._before_step = before_step
        self._after_step = after_step
        self._skipped = skipped
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self.stepping = False
        self.nonzero: set[int] = set()
        self._nested = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _pre_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.stepping and _is_nested(optimizer):
            self._nested += 1
            return None
        self.stepping, self._nested = True, 0
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._judge(optimizer)
            return None

        def judged() -> Any:
            self._restore()
            loss = closure()
            self._judge(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], judged, *args[2:]), kwargs
        return args, {**kwargs, "closure": judged}

    def _post_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._nested:
            self._nested -= 1
            return
        self.stepping = False
        if self._hidden:
            self._restore()
        else:
            self._after_step(optimizer)

    def _judge(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.nonzero.clear()
        if self._on_nonfinite == "propagate" or self._are_finite(parameters):
            self._before_step(optimizer)
            return
        bad = [p for p in parameters if p.grad is not None and not are_finite([p.grad])]
        names = [self._names.get(id(p), f"parameter of shape {tuple(p.shape)}") for p in bad]
        for name in names:
            self._health.note(name, health.NON_FINITE)
        message = (
            f"The gradient of {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} is not finite, "
            "so this step was not taken. Look for NaN or infinity in the batch, a rate too large, or a loss "
            "scale too high."
        )
        if self._on_nonfinite == "raise":
            raise NonFiniteError(message)
        if self._health.total(health.SKIPPED) == 0:
            warnings.warn(
                message + " Later ones are only counted (rule.health).", RuntimeWarning, stacklevel=4
            )
        self._health.note("optimizer", health.SKIPPED)
        self._skipped()
        for p in parameters:
            self._hidden.append((p, p.grad))
            p.grad = None

    def _are_finite(self, parameters: list[Tensor]) -> bool:
        """Whether every gradient is finite; notes which are not zero, for one wait answers both."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        sums = find_sums(gradients)
        self.nonzero = {id(p) for p, total in zip(parameters, sums, strict=True) if total != 0}
        return confirm_finite(gradients, sums)

    def _restore(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is running already: its class calls ``super().step()``."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        count += frame.f_code is STEP_CODE and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return count > 1


def find_sums(gradients: Sequence[Tensor]) -> list[float]:
    """The sum of each gradient (of this process's part), read from each device at once."""
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, gradient in enumerate(map(_find_numbers, gradients)):
        by_device.setdefault(gradient.device, []).append((place, gradient.sum()))
    sums = [0.0] * len(gradients)
    for found in by_device.values():
        values = torch.stack([total for _, total in found]).tolist()
        for (place, _), value in zip(found, values, strict=True):
            sums[place] = value
    return sums


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether every gradient is finite, in one pass over the memory, on all processes."""
    return confirm_finite(gradients, find_sums(gradients))


def confirm_finite(gradients: Sequence[Tensor], sums: Sequence[float]) -> bool:
    """`are_finite` of gradients with these sums.

    A sum with a NaN or an infinity in it is not finite, and sums run at full memory speed (an infinity
    norm takes fifty times as long). A sum of finite numbers may overflow, so a bad sum is looked into.
    """
    finite = all(
        math.isfinite(total) or bool(torch.isfinite(_find_numbers(gradient)).all())
        for gradient, total in zip(gradients, sums, strict=True)
    )
    return agree_on_all(finite, gradients)  # of DTensors each process sees its own part


def _find_numbers(gradient: Tensor) -> Tensor:
    """The real numbers of which (this process's part of) a gradient is made."""
    dense = gradient.coalesce().values() if gradient.is_sparse else find_local(gradient)
    return torch.view_as_real(dense) if dense.is_complex() else dense
