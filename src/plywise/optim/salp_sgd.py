"""SalpSGD: SGD with a chain of salps that looks around each step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import require_whole
from plywise.errors import PlywiseError
from plywise.optim.plain import CheckedOptimizer, Group

Point = list[Tensor]
"""A value for every parameter that moves."""


class SalpSGD(CheckedOptimizer):
    """After Salp-SGD: gradient descent and salp swarm search, whichever is lower on this batch.

    Idea: a salp swarm is a chain of points behind the food, the best point so far: the first half looks
        around it, within a radius that shrinks, and each other follows the one before it. Here the food takes
        an SGD step, the chain searches from there, and the lowest of all is the food of the next step.
    Equation: food = w − lr g; leaders x = food + c₁ · radius · u, u uniform in [−1, 1] for each weight,
        c₁ = 2 exp(−(4 step/total_steps)²); followers xᵢ ← (xᵢ + xᵢ₋₁)/2; w ← the lowest of food and all x.
    Use when: you study swarm search, or a loss of few weights has many shallow minima.
    Do not use when: passes count: in the example what salps add to a step does not pay for them.
    Layers: any dense, real parameters.
    Cost: salps + 1 forward and backward passes a step (1 if ``salps`` is 1), since a closure makes both, and
        up to 1.5 · salps + 2 copies of the weights.
    Status: after the paper, which integrates the two, but how is not public. Chosen here: the food is one
        salp of the chain and takes the gradient step; all are evaluated on each batch, since the loss is
        stochastic; leaders are the first half, as in common code of salp swarms; their radius is symmetric
        and the same for all weights, and the search space has no bounds.
    Source: after Oswalt Manoj and Ananth, "MapReduce and optimized deep network for rainfall prediction in
        agriculture", The Computer Journal, 2020; salp swarms: Mirjalili et al., "Salp Swarm Algorithm",
        Advances in Engineering Software, 2017.
    Code: none found.
    Results: the paper's are MSE 0.001 and PRD 0.0021 on rainfall data, not reproduced here: its ConvLSTM and
        the data's preparation are not public. On the digits, 300 steps: validation loss 0.325 with 4 salps
        (1,500 passes), SGD 0.351 (300 passes): examples/plot_salp_sgd.py.
    Limits: no step is higher on its batch than SGD's would be; that says nothing about the next batch.
        Shallow minima are left only if ``radius`` is about their distance. The closure is called salps + 1
        times, so running statistics (batch norm) and dropout see every salp; the gradients left behind are
        those at the step's beginning. No GradScaler, which takes no closures.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 0.1. Range 1e-3 to 1.
        total_steps: steps in the whole run, over which the radius shrinks to almost nothing.
        salps: points in the chain, the food among them; 1 is SGD. The same for all groups. Default 4. Range 1
            to 30.
        radius: how far leaders look, in units of the weights; at first twice as far. Default 0.01. Range 1e-4
            to 0.1.
        seed: what leaders draw is a function of it and of the step. Default 0.

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
        """Make one step; ``closure`` clears the gradients, computes loss and gradients, and returns the loss.

        All its calls within a step have to see the same batch.

        Returns:
            The loss at the beginning of the step.

        Raises:
            PlywiseError: no closure is given, or a gradient is sparse or complex. If the closure raises,
                parameters and state are what they were before the step.
        """
        if closure is None:
            raise PlywiseError("SalpSGD evaluates the loss at several points. Call step(closure).")
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        moving = [
            (group, param, gradient.clone())
            for group in self.param_groups
            for param, gradient in zip(*self.with_gradients(group), strict=True)
        ]
        if not moving:
            return loss
        params = [param for _, param, _ in moving]
        food = [torch.add(param, gradient, alpha=-float(group["lr"])) for group, param, gradient in moving]
        leaders = self._leaders([group for group, _, _ in moving], food)
        followers = self._followers(params, [food, *leaders][-1])
        best = lowest([food, *leaders, *followers], params, evaluate)
        torch._foreach_copy_(params, best)
        for place, (_, param, gradient) in enumerate(moving):
            param.grad = gradient
            if followers:
                self.state[param]["followers"] = torch.stack([follower[place] for follower in followers])
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def _leaders(self, groups: list[Group], food: Point) -> list[Point]:
        """The first half of the chain behind the food, around it."""
        first = self.param_groups[0]
        seed = (first["seed"] * 1_000_003 + first["steps"]) % 2**63
        generators = {x.device: torch.Generator(x.device).manual_seed(seed) for x in food}
        reaches = [spread(group["steps"] / group["total_steps"]) * group["radius"] for group in groups]
        return [
            [
                x + reach * torch.empty_like(x).uniform_(-1, 1, generator=generators[x.device])
                for x, reach in zip(food, reaches, strict=True)
            ]
            for _ in range(first["salps"] // 2)
        ]

    def _followers(self, params: list[Tensor], ahead: Point) -> list[Point]:
        """The other half: each goes half of the way to the one ahead; they begin where the weights are."""
        followers: list[Point] = []
        for number in range((self.param_groups[0]["salps"] - 1) // 2):
            kept = [self.state.get(param, {}).get("followers") for param in params]
            at = [p if points is None else points[number] for p, points in zip(params, kept, strict=True)]
            ahead = [(x + y) / 2 for x, y in zip(at, ahead, strict=True)]
            followers.append(ahead)
        return followers


@torch.no_grad()
def lowest(points: list[Point], params: list[Tensor], evaluate: Callable[[], float]) -> Point:
    """The point with the lowest loss, of equals the first; one that is alone is not evaluated.

    ``params`` are put at each point in turn, and then back, also if ``evaluate`` raises. A loss of NaN is no
    candidate.
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


def spread(progress: float) -> float:
    """c₁ of salp swarms, by the share of the run that is over.

    Example:
        >>> spread(0.0), round(spread(0.5), 4), round(spread(1.0), 4)
        (2.0, 0.0366, 0.0)
    """
    return 2 * math.exp(-((4 * progress) ** 2))
