"""Notices gradients of which only a part has passed through the rule.

A weight may be used outside of the model's forward: in a penalty, or by the parent of a submodule that the
rule was attached to. Its gradient is then the sum of the rule's answers and of a plain part. Where the whole
gradient is plain, `plywise.engine.arrivals` raises an error.
"""

import warnings

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine import health
from plywise.engine.health import Health
from plywise.engine.sites import ParameterEntry

COMPARED = 3
"""Gradients of each weight that are compared."""

ROUNDING = 16
"""Rounding errors, relative to the answers, that are no difference."""

FROM_OUTSIDE = "code outside of the model's forward"
"""In the list of functions that use a parameter."""


class OutsideUses:
    """Compares the first gradients of each weight with the rule's answers; warns once if they differ.

    Args:
        title: the rule and the model, for messages.
        health_: where such gradients are counted.
    """

    def __init__(self, title: str, health_: Health) -> None:
        self._title = title
        self._health = health_

    def watch(self, entry: ParameterEntry, parameter: Tensor) -> list[RemovableHandle]:
        """Compare the first gradients of a weight; return the handles of the hook, if there is one."""
        if entry.sharding is not None or parameter.is_meta:
            return []
        entry.compares = True
        hook = _Comparison(self, entry)
        hook.handle = parameter.register_hook(hook)
        return [hook.handle]

    def note(self, entry: ParameterEntry) -> None:
        """Note that a part of a gradient has not passed through the rule."""
        if not self._health.total(health.OUTSIDE):
            warnings.warn(
                f"{self._title}: a part of the gradient of {entry.name!r} did not pass through the rule, "
                "because the weight is also used outside of the model's forward (in a penalty, or by hand in "
                "a module around the model). The rule knows nothing of that part. If it should see such "
                "calls, attach it to the module around them. Others are only counted (rule.health).",
                RuntimeWarning,
                stacklevel=2,
            )
        self._health.note(entry.name, health.OUTSIDE)
        entry.used_by.setdefault(FROM_OUTSIDE)


class _Comparison:
    """Hook of a weight: the gradient of a backward pass is complete, and is about to be accumulated.

    Attributes:
        handle: removes the hook.
    """

    handle: RemovableHandle

    def __init__(self, outside: OutsideUses, entry: ParameterEntry) -> None:
        self._outside = outside
        self._entry = entry
        self._left = COMPARED

    @leave_out(WHY_STEPS)
    def __call__(self, gradient: Tensor) -> None:
        entry = self._entry
        answer, entry.answer = entry.answer, None
        if answer is None or answer[0] != torch._C._current_graph_task_id() or not entry.compares:
            return
        self._left -= 1
        if _has_more(gradient, answer[1]) and self._is_alone():
            self._outside.note(entry)
            self._left = 0
        if not self._left:
            entry.compares = False
            self.handle.remove()

    def _is_alone(self) -> bool:
        """Return whether nothing else that is known explains a difference: other uses, hooks of the user."""
        entry, parameter = self._entry, self._entry.parameter()
        hooks = getattr(parameter, "_backward_hooks", None) or {}
        parts = any(site.part is not None or site.computed is not None for site in entry.sites.values())
        is_plain = not parts and entry.computed_into is None and not entry.why_left
        return is_plain and not entry.used_by and len(hooks) == 1


def _has_more(gradient: Tensor, answer: Tensor) -> bool:
    """Return whether a gradient is more than the rule's answer to all calls."""
    if gradient is answer or gradient.layout is not torch.strided or answer.layout is not torch.strided:
        return False
    if gradient.shape != answer.shape or not gradient.is_floating_point():
        return False
    difference = torch.linalg.vector_norm(gradient.float() - answer.float())
    allowed = ROUNDING * torch.finfo(gradient.dtype).eps * torch.linalg.vector_norm(answer.float())
    return bool(difference > allowed)
