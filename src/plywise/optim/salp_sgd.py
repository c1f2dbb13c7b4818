"""SalpSGD: SGD with a swarm of points (salps) that searches around each step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import require_whole
from plywise.errors import PlywiseError
from plywise.optim.plain import CheckedOptimizer, Group

Point = list[Tensor]
"""A value for each parameter that moves."""


class SalpSGD(CheckedOptimizer):
    """After Salp-SGD: take the better of gradient descent and salp swarm search on this batch.

    Idea: a salp swarm is a chain of points behind the food, which is the best point so far. The first half,
        the leaders, search around the food within a radius that shrinks; each other point follows the one
        before it. Here the food takes an SGD step, the chain searches from there, and the point with the
        lowest loss is the food of the next step.
    Equation: food = w − lr g; leaders x = food + c₁ · radius · u, u uniform in [−1, 1] for each weight,
        c₁ = 2 exp(−(4 step/total_steps)²); followers xᵢ ← (xᵢ + xᵢ₋₁)/2; w ← the lowest of food and all x.
    Use when: you study swarm search, or a loss of few weights has many shallow minima.
    Do not use when: the number of passes counts: in our example the salps gain less than their passes cost.
    Layers: any dense, real parameters.
    Cost: salps + 1 forward and backward passes in each step (1 if ``salps`` is 1), because a closure runs
        both, and up to 1.5 · salps + 2 copies of the weights.
    Status: after the paper, which combines the two methods in a way that is not public. Our choices: the food
        is one salp of the chain and takes the gradient step. All salps are evaluated on each batch, because
        the loss is stochastic. The leaders are the first half, as in common code of salp swarms. Their radius
        is symmetric and the same for all weights, and the search space has no bounds.
    Source: after Oswalt Manoj and Ananth, "MapReduce and optimized deep network for rainfall prediction in
        agriculture", The Computer Journal, 2020; salp swarms: Mirjalili et al., "Salp Swarm Algorithm",
        Advances in Engineering Software, 2017.
    Code: none found.
    Results: the paper reports an MSE of 0.001 and a PRD of 0.0021 on rainfall data; not reproduced here,
        because its ConvLSTM and the preparation of its data are not public. On digits after 300 steps the
        validation loss is 0.325 with 4 salps (1,500 passes) and 0.351 with SGD (300 passes):
        examples/plot_salp_sgd.py.
    Limits: the loss on the batch of a step is never above that of an SGD step, but this says nothing about
        the next batch. It leaves shallow minima only if ``radius`` is about their distance. The closure is
        called salps + 1 times, so running statistics (batch norm) and dropout see every salp. The gradients
        that remain are those at the beginning of the step. It does not work with a GradScaler, which takes no
        closures.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 0.1. Range 1e-3 to 1.
        total_steps: steps in the whole run, over which the radius shrinks almost to zero.
        salps: points in the chain, including the food; 1 is SGD. The same for all groups. Default 4. Range 1
            to 30.
        radius: how far leaders search, in units of the weights; twice as far at the start. Default 0.01.
            Range 1e-4 to 0.1.
        seed: the random numbers of the leaders depend on it and on the step only. Default 0.

    Raises:
        ValueError: a setting is out of range, or groups differ in ``salps`` or ``seed``.

    Example:
        >>> import torch
        >>> from plywise.optim import SalpSGD
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = SalpSGD([weight], lr=0.1, total_steps=50)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(50):
        ...     loss = optimizer.step(closure)
        >>> loss.item() < 1e-6
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        total_steps: int,
        salps: int = 4,
        radius: float = 0.01,
        seed: int = 0,
    ) -> None:
        settings = {"lr": lr, "total_steps": total_steps, "salps": salps, "radius": radius, "seed": seed}
        super().__init__(params, {**settings, "steps": 0})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        self.require_range("lr", group["lr"], 0, math.inf)
        self.require_range("radius", group["radius"], 0, math.inf)
        require_whole(self, total_steps=group["total_steps"], salps=group["salps"])
        if not isinstance(group["seed"], int):
            raise ValueError(f"SalpSGD: seed must be a whole number, not {group['seed']!r}.")
        for name in ("salps", "seed"):
            if self.param_groups and group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"SalpSGD: {name} must be the same in all groups, since all have one chain; it is "
                    f"{self.param_groups[0][name]!r} in the first group and {group[name]!r} in another."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """Take a step; ``closure`` clears the gradients, computes loss and gradients, and returns the loss.

        All its calls within a step must use the same batch.

        Returns:
            The loss at the beginning of the step.

        Raises:
            PlywiseError: no closure is given, or a gradient is sparse or complex. If the closure raises,
                parameters and state are as before the step.
        """
        if closure is None:
            raise PlywiseError("SalpSGD evaluates the loss at several points. Call step(closure).")
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        moving = [
            (group, param, gradient.clone())
            for group in self.param_groups
            for param, gradient in zip(*self.collect_gradients(group), strict=True)
        ]
        if not moving:
            return loss
        params = [param for _, param, _ in moving]
        food = [torch.add(param, gradient, alpha=-float(group["lr"])) for group, param, gradient in moving]
        leaders = self._draw_leaders([group for group, _, _ in moving], food)
        followers = self._move_followers(params, [food, *leaders][-1])
        best = find_lowest([food, *leaders, *followers], params, evaluate)
        torch._foreach_copy_(params, best)
        for place, (_, param, gradient) in enumerate(moving):
            param.grad = gradient
            if followers:
                self.state[param]["followers"] = torch.stack([follower[place] for follower in followers])
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def _draw_leaders(self, groups: list[Group], food: Point) -> list[Point]:
        """Draw the first half of the chain behind the food, around it."""
        first = self.param_groups[0]
        seed = (first["seed"] * 1_000_003 + first["steps"]) % 2**63
        generators = {x.device: torch.Generator(x.device).manual_seed(seed) for x in food}
        reaches = [
            compute_spread(group["steps"] / group["total_steps"]) * group["radius"] for group in groups
        ]
        return [
            [
                x + reach * torch.empty_like(x).uniform_(-1, 1, generator=generators[x.device])
                for x, reach in zip(food, reaches, strict=True)
            ]
            for _ in range(first["salps"] // 2)
        ]

    def _move_followers(self, params: list[Tensor], ahead: Point) -> list[Point]:
        """Move the other half: each point goes halfway to the one before it. They begin at the weights."""
        followers: list[Point] = []
        for number in range((self.param_groups[0]["salps"] - 1) // 2):
            kept = [self.state.get(param, {}).get("followers") for param in params]
            at = [p if points is None else points[number] for p, points in zip(params, kept, strict=True)]
            ahead = [(x + y) / 2 for x, y in zip(at, ahead, strict=True)]
            followers.append(ahead)
        return followers


@torch.no_grad()
def find_lowest(points: list[Point], params: list[Tensor], evaluate: Callable[[], float]) -> Point:
    """Find the point with the lowest loss, the first of equal ones; a single point is not evaluated.

    ``params`` are set to each point in turn, and then restored, also if ``evaluate`` raises. A point with a
    loss of NaN is never chosen.
    """
    if len(points) == 1:
        return points[0]
    start = [param.clone() for param in params]
    best, least = points[0], math.inf
    try:
        for point in points:
            torch._foreach_copy_(params, point)
            loss = float(evaluate())
            if loss < least:
                best, least = point, loss
    finally:
        torch._foreach_copy_(params, start)
    return best


def compute_spread(progress: float) -> float:
    """Compute c₁ of salp swarms from the part of the run that is over.

    Example:
        >>> compute_spread(0.0), round(compute_spread(0.5), 4), round(compute_spread(1.0), 4)
        (2.0, 0.0366, 0.0)
    """
    return 2 * math.exp(-((4 * progress) ** 2))
