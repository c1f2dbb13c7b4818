"""Trains one component: its optimizer, its scheduler, its rule, its random numbers."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from plywise._util.checks import describe_kind
from plywise._util.modes import frozen_parts
from plywise._util.optimizers import list_parameters
from plywise._util.seeded import make_seed
from plywise.data.batches import list_tensors
from plywise.engine.explain import Explanation
from plywise.engine.guard import StepGuard
from plywise.engine.health import Health
from plywise.engine.reports.rows import make_module_row
from plywise.engine.rule import Rule
from plywise.engine.selection import collect_parameters
from plywise.errors import BlockError, PlywiseError, StateError
from plywise.local.component import Component, Signal, check_answer

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
MakeRule = Callable[[], Rule]

_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)  # what torch raises where a batch does not fit
_KEPT = (PlywiseError, torch.OutOfMemoryError)


class LocalTrainer:
    """Trains one component by its own loss. A learner has one for each, wherever it runs.

    Args:
        component: the component.
        index: its place in the chain.
        optimizer: makes its optimizer from parameter groups.
        scheduler: makes its scheduler, which steps after each step; None for a constant rate.
        rule: makes the rule that acts inside it; None for plain gradients. A component without a layer that
            the rule handles follows its plain gradients, too: `explain` says why.
        seed: of its random numbers (dropout, noise). They depend on the seed, the component and the step
            alone: the same in one process or many, and after a resume.
    """

    def __init__(
        self,
        component: Component,
        index: int,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        rule: MakeRule | None = None,
        seed: int = 0,
    ) -> None:
        self.component = component
        self.module: nn.Module = component
        """What runs the component: itself, or a wrapper that averages gradients over replicas."""
        self.index = index
        self.rule: Rule | None = None
        """The rule at work in it; None for plain gradients."""
        self._why_not: dict[str, str] = {}  # layers, where the rule asked for handles none
        self._steps = Health()
        self._has_applied = False
        self._seed = seed
        self._frozen = frozen_parts(component)
        groups = [group for group in component.parameter_groups() if group["params"]]
        self.optimizer = optimizer(groups) if groups else None  # a component may learn in closed form
        if groups:
            _check_optimizer(self.optimizer, index)
        self.scheduler: LRScheduler | None = None
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] *= group.pop("rate", 1.0)
        if scheduler is not None:
            self.scheduler = scheduler(self.optimizer)
        # before the rule's own hook: that one finds nothing to do in a step that is skipped
        names = {id(p): f"component {index}: {name}" for name, p in component.named_parameters()}
        StepGuard(self.optimizer, names, self._steps, "skip", lambda _: None, lambda: None)
        if rule is not None:
            self._attach(rule())

    def _attach(self, rule: Rule) -> None:
        """Put a rule to work, if there is anything for it to do here."""
        kinds, unshared_only = frozenset(rule.kinds), rule.takes_unshared_only
        entries = collect_parameters(self.component, kinds, unshared_only=unshared_only)
        if any(entry.is_candidate for entry in entries):
            self.rule = rule.attach(self.component, self.optimizer, on_nonfinite="propagate")
        else:
            self._why_not = {entry.layer: entry.why_left for entry in entries if entry.why_left}

    @property
    def health(self) -> Health:
        """Counts of skipped steps and of the rule's fallbacks, so far."""
        # both count a step that one of them skips
        return self._steps if self.rule is None else Health(self._steps.counts | self.rule.health.counts)

    def explain(self, batch_size: int = 128) -> Explanation:
        """One row for each layer: what happens to it, and why (see `plywise.engine.rule.Rule.explain`)."""
        if self.rule is not None:
            table = self.rule.explain(batch_size)
        else:
            otherwise = "it learns in closed form" if self.optimizer is None else "no rule is asked for"
            rows = [
                make_module_row(module, name, self._why_not.get(name, otherwise), {})
                for name, module in self.component.named_modules()
                if any(p is not None for p in module._parameters.values())
            ]
            table = Explanation(f"plain gradients on {type(self.component).__name__}", rows)
        return replace(table, title=f"component {self.index}: {table.title}")

    def learn(
        self, signal: Signal, step: int, emit: Callable[[Signal], None] = lambda _: None
    ) -> tuple[Signal, Tensor]:
        """Take one step on a signal; return the signal for the next component, and the local loss.

        ``emit`` gets the next signal before the local backward (of the last part of the batch, where the
        component splits it), so that the next component need not wait.
        """
        parts, made, losses = self.component.split(signal), [], []
        with self.randomness(step):
            for part, share in parts:
                with self.naming_failures(part.s):
                    answer = self.module(part)
                after, loss = check_answer(self.component, self.index, answer)
                made.append(after.detached())
                if len(made) == len(parts):
                    following = self.component.join(signal, made)
                    made.clear()  # backward need not hold the parts beside the whole
                    emit(following)
                loss = share * loss
                if self.optimizer is not None and self._needs_graph(loss):
                    loss.backward()
                losses.append(loss.detach())
        self.apply()
        return following, torch.stack(losses).sum()

    def _needs_graph(self, loss: Tensor) -> bool:
        """Return whether there is anything to learn from a loss.

        Raises:
            PlywiseError: there should be, and the loss has no graph.
        """
        if not loss.requires_grad and any(p.requires_grad for p in list_parameters(self.optimizer)):
            raise PlywiseError(
                f"The loss of component {self.index} does not depend on its parameters, so that it would "
                "learn nothing. Compute it from the component's output by operations of torch, without "
                "detach() or item()."
            )
        return loss.requires_grad

    def begin(self) -> None:
        """Set training mode and clear gradients that a failed step or other code may have left.

        Parts that were in eval mode when the trainer was made are frozen, and stay so.

        Raises:
            PlywiseError: gradients are switched off, so that nothing would be learned.
        """
        if self.optimizer is not None and not torch.is_grad_enabled():
            raise PlywiseError(
                f"A step inside torch.no_grad() or inference_mode() makes no gradients, so that component "
                f"{self.index} would learn nothing. Take the step outside of it."
            )
        self.component.train()
        for part in self._frozen:
            part.training = False
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    @contextmanager
    def naming_failures(self, s: Any) -> Iterator[None]:
        """Say which component failed, and on what it got, where torch or the user's modules raise an error.

        Other errors keep their class and get a note: ours, a lack of memory, after which programs go on with
        smaller batches, and what a component without a block raises, which runs a user's own step.

        Raises:
            BlockError: the component's block, or what it has beside the block, does not take the batch.
        """
        try:
            yield
        except Exception as error:
            part = getattr(self.component, "block", None)
            is_refusal = part is not None and isinstance(error, _REFUSALS) and not isinstance(error, _KEPT)
            name = f"{self.index} ({type(part if is_refusal else self.component).__name__})"
            sizes = " and ".join(f"{tuple(tensor.shape)}, {tensor.dtype}" for tensor in list_tensors(s))
            if not is_refusal:
                error.add_note(f"Raised by component {name}, which was given a batch of {sizes}.")
                raise
            raise BlockError(
                f"Component {name} fails on a batch of {sizes}: {error}. Heads, bridges and feedback are "
                "made for samples like those of the example that the blocks were made with: give samples of "
                "its shape and dtype, or a head that takes any number of positions, as "
                "plywise.local.heads.mean_linear does.",
                see="block-fails",
            ) from error

    @contextmanager
    def randomness(self, step: int) -> Iterator[None]:
        """Use this component's own random numbers in a step; the caller's random state is not changed."""
        tensors = (*self.component.parameters(), *self.component.buffers())
        devices = sorted({t.device.index for t in tensors if t.is_cuda})
        seed = make_seed(f"{self._seed}/{self.index}/{step}")
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield

    def apply(self) -> None:
        """Step the optimizer and the scheduler with the present gradients, and clear them."""
        if self.optimizer is None:
            return
        if not self._has_applied:
            self._warn_of_rest(self.optimizer)
        self._has_applied = True
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def _warn_of_rest(self, optimizer: Optimizer) -> None:
        """Warn, in the first step, if no gradient has reached a block that should learn."""
        block = getattr(self.component, "block", None)
        stepped = {id(parameter) for parameter in list_parameters(optimizer)}
        parameters = [] if block is None else [p for p in block.parameters() if id(p) in stepped]
        learning = [p for p in parameters if p.requires_grad]
        if learning and all(p.grad is None for p in learning):
            warnings.warn(
                f"No gradient reaches the block of component {self.index} ({type(block).__name__}), so that "
                "it does not learn. A reentrant checkpoint inside it needs use_reentrant=False, because what "
                "a component gets has no gradient; else look for detach() or no_grad() in the block.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that its further training depends on."""
        return {
            "component": self.component.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            StateError: it is the state of another component or optimizer, or it is damaged.
        """
        if not isinstance(state, Mapping) or not state.keys() >= {"component", "optimizer", "scheduler"}:
            raise StateError(
                f"This is no state of component {self.index}, or a part of it is missing.",
                see="state-memory",
            )
        for name in ("optimizer", "scheduler"):
            if (state[name] is None) != (getattr(self, name) is None):
                has, wants = ("no ", "a ") if state[name] is None else ("a ", "no ")
                raise StateError(
                    f"The saved state of component {self.index} has {has}{name}, and this one {wants}{name}: "
                    "make the learner as it was made when saved.",
                    see="state-memory",
                )
        try:
            self.component.load_state_dict(state["component"])
            if self.optimizer is not None:
                self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        except Exception as error:  # of something missing torch's own differs from release to release
            why = error if isinstance(error, RuntimeError | ValueError) else repr(error)
            raise StateError(
                f"The saved state does not fit component {self.index}: {why}", see="state-memory"
            ) from error


def _check_optimizer(optimizer: object, index: int) -> None:
    """Raise TypeError for no optimizer, or for one that evaluates the loss several times in a step."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "The function given as optimizer must return a torch.optim.Optimizer, not "
            f"{describe_kind(optimizer)} (component {index}). Write, as an example, "
            "optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-3)."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, by a closure, and a "
            "learner gives it one gradient for each step. Take an optimizer of one gradient, as "
            "torch.optim.Adam is."
        )
