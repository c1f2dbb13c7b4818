"""Warns once of silent faults: a rule without effect, weights that others change, buffers with NaN."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from plywise._util.optimizers import list_parameters
from plywise.engine.health import BUFFERS, UNUSED, Health
from plywise.engine.processes.followed_parameters import find_in_place
from plywise.engine.selection import strip_wrappers
from plywise.engine.sharding import find_local
from plywise.engine.sites import ParameterEntry

QUIET_STEPS = 3
"""Warn after this many steps without the rule, or of another optimizer."""

NOT_CAPTURED = (
    "no call of its layers was captured in a backward pass that put gradients into .grad. Was the model "
    "compiled or traced before attach(), is a copy of it trained, or are gradients assigned by hand? A rule "
    "with running statistics needs backward(); torch.autograd.grad leaves no trace in it."
)
USED_OTHERWISE = (
    "all functions that use its parameters are of other kinds than it handles. rule.explain() names them; "
    "plywise.register_map teaches it a module."
)
"""Why a rule may have taken no part in steps."""

UNSTEPPED = "the optimizer given to attach() does not step it"


class Liveness:
    """Watches whether one attachment's rule has an effect on the optimizer's steps.

    Args:
        title: the rule and the model, for messages.
        health: where events are counted.

    Attributes:
        answers: how often the rule has answered since the last step.
    """

    def __init__(self, title: str, health: Health) -> None:
        self.answers = 0
        self._title = title
        self._health = health
        self._quiet_steps = 0
        self._stepped: set[int] = set()
        self._entry: ParameterEntry | None = None  # the one weight whose version is followed
        self._version = self._steps = self._changes = 0

    def notice_other_optimizer(self, entry: ParameterEntry, steps: int) -> None:
        """Warn once if weights change while the optimizer that the rule was attached to does not step."""
        if entry is not self._entry and self._entry is not None:  # one weight is enough to see it
            return
        parameter = entry.parameter()
        if parameter is None or self._count_changes(entry, parameter._version, steps) != QUIET_STEPS:
            return
        self._health.note("optimizer", UNUSED)
        warnings.warn(
            f"{self._title}: the weights have changed {QUIET_STEPS} times, but the optimizer given to "
            "attach() has not stepped. Does the trainer make an optimizer of its own? Attach the rule to "
            "that one: what the rule does at a step (skipping non-finite gradients, running statistics, "
            "caps) does not happen.",
            RuntimeWarning,
            stacklevel=3,
        )

    def _count_changes(self, entry: ParameterEntry, version: int, steps: int) -> int:
        """Return how often the weight that is followed has changed since the known optimizer's last step."""
        if self._entry is None or steps != self._steps:
            self._changes = 0
        elif version != self._version:
            self._changes += 1
        self._entry, self._version, self._steps = entry, version, steps
        return self._changes

    def mark_unstepped(
        self,
        optimizer: Optimizer,
        entries: Iterable[ParameterEntry],
        in_place: bool = False,
        or_before: bool = False,
    ) -> None:
        """Leave alone what the optimizer does not step.

        Args:
            optimizer: the optimizer.
            entries: the parameters.
            in_place: whether what has replaced a parameter counts, which may be so only while a module runs.
            or_before: whether what it has replaced counts, too.
        """
        stepped = set(map(id, list_parameters(optimizer)))
        self._stepped = stepped
        for entry in entries:
            known = in_place and id(find_in_place(entry)) in stepped
            known = known or ((or_before or not in_place) and id(entry.parameter()) in stepped)
            if known and entry.excluded == UNSTEPPED:
                entry.excluded = ""
                entry.used_by.clear()  # by calls that were not taken while it was left alone
            elif not known and not entry.excluded:
                entry.excluded = UNSTEPPED

    def has_other_parameters(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer has got or lost parameters since."""
        return set(map(id, list_parameters(optimizer))) != self._stepped

    def check_part_taken(self, optimizer: Optimizer, entries: list[ParameterEntry], paused: bool) -> None:
        """Warn once if the optimizer steps on gradients that the rule had no part in."""
        answers, self.answers = self.answers, 0
        if answers or paused:
            self._quiet_steps = 0
            return
        stepped = set(map(id, list_parameters(optimizer)))
        weights = [e for e in entries if e.is_candidate] or [e for e in entries if e.is_vector_of_weights]
        wanted = [entry for entry in weights if id(entry.parameter()) in stepped]
        gradients = [p.grad for e in wanted if (p := e.parameter()) is not None and p.grad is not None]
        if not any(bool(find_local(gradient).any()) for gradient in gradients if not gradient.is_meta):
            return  # a template step, or one of other layers
        self._quiet_steps += 1
        self._health.note("optimizer", UNUSED)
        if self._quiet_steps == QUIET_STEPS:
            are_used_otherwise = all(entry.used_by and not entry.sites for entry in wanted)
            warnings.warn(
                f"{self._title} took no part in the last {QUIET_STEPS} optimizer steps: "
                f"{USED_OTHERWISE if are_used_otherwise else NOT_CAPTURED} Later steps are only counted "
                "(rule.health).",
                RuntimeWarning,
                stacklevel=6,
            )

    def name_spoilt_buffers(self, model: nn.Module | None) -> None:
        """Warn of buffers that the forward of a skipped step has filled with NaN or infinity."""
        buffers = {} if model is None else dict(model.named_buffers())
        bad = [n for n, b in buffers.items() if b.is_floating_point() and not bool(torch.isfinite(b).all())]
        known = self._health.total(BUFFERS)
        for name in bad:
            self._health.note(strip_wrappers(name), BUFFERS)
        if bad and not known:
            warnings.warn(
                f"The forward of the skipped step has left NaN or infinity in {', '.join(bad[:4])}: no "
                "later step repairs these buffers. Restore them from a checkpoint, or reset them "
                "(module.reset_running_stats() for batch norm).",
                RuntimeWarning,
                stacklevel=7,
            )
