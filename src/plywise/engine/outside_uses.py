"""Notices gradients of which only a part has passed through the rule.

A weight may be used outside of the model's forward: in a penalty, or by the parent of a submodule that the
rule was attached to. Its gradient is then the sum of the rule's answers and of a plain part. Where the whole
gradient is plain, `plywise.engine.arrivals` raises an error.
"""

import math
import warnings
import weakref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.health import OUTSIDE, Health
from plywise.engine.passes import find_pass
from plywise.engine.sites import ParameterEntry

COMPARED = 3
"""The first gradients of each weight are compared, then one at growing intervals (`find_next`)."""

ROUNDING = 16
"""Rounding errors, relative to the answers, that are no difference."""

FROM_OUTSIDE = "code outside of the model's forward"
"""In the list of functions that use a parameter."""


class OutsideUses:
    """Compares some gradients of each weight with the rule's answers; warns once if they differ.

    Args:
        title: the rule and the model, for messages.
        health: where such gradients are counted.
    """

    def __init__(self, title: str, health: Health) -> None:
        self._title = title
        self._health = health

    def watch(self, entry: ParameterEntry, parameter: Tensor) -> "Comparison":
        """Compare some gradients of a weight, beginning with the next one."""
        return Comparison(self, entry, parameter)

    def note(self, entry: ParameterEntry) -> None:
        """Note that a part of a gradient has not passed through the rule."""
        if not self._health.total(OUTSIDE):
            warnings.warn(
                f"{self._title}: a part of the gradient of {entry.name!r} did not pass through the rule, "
                "because the weight is also used outside of the model's forward (in a penalty, or by hand in "
                "a module around the model). The rule knows nothing of that part. If it should see such "
                "calls, attach it to the module around them. Others are only counted (rule.health).",
                RuntimeWarning,
                stacklevel=2,
            )
        self._health.note(entry.name, OUTSIDE)
        entry.used_by.setdefault(FROM_OUTSIDE)


def find_next(count: int) -> int:
    """Return which gradient is compared after the first ``count``: 1, 2, 3, 5, 8, 13, 20, 31, 47, 71, ...

    So a use that begins later is noticed too, and a long run compares a few dozen gradients of a weight. The
    numbers are not all multiples of a power of two: a penalty may act in every 16th step only.
    """
    return count + 1 if count < COMPARED else count + count // 2 + 1


class Comparison:
    """Compares some gradients of a weight: a hook of the weight while the next one is to be compared.

    The gradient of a backward pass is then complete, and is about to be accumulated.
    """

    only_looks = True

    def __init__(self, outside: OutsideUses, entry: ParameterEntry, parameter: Tensor) -> None:
        self._outside = outside
        self._entry = entry
        self._parameter = weakref.ref(parameter)
        self._handle: RemovableHandle | None = None
        self._count = 0
        self._next: float = 1
        if entry.sharding is not None or parameter.is_meta:
            self._next = math.inf
        else:
            self._begin(parameter)

    def count(self) -> None:
        """Count a gradient that has arrived, and begin to compare if that is due."""
        self._count += 1
        if self._count + 1 >= self._next and self._handle is None:
            parameter = self._parameter()
            if parameter is not None:
                self._begin(parameter)

    def remove(self) -> None:
        """Take the hook off the weight."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._entry.compares, self._entry.answer = False, None

    def _begin(self, parameter: Tensor) -> None:
        self._entry.compares = not self._entry.incomparable
        self._handle = parameter.register_hook(self)

    @leave_out(WHY_STEPS)
    def __call__(self, gradient: Tensor) -> None:
        """Compare a gradient before it is accumulated."""
        entry = self._entry
        answer, entry.answer = entry.answer, None
        if entry.incomparable:
            self._next = math.inf
        elif answer is None or answer[0] != find_pass():
            if entry.sites:
                return  # it is compared when the rule answers again
            self._next = find_next(self._count + 1)  # a bias has no answers
        elif _has_more(gradient, answer[1]) and self._is_alone():
            self._outside.note(entry)
            self._next = math.inf
        else:
            self._next = find_next(self._count + 1)
        self.remove()

    def _is_alone(self) -> bool:
        """Return whether nothing else that is known explains a difference: other uses, hooks of the user."""
        entry, parameter = self._entry, self._entry.parameter()
        hooks = (getattr(parameter, "_backward_hooks", None) or {}).values()
        parts = any(site.part is not None or site.computed is not None for site in entry.sites.values())
        is_plain = not parts and entry.computed_into is None and not entry.why_left
        return is_plain and not entry.used_by and all(getattr(hook, "only_looks", False) for hook in hooks)


def _has_more(gradient: Tensor, answer: Tensor) -> bool:
    """Return whether a gradient is more than the rule's answer to all calls."""
    if gradient is answer or gradient.layout is not torch.strided or answer.layout is not torch.strided:
        return False
    if gradient.shape != answer.shape or not gradient.is_floating_point():
        return False
    difference = torch.linalg.vector_norm(gradient.float() - answer.float())
    allowed = ROUNDING * torch.finfo(gradient.dtype).eps * torch.linalg.vector_norm(answer.float())
    return bool(difference > allowed)
