"""LRSGD: SGD with a penalty on the distance from where an inner loop began."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import require_whole
from plywise.optim.plain import Group, PlainOptimizer


class _LRSGD(PlainOptimizer):
    """SGD with momentum in inner loops; its two subclasses define the length of a loop and its rates."""

    @abstractmethod
    def choose_steps(self, group: Group) -> int:
        """Choose the number of steps of the inner loop that begins now."""

    def compute_rate(self, group: Group) -> float:
        """Compute the learning rate of this inner step."""
        return float(group["lr"])

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        self.require_range("lr", group["lr"], 0, math.inf)
        self.require_range("strength", group["strength"], 0, math.inf)
        self.require_range("momentum", group["momentum"], 0, 1)
        self.require_range("weight_decay", group["weight_decay"], 0, math.inf)

    def move(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Take an inner step: gradient, pull towards the anchor, decay, momentum."""
        if group["inner_step"] == group["inner_end"]:
            self._begin(group)
        for param in params:
            if "anchor" not in self.state[param]:
                self.state[param]["anchor"] = param.clone(memory_format=torch.preserve_format)
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        anchors = [self.state[param]["anchor"] for param in params]
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        directions = torch._foreach_add(
            gradients, torch._foreach_sub(params, anchors), alpha=_compute_pull(group)
        )
        torch._foreach_add_(directions, params, alpha=float(group["weight_decay"]))
        torch._foreach_mul_(buffers, float(group["momentum"]))
        torch._foreach_add_(buffers, directions)
        torch._foreach_add_(params, buffers, alpha=-self.compute_rate(group))
        group["inner_step"] += 1

    def _begin(self, group: Group) -> None:
        """Begin the next inner loop: move all anchors, also of parameters that have no gradient now."""
        group["inner_end"] = self.choose_steps(group)
        group["inner_step"] = 0
        group["loops"] += 1
        for param in group["params"]:
            if "anchor" in self.state.get(param, {}):
                self.state[param]["anchor"].copy_(param)


class LRSGDR(_LRSGD):
    """SGD with a local regularizer, in inner loops of random length.

    Idea: a proximal penalty keeps the iterates of an inner loop near the first one. The next loop begins at
        the last iterate. Because the centre of the penalty moves along, the penalty does not move the
        minimum.
    Equation: d = g + 2λ (w − anchor) + weight_decay · w, buffer = momentum · buffer + d, w ← w − lr · buffer,
        λ = strength / lr; anchor ← w every M steps, M drawn from the geometric distribution with mean 1/stop.
    Use when: you want the paper's method, or a baseline with a proximal pull.
    Do not use when: you look for a faster optimizer. As the learning rate falls, the pull grows with 1/lr.
    Layers: any dense, real parameters.
    Cost: SGD with momentum, plus a copy of the weights and two passes over them. One gradient a step.
    Status: faithful to the rule of the official code. Here a step is an inner step and takes the next batch
        of the only loader; in their code each batch of an outer loader starts an inner loop on a reshuffled
        loader. Anchors begin at the weights; in their code they begin at zero for a weight without a gradient
        in the first step of a loop.
    Source: Zhang, Qu, Metaxas and Chen, "Local Regularizer Improves Generalization", AAAI 2020.
    Code: huiqu18/LRSGD.
    Results: the paper does not compare at equal cost. Its code takes M gradient steps for each batch of an
        epoch, plus a forward pass whose result is only printed, so its 350 "epochs" cost about ten times as
        many gradients as SGD's. For that reason it is not reproduced here. On digits with 1,200 gradients
        each, the test accuracy is 96.4 %, and 97.2 % with SGD: examples/plot_lrsgd.py.
    Limits: momentum is not reset when a loop ends. Each parameter group has its own loop; groups that begin
        together with the same ``stop`` and ``seed`` stay in step. With an ``lr`` of 0 there is no pull.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 0.1. Range 1e-3 to 1.
        strength: λ · lr. Without momentum a step reduces the distance to the anchor by the factor 1 − 2 ·
            strength; 0 is SGD. Default 0.01. Range 1e-3 to 0.1.
        momentum: share of the buffer that stays. Default 0.9. Range 0 to 0.99.
        weight_decay: added as weight_decay · w to the gradient. Default 1e-4. Range 0 to 1e-2.
        stop: probability that a loop ends after a step; 1 is SGD. Default 0.1. Range 0.02 to 1.
        seed: the lengths of the loops depend on it only. Default 0.
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
        super().__init__(
            params, {**settings, "stop": stop, "seed": seed, "maximize": maximize, **_make_loop()}
        )

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        super().check(group)
        self.require_range("stop", group["stop"], 0, 1)
        if group["stop"] == 0:
            raise ValueError("LRSGDR: stop must be above 0, or no inner loop ends.")
        if not isinstance(group["seed"], int):
            raise ValueError(f"LRSGDR: seed must be a whole number, not {group['seed']!r}.")

    def choose_steps(self, group: Group) -> int:
        """Draw a geometric number from ``seed`` and the number of the loop."""
        return draw_geometric(group["stop"], group["seed"], group["loops"])


class LRSGDC(_LRSGD):
    """SGD with a local regularizer, in inner loops of constant length with falling rates.

    Idea: as LRSGDR, but with loops of a fixed length, in which the rate falls as 1/i, so that the iterates
        settle before the anchor moves.
    Equation: d = g + 2λ (w − anchor) + weight_decay · w, buffer = momentum · buffer + d,
        w ← w − lr/(i + 1) · buffer in the loop's step i = 0 … inner_steps − 1, λ = strength / lr;
        anchor ← w when a loop begins.
    Use when: you want the paper's method, or rates that fall and rise again in short cycles.
    Do not use when: you look for a faster optimizer. With 10 inner steps the mean rate is 0.29 lr.
    Layers: any dense, real parameters.
    Cost: SGD with momentum, plus a copy of the weights and two passes over them. One gradient a step.
    Status: faithful to the rule of the official code; a step is an inner step, as in LRSGDR.
    Source: Zhang, Qu, Metaxas and Chen, "Local Regularizer Improves Generalization", AAAI 2020.
    Code: huiqu18/LRSGD.
    Results: the paper does not compare at equal cost (see LRSGDR): in as many "epochs" it takes ten times the
        gradients of SGD. For that reason it is not reproduced here. On digits with 1,200 gradients each, the
        test accuracy is 96.6 %, and 97.2 % with SGD: examples/plot_lrsgd.py.
    Limits: momentum is not reset when a loop ends. Each parameter group has its own loop; groups that begin
        together with the same ``inner_steps`` stay in step. With an ``lr`` of 0 there is no pull.

    Args:
        params: parameters or parameter groups.
        lr: learning rate of the first step of a loop. Default 0.1. Range 1e-3 to 1.
        strength: λ · lr; with 0 only the falling rates remain. Default 0.01. Range 1e-3 to 0.1.
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
        super().__init__(
            params, {**settings, "inner_steps": inner_steps, "maximize": maximize, **_make_loop()}
        )

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        super().check(group)
        require_whole(self, inner_steps=group["inner_steps"])

    def choose_steps(self, group: Group) -> int:
        """Return the setting of the group."""
        return int(group["inner_steps"])

    def compute_rate(self, group: Group) -> float:
        """Compute ``lr / (i + 1)`` in step i of the loop."""
        return float(group["lr"]) / (int(group["inner_step"]) + 1)


def draw_geometric(stop: float, seed: int, draw: int) -> int:
    """Draw the number of steps of a loop, at least 1, when each step ends it with probability ``stop``.

    Example:
        >>> lengths = [draw_geometric(0.1, seed=0, draw=draw) for draw in range(2000)]
        >>> abs(sum(lengths) / 2000 - 10) < 1
        True
    """
    if stop == 1:
        return 1
    generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) % 2**63)
    uniform = torch.rand((), dtype=torch.float64, generator=generator, device="cpu").item()
    return max(1, math.ceil(math.log1p(-uniform) / math.log1p(-stop)))


def _compute_pull(group: Group) -> float:
    """Compute 2λ with λ = strength / lr; 0 if the rate is 0, as in the first step of a warm-up."""
    rate = float(group["lr"])
    return 2 * float(group["strength"]) / rate if rate > 0 else 0.0


def _make_loop() -> dict[str, Any]:
    """Make the entries of a group that count its loops. A state dict of the optimizer includes them."""
    return {"inner_step": 0, "inner_end": 0, "loops": 0}
