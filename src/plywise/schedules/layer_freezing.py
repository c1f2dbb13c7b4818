"""Layer freezing: stop training the first layers once their gradients no longer change."""

import warnings
import weakref
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from plywise._util.checks import require_positive, require_whole
from plywise._util.uncompiled import WHY_STEPS, leave_out
from plywise.engine.rule import check_model, check_optimizer
from plywise.engine.statistics.state_dicts import note_detached, was_used
from plywise.errors import AttachError, StateError
from plywise.schedules.front_layers import FrontLayers

KEY = "plywise.LayerFreezing"
"""The key of the state in ``optimizer.state_dict()``."""


@dataclass(frozen=True, eq=False)
class LayerFreezing:
    """Freeze the first layers of a model once their gradients have settled.

    Idea: the first layers settle first. Freeze the layers whose gradients have stopped changing, so that the
        backward pass ends before it reaches them.
    Equation: g_ℓ = Σₜ ‖G_ℓ(t)‖₁ over the steps t of a period, d_ℓ = |g_ℓ(before) − g_ℓ(now)| / g_ℓ(before)
        from one period to the next. The longest run of layers from the front with d_ℓ ≤ τ is frozen.
    Use when: you fine-tune, or training continues for long after the first layers have settled.
    Do not use when: the last tenths of a percent matter. There is no evidence that freezing reaches the same
        accuracy at a lower cost.
    Layers: every module with parameters of its own that the optimizer trains (norms and embeddings too), in
        the order in which the model registers them. Frozen ones get no gradient, and batch norms up to the
        first layer that trains stay in eval mode, until `detach` or until an older state is loaded. It never
        thaws what you froze yourself. A weight at two places is frozen only when both layers are, so with
        tied embeddings nothing is frozen.
    Cost: a pass over the gradients at each step. It saves the backward pass of frozen layers.
    Status: after the paper, in which "normalized gradient differences" decide how many layers to freeze. Its
        formula is not public; this one is ours.
    Source: Xiao et al., "Fast Deep Learning Training through Intelligently Freezing Layers", iThings 2019,
        pages 1225-1232.
    Code: none found.
    Results: the paper reports faster training at similar accuracy, with VGG, ResNet and DenseNet on CIFAR-10.
        Not reproduced here, because the formula is not public.
    Limits: G is the gradient that the optimizer receives, after clipping and after a rule. Steps that a rule
        or a GradScaler skips do not count. A single period with little change is enough, so noise may freeze
        a layer too early. The state is in ``optimizer.state_dict()``: attach first, then load.
        `DistributedDataParallel` needs ``find_unused_parameters=True`` and wraps the model before a state is
        loaded; its replicas decide alike, from the same averaged gradients.

    Args:
        every: steps in a period; in the paper it is an epoch. Default 100. Range 10 to 1000.
        threshold: τ. Default 0.05. Range 0.01 to 0.5.
        max_share: at most this share of the layers is frozen, in (0, 1). Default 0.5. Range 0.1 to 0.9.
        warmup: steps before the first freezing. Two periods must pass in any case. Default 1000. Range 100 to
            10000.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        >>> schedule = pw.LayerFreezing(every=2, warmup=4, threshold=0.5).attach(model, optimizer)
        >>> x, y = torch.ones(32, 8), torch.arange(32) % 2
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> schedule.frozen
        ('0',)
        >>> schedule.detach()
        >>> model[0].weight.requires_grad
        True
    """

    every: int = 100
    threshold: float = 0.05
    max_share: float = 0.5
    warmup: int = 1000

    def __post_init__(self) -> None:
        require_whole(self, every=self.every, warmup=self.warmup)
        require_positive(self, threshold=self.threshold, max_share=self.max_share)
        if self.max_share >= 1:
            raise ValueError(f"LayerFreezing: max_share must be below 1, not {self.max_share!r}.")

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Self:
        """Watch the layers that ``optimizer`` trains, and freeze them as they settle.

        Raises:
            AttachError: this schedule is attached already, or another one to this optimizer; the model has
                too few layers or is sharded; the optimizer is LBFGS or has no parameter of the model.
        """
        if getattr(self, "_watch", None) is not None:
            raise AttachError(
                f"{self} is attached already. Call detach() first, or make a second one.", see="attach-twice"
            )
        check_model(model)
        if isinstance(model, DistributedDataParallel):
            model = model.module
        check_optimizer(model, optimizer)
        if isinstance(optimizer, LBFGS):
            raise AttachError(
                "LBFGS moves frozen weights too, because of its history. Use another optimizer.",
                see="attach-freezing",
            )
        if KEY in optimizer.state_dict():
            raise AttachError(
                "Another LayerFreezing is attached to this optimizer. Detach it first.",
                see="attach-twice",
            )
        layers = FrontLayers(model, optimizer)
        if self._find_most(layers) == 0:
            layers.remove()
            raise AttachError(
                f"{self}: none of {len(layers.names)} layers would be frozen. Raise max_share.",
                see="attach-freezing",
            )
        if was_used(optimizer):
            warnings.warn(
                "The optimizer has been used or loaded, and LayerFreezing begins from nothing: a state that "
                "was loaded before attach() is lost. If a checkpoint has it, attach first and load it then.",
                RuntimeWarning,
                stacklevel=2,
            )
        object.__setattr__(self, "_watch", _Watch(self, layers, optimizer))
        return self

    def detach(self) -> None:
        """Thaw all layers that were frozen here and take the hooks off. It does nothing if not attached."""
        watch: _Watch | None = getattr(self, "_watch", None)
        if watch is not None:
            watch.remove()
            object.__setattr__(self, "_watch", None)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the layers that are frozen now, from the front."""
        watch: _Watch | None = getattr(self, "_watch", None)
        return () if watch is None else tuple(watch.layers.names[: watch.layers.count])

    def count_settled(self, layers: FrontLayers, before: dict[str, float], now: dict[str, float]) -> int:
        """Count the layers to freeze, at least those that are frozen, from g of two periods."""
        count = layers.count
        for name in layers.names[count : self._find_most(layers)]:
            if abs(before[name] - now[name]) > self.threshold * before[name]:
                break
            count += 1
        return layers.count_closed(count)

    def _find_most(self, layers: FrontLayers) -> int:
        return int(self.max_share * len(layers.names))

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled schedule has only its hyper-parameters
        return {f.name: getattr(self, f.name) for f in fields(self)}


class _Watch:
    """Sums gradients while steps are taken, and freezes layers at the end of each period."""

    def __init__(self, schedule: LayerFreezing, layers: FrontLayers, optimizer: Optimizer) -> None:
        self.layers = layers
        self._optimizer = weakref.ref(optimizer)
        self._schedule = schedule
        self._steps = 0  # taken
        self._before: dict[str, float] = {}  # g of the last period; empty during the first period
        self._now = dict.fromkeys(layers.names, 0.0)
        self._to_load: dict[str, Any] = {}
        self._handles = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            # before the hooks of rules, which must find layers as trainable as they were
            optimizer.register_load_state_dict_pre_hook(self._check, prepend=True),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.layers.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            note_detached(optimizer)

    @leave_out(WHY_STEPS)
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums = self.layers.sum_gradients(optimizer)
        if sums is None:
            return
        self._now = {name: self._now[name] + sums[name] for name in sums}
        self._steps += 1
        if self._steps % self._schedule.every == 0:
            if self._before and self._steps >= self._schedule.warmup:
                self.layers.freeze(self._schedule.count_settled(self.layers, self._before, self._now))
            self._before, self._now = self._now, dict.fromkeys(self.layers.names, 0.0)

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        state[KEY] = {
            "steps": self._steps,
            "frozen": self.layers.count,
            "sizes": self.layers.count_weights(),
            "before": self._before,
            "now": self._now,
        }

    def _check(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if KEY not in state:
            raise StateError(
                "The optimizer state to load was saved without LayerFreezing. To start the schedule again, "
                "load it before attach().",
                see="state-memory",
            )
        theirs, mine = state[KEY]["sizes"], self.layers.count_weights()
        for name in {**theirs, **mine}:
            if theirs.get(name) != mine.get(name):
                raise StateError(
                    f"The saved state of LayerFreezing belongs to another model: layer {name!r} has "
                    f"{theirs.get(name, 'no')} weights to train there and {mine.get(name, 'no')} here.",
                    see="state-memory",
                )
        if list(theirs) != list(mine):
            raise StateError(
                "The saved state of LayerFreezing belongs to another model: its layers are the same, in "
                "another order, and freezing goes by their order.",
                see="state-memory",
            )
        self._to_load = state[KEY]
        self.layers.thaw()

    def _load(self, optimizer: Optimizer) -> None:
        state = self._to_load
        self._steps, self._before, self._now = state["steps"], state["before"], state["now"]
        self.layers.freeze(state["frozen"])
