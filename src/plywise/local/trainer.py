"""Trains one component: its optimizer, its scheduler, its rule, its random numbers."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from plywise._util.modes import frozen_parts
from plywise.data.batches import list_tensors
from plywise.engine.explain import Explanation
from plywise.engine.guard import StepGuard
from plywise.engine.health import Health
from plywise.engine.rows import make_module_row
from plywise.engine.rule import Rule
from plywise.engine.selection import collect_parameters
from plywise.errors import StateError
from plywise.local.component import Component, Signal, check_answer

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
MakeRule = Callable[[], Rule]


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
        self._seed = seed
        self._frozen = frozen_parts(component)
        groups = [group for group in component.parameter_groups() if group["params"]]
        self.optimizer = optimizer(groups) if groups else None  # a component may learn in closed form
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
        return self._steps if self.rule is None else Health(self._steps.counts + self.rule.health.counts)

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
                after, loss = check_answer(self.component, self.index, self._run(part))
                made.append(after.detached())
                if len(made) == len(parts):
                    following = self.component.join(signal, made)
                    made.clear()  # backward need not hold the parts beside the whole
                    emit(following)
                loss = share * loss
                if self.optimizer is not None and loss.requires_grad:
                    loss.backward()
                losses.append(loss.detach())
        self.apply()
        return following, torch.stack(losses).sum()

    def _run(self, signal: Signal) -> Any:
        """Run the component on a signal; an error says which component it is, and what it was given."""
        try:
            return self.module(signal)
        except Exception as error:
            sizes = " and ".join(str(tuple(s.shape)) for s in list_tensors(signal.s))
            name = type(self.component).__name__
            error.add_note(
                f"Raised by component {self.index} ({name}), which was given activations of {sizes}."
            )
            raise

    def begin(self) -> None:
        """Set training mode and clear gradients that a failed step or other code may have left.

        Parts that were in eval mode when the trainer was made are frozen, and stay so.
        """
        self.component.train()
        for part in self._frozen:
            part.training = False
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    @contextmanager
    def randomness(self, step: int) -> Iterator[None]:
        """Use this component's own random numbers in a step; the caller's random state is not changed."""
        tensors = (*self.component.parameters(), *self.component.buffers())
        devices = sorted({t.device.index for t in tensors if t.is_cuda})
        text = f"{self._seed}/{self.index}/{step}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield

    def apply(self) -> None:
        """Step the optimizer and the scheduler with the present gradients, and clear them."""
        if self.optimizer is None:
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

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
                f"This is no state of component {self.index}, or a part of it is missing.", see="state-memory"
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
