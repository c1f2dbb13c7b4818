"""LRSGD: SGD that a local regularizer holds near where each inner loop began."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import require_whole
from plywise.optim.plain import Group, PlainOptimizer


class _LRSGD(PlainOptimizer):
    """SGD with momentum in inner loops; both kinds of them differ in how long a loop is and in its rates."""

    @abstractmethod
    def inner_steps(self, group: Group) -> int:
        """How many steps the inner loop that begins now has."""

    def rate(self, group: Group) -> float:
        """The learning rate of this inner step."""
        return float(group["lr"])

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        self.require_range("lr", group["lr"], 0, math.inf)
        self.require_range("strength", group["strength"], 0, math.inf)
        self.require_range("momentum", group["momentum"], 0, 1)
        self.require_range("weight_decay", group["weight_decay"], 0, math.inf)

    def move(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """One inner step: gradient, pull towards the anchor, decay, momentum."""
        if group["inner_step"] == group["inner_end"]:
            self._begin(group)
        for param in params:
            if "anchor" not in self.state[param]:
                self.state[param]["anchor"] = param.clone(memory_format=torch.preserve_format)
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        anchors = [self.state[param]["anchor"] for param in params]
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        directions = torch._foreach_add(gradients, torch._foreach_sub(params, anchors), alpha=_pull(group))
        torch._foreach_add_(directions, params, alpha=float(group["weight_decay"]))
        torch._foreach_mul_(buffers, float(group["momentum"]))
        torch._foreach_add_(buffers, directions)
        torch._foreach_add_(params, buffers, alpha=-self.rate(group))
        group["inner_step"] += 1

    def _begin(self, group: Group) -> None:
        """The next inner loop: all anchors move, also of parameters that get no gradient this time."""
        group["inner_end"] = self.inner_steps(group)
        group["inner_step"] = 0
        group["loops"] += 1
        for param in group["params"]:
            if "anchor" in self.state.get(param, {}):
                self.state[param]["anchor"].copy_(param)


class LRSGDR(_LRSGD):
    """SGD with a local regularizer, in inner loops of random length.

    Idea: hold the iterates of an inner loop near the loop's first one by a proximal penalty, and begin the
        next loop from where they got to. The penalty moves along, and so it does not move the minimum.
    Equation: d = g + 2λ (w − anchor) + weight_decay · w, buffer = momentum · buffer + d, w ← w − lr · buffer,
        λ = strength / lr; anchor ← w every M steps, M drawn from the geometric distribution with mean 1/stop.
    Use when: you want the paper's method, or a baseline with a proximal pull.
    Do not use when: you look for a faster optimizer. As the learning rate falls the pull grows with 1/lr.
    Layers: any dense, real parameters.
    Cost: SGD with momentum, plus a copy of the weights and two passes over them. One gradient a step.
    Status: faithful to the official code's rule. Here a step is an inner step and takes the next batch of the
        one loader; there each batch of an outer loader starts an inner loop on a loader shuffled again.
        Anchors begin at the weights, there at zero for a weight without gradient in a loop's first step.
    Source: Zhang, Qu, Metaxas and Chen, "Local Regularizer Improves Generalization", AAAI 2020.
    Code: huiqu18/LRSGD.
    Results: the paper's figures are not compute-matched: its code makes M gradient steps for each batch of an
        epoch, and a forward pass whose result is only printed, so that its 350 "epochs" cost about ten times
        SGD's gradients. Not reproduced here for that reason. On the digits at 1,200 gradients each, test
        accuracy 96.4 %, SGD 97.2 %: examples/plot_lrsgd.py.
    Limits: momentum is not reset when a loop ends. Each parameter group has its own loop; groups that begin
        together, with the same ``stop`` and ``seed``, keep time. At ``lr`` 0 nothing pulls.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 0.1. Range 1e-3 to 1.
        strength: λ · lr: without momentum a step takes 2 · strength of the distance to the anchor back; 0 is
            SGD. Default 0.01. Range 1e-3 to 0.1.
        momentum: share of the buffer that stays. Default 0.9. Range 0 to 0.99.
        weight_decay: added as weight_decay · w to the gradient. Default 1e-4. Range 0 to 1e-2.
        stop: probability that a loop ends after a step; 1 is SGD. Default 0.1. Range 0.02 to 1.
        seed: the lengths of the loops are a function of it. Default 0.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import LRSGDR
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = LRSGDR([weight], lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> abs(weight.item()) < 0.1
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        strength: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        stop: float = 0.1,
        seed: int = 0,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "strength": strength, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "stop": stop, "seed": seed, "maximize": maximize, **_no_loop()})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        super().check(group)
        self.require_range("stop", group["stop"], 0, 1)
        if group["stop"] == 0:
            raise ValueError("LRSGDR: stop must be above 0, or no inner loop ends.")
        if not isinstance(group["seed"], int):
            raise ValueError(f"LRSGDR: seed must be a whole number, not {group['seed']!r}.")

    def inner_steps(self, group: Group) -> int:
        """A geometric number, by ``seed`` and the number of the loop alone."""
        return geometric(group["stop"], group["seed"], group["loops"])


class LRSGDC(_LRSGD):
    """SGD with a local regularizer, in inner loops of constant length with falling rates.

    Idea: that of LRSGDR, with loops of a fixed length in which the rate falls as 1/i, so that each loop
        settles before the anchor moves.
    Equation: d = g + 2λ (w − anchor) + weight_decay · w, buffer = momentum · buffer + d,
        w ← w − lr/(i + 1) · buffer in the loop's step i = 0 … inner_steps − 1, λ = strength / lr;
        anchor ← w when a loop begins.
    Use when: you want the paper's method, or rates that fall and rise again in short cycles.
    Do not use when: you look for a faster optimizer: with 10 inner steps the mean rate is 0.29 lr.
    Layers: any dense, real parameters.
    Cost: SGD with momentum, plus a copy of the weights and two passes over them. One gradient a step.
    Status: faithful to the official code's rule; a step is an inner step, as in LRSGDR.
    Source: Zhang, Qu, Metaxas and Chen, "Local Regularizer Improves Generalization", AAAI 2020.
    Code: huiqu18/LRSGD.
    Results: the paper's figures are not compute-matched, see LRSGDR: ten times the gradients of SGD in as
        many "epochs". Not reproduced here for that reason. On the digits at 1,200 gradients each, test
        accuracy 96.6 %, SGD 97.2 %: examples/plot_lrsgd.py.
    Limits: momentum is not reset when a loop ends. Each parameter group has its own loop; groups that begin
        together, with as many ``inner_steps``, keep time. At ``lr`` 0 nothing pulls.

    Args:
        params: parameters or parameter groups.
        lr: learning rate of a loop's first step. Default 0.1. Range 1e-3 to 1.
        strength: λ · lr; 0 leaves only the rates. Default 0.01. Range 1e-3 to 0.1.
        momentum: share of the buffer that stays. Default 0.9. Range 0 to 0.99.
        weight_decay: added as weight_decay · w to the gradient. Default 1e-4. Range 0 to 1e-2.
        inner_steps: steps in a loop; 1 is SGD. Default 10. Range 1 to 100.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import LRSGDC
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = LRSGDC([weight], lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> abs(weight.item()) < 0.1
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        strength: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        inner_steps: int = 10,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "strength": strength, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "inner_steps": inner_steps, "maximize": maximize, **_no_loop()})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        super().check(group)
        require_whole(self, inner_steps=group["inner_steps"])

    def inner_steps(self, group: Group) -> int:
        """As many as the group says."""
        return int(group["inner_steps"])

    def rate(self, group: Group) -> float:
        """``lr / (i + 1)`` in the loop's step i."""
        return float(group["lr"]) / (int(group["inner_step"]) + 1)


def geometric(stop: float, seed: int, draw: int) -> int:
    """Steps up to and with the first that ends a loop, each with probability ``stop``: 1 or more.

    Example:
        >>> lengths = [geometric(0.1, seed=0, draw=draw) for draw in range(2000)]
        >>> abs(sum(lengths) / 2000 - 10) < 1
        True
    """
    if stop == 1:
        return 1
    generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) % 2**63)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()
    return max(1, math.ceil(math.log1p(-uniform) / math.log1p(-stop)))


def _pull(group: Group) -> float:
    """2λ with λ = strength / lr. At a rate of 0 (a warm-up's first step) nothing moves, so nothing pulls."""
    rate = float(group["lr"])
    return 2 * float(group["strength"]) / rate if rate > 0 else 0.0


def _no_loop() -> dict[str, Any]:
    """Where a group is in its loops: in the group, so that the state of any optimizer carries it."""
    return {"inner_step": 0, "inner_end": 0, "loops": 0}
