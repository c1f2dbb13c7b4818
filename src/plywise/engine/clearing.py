"""Notices gradients that nobody clears between steps.

A rule that makes its update at the step leaves it in ``.grad``. If ``zero_grad()`` is forgotten, the next
backward pass adds a gradient to that update, and the rule then makes an update of the sum. With a rule that
acts in backward, or that turns steps (`Coordinates`), the sum is one of answers or of gradients, as in plain
training. There it may be meant, so nothing is said.
"""

import warnings
import weakref

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.health import UNCLEARED, Health
from plywise.engine.sites import ParameterEntry

QUIET_STEPS = 3
"""Warn if gradients were not cleared before this many of the first steps."""


class ClearingWatch:
    """Watches one weight in the first steps: is its gradient cleared between two steps?

    It is cleared if some gradient arrives when ``.grad`` is None, zero, another tensor, or changed by others.
    Micro-batches, and gradients of another network's loss, arrive in a ``.grad`` that is not empty, so a
    single one proves nothing. The watch ends at the first step for which the gradient was cleared.

    Args:
        title: the rule and the model, for messages.
        health: where it is counted.
    """

    only_looks = True

    def __init__(self, title: str, health: Health) -> None:
        self._title = title
        self._health = health
        self._handle: RemovableHandle | None = None
        self._parameter: weakref.ref[Tensor] | None = None
        self._kept: tuple[Tensor | None, int] | None = None  # after the last step: the gradient, its version
        self._arrivals = self._steps = 0
        self._cleared = self._ended = False

    def follow(self, entry: ParameterEntry) -> None:
        """Watch this weight, unless another one is watched already."""
        parameter = entry.parameter()
        if self._parameter is None and parameter is not None and entry.sharding is None:
            self._parameter = weakref.ref(parameter)
            self._handle = parameter.register_hook(self)

    def after_step(self) -> None:
        """Judge the time since the last step."""
        parameter = None if self._parameter is None else self._parameter()
        if parameter is None or self._ended:
            return
        if self._kept is not None and self._arrivals:
            if self._cleared:
                self.remove()
                return
            self._note()
        gradient = parameter.grad
        self._kept = gradient, -1 if gradient is None else gradient._version
        self._arrivals, self._cleared = 0, False

    def remove(self) -> None:
        """Take the hook off the weight, for good."""
        self._ended, self._kept = True, None
        if self._handle is not None:
            self._handle.remove()

    def _note(self) -> None:
        self._health.note("optimizer", UNCLEARED)
        self._steps += 1
        if self._steps == QUIET_STEPS:
            self.remove()
            warnings.warn(
                f"{self._title}: gradients were not cleared before the last {QUIET_STEPS} steps. The rule "
                "leaves an update in .grad at each step, and backward() adds the next gradient to it, so "
                "the steps are wrong. Call optimizer.zero_grad() once for each step, before backward().",
                RuntimeWarning,
                stacklevel=6,
            )

    @leave_out(WHY_STEPS)
    def __call__(self, gradient: Tensor) -> None:
        """Look at ``.grad`` before a gradient is added to it."""
        parameter = None if self._parameter is None else self._parameter()
        if self._kept is None or parameter is None or self._cleared:
            return
        kept, version = self._kept
        now = parameter.grad
        # autograd raises the version by one with each gradient that it adds
        is_kept = now is kept and now is not None and now._version == version + self._arrivals
        self._cleared = not is_kept or now is None or not bool(now.any())
        self._arrivals += 1
