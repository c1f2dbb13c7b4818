"""Watches gradients arrive in parameters: the rule must have answered for them, or leave them alone."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.capture.calls_below import AlteredPasses
from plywise.engine.capture.capture import Capture
from plywise.engine.capture.table import ParameterTable
from plywise.engine.contract import RuleContract
from plywise.engine.explain import BY_NAME
from plywise.engine.outside_uses import Comparison, OutsideUses
from plywise.engine.passes import find_pass, list_arriving
from plywise.engine.selection import is_handled
from plywise.engine.sites import TRANSFORM, ParameterEntry
from plywise.errors import PlywiseError, UncapturedLayerError


class Arrivals:
    """Watches gradients arrive in the parameters of one attachment.

    Args:
        rule: the rule.
        table: the model's parameters.
        capture: the capture of the model's calls.
        responder: answers for captured calls.
        on_answered: called with each entry whose gradient was made by the rule.
        on_accumulated: called with the name of each layer whose gradient has arrived.
        outside: compares some gradients with what the rule has answered.

    Attributes:
        altered: the backward passes in which the rule sends other values down than gradients.
    """

    def __init__(
        self,
        rule: RuleContract,
        table: ParameterTable,
        capture: Capture,
        responder: Any,
        on_answered: Callable[[ParameterEntry], None],
        on_accumulated: Callable[[str], None] | None,
        outside: OutsideUses,
    ) -> None:
        self.altered = AlteredPasses(responder, self._refuse_altered_leaf)
        self._rule = rule
        self._table = table
        self._capture = capture
        self._on_answered = on_answered
        self._on_accumulated = on_accumulated
        self._outside = outside
        self._handles: list[RemovableHandle | Comparison] = []
        self._watched: dict[int, weakref.ref[Tensor]] = {}

    def remove(self) -> None:
        """Remove the parameters' hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch_expected(self, entries: list[ParameterEntry]) -> None:
        """Watch the parameters whose gradients must come from the rule, or must not be altered by it."""
        for entry in entries:
            if (entry.expected and not entry.why_left) or self._rule.alters_backward:
                self.watch(entry)

    def watch(self, entry: ParameterEntry) -> None:
        """Watch gradients arrive in a parameter; one that is frozen or lazy is watched once it is not.

        Under fully_shard they arrive in the whole parameter, and then, averaged, in this process's shard.
        """
        for parameter in (entry.parameter(), None if entry.sharding is None else entry.sharding.whole):
            if parameter is None or nn.parameter.is_lazy(parameter) or not parameter.requires_grad:
                continue
            if parameter.is_leaf and not self.is_watched(parameter):
                comparison = self._outside.watch(entry, parameter)
                hook: Any = _Arrival(self, entry, comparison)
                self._handles += [parameter.register_post_accumulate_grad_hook(hook), comparison]
                self._watched[id(parameter)] = weakref.ref(parameter)

    def sees(self, entry: ParameterEntry) -> bool:
        """Return whether a gradient is seen when backward puts it into this entry's ``.grad``."""
        return self.is_watched(entry.parameter() if entry.sharding is None else entry.sharding.whole)

    def is_watched(self, parameter: Tensor | None) -> bool:
        """Return whether gradients are seen when they arrive in this parameter."""
        watched = self._watched.get(id(parameter))
        return watched is not None and watched() is parameter

    def arrive_averaged(self, entry: ParameterEntry, shard: Tensor) -> None:
        """Check a gradient that all processes have averaged, and that has arrived in a shard's ``.grad``."""
        assert entry.sharding is not None
        entry.sharding.set_mark(shard)
        if not self.is_watched(entry.sharding.whole):  # no call of it has been seen
            self.arrive(entry)

    def arrive(self, entry: ParameterEntry) -> None:
        """Check a gradient that arrived in a parameter's ``.grad``: the rule must have answered for it."""
        task = find_pass()
        answered = self._take_answers(entry)
        if answered and not (entry.leave_next and task in self.altered):
            self._on_answered(entry)
        elif entry.rests:
            entry.arrived = entry.arrived or not self._capture.paused
            self._on_answered(entry)
        elif entry.computed_into is None or entry.leave_next:  # else autograd carries on a handled weight's
            if task in self.altered:
                self._refuse_altered(entry)
            if self._must_answer(entry):
                raise UncapturedLayerError(_explain_uncaptured(entry))

    def _take_answers(self, entry: ParameterEntry) -> bool:
        """Return whether the rule has answered for this gradient; count the evidence of the answers."""
        arriving = [(site, list_arriving(site.answered)) for site in entry.sites.values()]
        answered = [(site, passes) for site, passes in arriving if passes]
        for site, passes in answered:
            if self._rule.needs_backward_scale and find_pass() not in passes:
                raise PlywiseError(_explain_hidden(self._rule, entry))
            for task in passes:
                del site.answered[task]
            if self._on_accumulated is not None and not entry.leave_next:
                self._on_accumulated(site.name)
        return bool(answered)

    def _must_answer(self, entry: ParameterEntry) -> bool:
        """Return whether the rule takes this parameter, and no use without a captured call is known."""
        if entry.why_left or entry.leave_next or self._capture.paused or TRANSFORM in entry.used_by:
            return False
        return bool(entry.sites or (entry.expected and not entry.used_by))

    def _refuse_altered(self, entry: ParameterEntry) -> None:
        """Raise an error if a parameter is left to the optimizer: its gradient comes from altered values."""
        if (entry.leave_next or not is_handled(entry, self._capture)) and not self._is_bias(entry):
            raise PlywiseError(_explain_altered(self._rule, entry), see="altered-gradient")

    def _refuse_altered_leaf(self, leaf: Tensor) -> None:
        for entry in self._table.entries:
            answers = entry.sites and not entry.why_left and not entry.leave_next
            whole = None if entry.sharding is None else entry.sharding.whole
            if not answers and (entry.parameter() is leaf or whole is leaf):
                self._refuse_altered(entry)

    def _is_bias(self, entry: ParameterEntry) -> bool:
        """Return whether calls that the rule handles add this parameter, and it takes it."""
        parameter = entry.parameter()
        return any(
            site.adds is not None and site.adds() is parameter and site.takes_bias
            for other in self._table.entries
            for site in other.sites.values()
        )


class _Arrival:
    """Hook of a parameter: a gradient has arrived.

    Attributes:
        only_looks: the parameter stays as it is.
    """

    only_looks = True

    def __init__(self, arrivals: Arrivals, entry: ParameterEntry, comparison: Comparison) -> None:
        self._arrivals = arrivals
        self._entry = entry
        self._comparison = comparison

    @leave_out(WHY_STEPS)
    def __call__(self, parameter: Tensor) -> None:
        self._comparison.count()
        if self._entry.sharding is not None and parameter is self._entry.parameter():
            self._arrivals.arrive_averaged(self._entry, parameter)
        else:
            self._arrivals.arrive(self._entry)


def _explain_uncaptured(entry: ParameterEntry) -> str:
    return (
        f"The weight {entry.name!r} got a gradient that did not pass through the rule. "
        "Likely causes: torch.compile ran the model before attach() (attach first, or call "
        "torch.compiler.reset()), the forward ran before attach(), or in rule.paused() and the backward "
        "after it, the layer's .forward() was called directly, or its weight is used outside of the model's "
        "forward (such as in a function that a checkpoint with use_reentrant=True runs again). If that is "
        "meant, leave the layer to the optimizer: "
        f"attach(..., exclude={entry.layer!r})."
    )


def _explain_hidden(rule: RuleContract, entry: ParameterEntry) -> str:
    return (
        f"{rule} sends random vectors through the whole graph, but a function that makes its gradients in "
        f"its own backward (by torch.autograd.grad) hides the part with {entry.name!r}. Leave that layer to "
        f"the optimizer (attach(..., exclude={entry.layer!r})), or use mode='exact'."
    )


def _explain_altered(rule: RuleContract, entry: ParameterEntry) -> str:
    """Say which parameter is refused, why the rule leaves it alone, and what helps."""
    why = entry.why_left or entry.leave_next
    helps = ["freeze that parameter (requires_grad_(False))", "use a rule that leaves gradients as they are"]
    if why in BY_NAME:
        helps.append("let the rule take it (attach() with other layers= or exclude=)")
    elif "kinds=" in why:
        helps.append("let the rule take it (attach(..., kinds='all'))")
    reason = why or "no call uses it as the weight of a linear map, so no option of attach() helps"
    return (
        f"{rule} sends other values down than gradients, so {entry.name!r}, which it leaves to the "
        f"optimizer, would get a wrong gradient. The reason: {reason}. You can {', or '.join(helps)}."
    )
