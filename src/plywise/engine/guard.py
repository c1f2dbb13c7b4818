"""Between backward and the optimizer's step: non-finite gradients never enter weights."""

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from plywise._util.optimizers import list_parameters
from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.call import LinearCall, Update
from plywise.engine.capture.capture import runs_twice
from plywise.engine.finite import is_finite, judge_gradients
from plywise.engine.health import NON_FINITE, SKIPPED, Health
from plywise.errors import NonFiniteError

STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__
"""Code of the function that runs an optimizer's hooks around its step."""


class StepGuard:
    """Watches one optimizer: skips a step whose gradients are not finite, counts and names it.

    A skipped step hides the gradients from the optimizer (``grad = None``), which then leaves weights,
    momenta and decay alone, and puts them back afterwards. With a closure (LBFGS, Lightning) the
    gradients are judged when the closure has made them.

    Args:
        optimizer: the optimizer.
        names: names of its parameters by id.
        health: where skipped steps are counted.
        on_nonfinite: ``"skip"``, ``"raise"`` or ``"propagate"``.
        before_step: called before each step that is taken.
        skipped: called for each step that is not taken.
        after_step: called after each step that was taken.

    Attributes:
        stepping: whether the optimizer's step is running.
        overflows: whether the gradients of this step are finite and their squares are not.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: dict[int, str],
        health: Health,
        on_nonfinite: str,
        before_step: Callable[[Optimizer], None],
        skipped: Callable[[], None],
        after_step: Callable[[Optimizer], None] = lambda optimizer: None,
    ) -> None:
        self._names = names
        self._health = health
        self._on_nonfinite = on_nonfinite
        self._before_step = before_step
        self._after_step = after_step
        self._skipped = skipped
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self.stepping = False
        self.overflows = False
        self._norms: list[tuple[Tensor, float]] = []  # of gradients, as this step began
        self._nested = 0
        self._skips = False
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        ]
        # the rule may have to complete the step, before the user's hooks look at weights or freeze some
        hooks: Any = optimizer._optimizer_step_post_hooks  # torch declares it as a dict, and makes it ordered
        hooks.move_to_end(self._handles[-1].id, last=False)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def find_nonzero(self) -> set[int]:
        """Find the ids of parameters whose gradients (their parts here) were not zero as this step began."""
        return {id(parameter) for parameter, norm in self._norms if norm != 0}

    @leave_out(WHY_STEPS)
    def _pre_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.stepping and runs_twice(STEP_CODE, optimizer):  # its class calls ``super().step()``
            self._nested += 1
            return None
        self.stepping, self._nested = True, 0
        self._hidden.clear()  # of a skipped step that has failed
        self._skips = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._judge(optimizer)
            return None

        def judge_after_closure() -> Any:
            self._restore()
            loss = closure()
            self._judge(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], judge_after_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": judge_after_closure}

    @leave_out(WHY_STEPS)
    def _post_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._nested:
            self._nested -= 1
            return
        self.stepping = False
        self._restore()
        if not self._skips:
            self._after_step(optimizer)
        self._norms = []  # they hold the parameters

    @leave_out(WHY_STEPS)  # a closure is called from the step itself
    def _judge(self, optimizer: Optimizer) -> None:
        parameters = [p for p in list_parameters(optimizer) if p.grad is not None]
        self._norms = []
        self.overflows = self._skips = False
        if not parameters and _is_skipped(optimizer):  # by the guard of another rule
            self._note_skipped()
            return
        if self._on_nonfinite == "propagate" or self._are_finite(parameters):
            self._before_step(optimizer)
            return
        bad = [p for p in parameters if p.grad is not None and not judge_gradients([p.grad])[0]]
        names = [self._names.get(id(p), f"parameter of shape {tuple(p.shape)}") for p in bad]
        for name in names:
            self._health.note(name, NON_FINITE)
        message = (
            f"The gradient of {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} is not finite, "
            "so this step was not taken. Look for NaN or infinity in the batch, a rate too large, or a loss "
            "scale too high."
        )
        if self._on_nonfinite == "raise":
            raise NonFiniteError(message)
        if self._health.total(SKIPPED) == 0:
            warnings.warn(
                message + " Later ones are only counted (rule.health).", RuntimeWarning, stacklevel=4
            )
        self._note_skipped()
        for p in parameters:
            self._hidden.append((p, p.grad))
            p.grad = None

    def _note_skipped(self) -> None:
        self._health.note("optimizer", SKIPPED)
        self._skips = True
        self._skipped()

    def _are_finite(self, parameters: list[Tensor]) -> bool:
        """Return whether every gradient is finite; also keeps their norms, without a second wait."""
        are_finite, norms = judge_gradients([p.grad for p in parameters if p.grad is not None])
        self._norms = list(zip(parameters, norms, strict=True))
        self.overflows = are_finite and not math.isfinite(sum(norms))
        return are_finite

    def _restore(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()


def _is_skipped(optimizer: Optimizer) -> bool:
    """Return whether a guard has hidden the gradients of the step that begins."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return any(isinstance(owner, StepGuard) and bool(owner._hidden) for owner in owners)


def refuse_nonfinite(call: LinearCall, update: Update) -> None:
    """Raise NonFiniteError, and count it, if an answer of the rule has NaN or infinity in it."""
    for part in (update.weight, update.bias):
        if part is not None and not is_finite(part):
            call.health.note(call.name, NON_FINITE)
            where = "rule's own answer"
            for tensor, name in ((call.delta, "gradient at its output"), (call.a, "input")):
                where = where if is_finite(tensor) else name
            raise NonFiniteError(
                f"Layer {call.name!r}: the {where} is not finite (NaN or infinity), so its update would "
                "poison the weights. Look at the batch, the rate and the loss scale; attach(model, "
                "optimizer) skips such steps, on_nonfinite='propagate' lets them pass (for a GradScaler)."
            )
