"""ASkewSGD: SGD that moves weights to a few levels without projections."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise._util.checks import is_list, is_number, require_positive, require_whole
from plywise.optim.plain import Group, PlainOptimizer


class ASkewSGD(PlainOptimizer):
    """SGD under an interval constraint around each level, which tightens until the weights are quantized.

    Idea: each weight should lie in an interval around a level, and the intervals shrink during training.
        Inside, a weight moves by SGD. Outside it also does, if that brings it in fast enough; otherwise its
        velocity is replaced by one that does. So nothing is projected or rounded before the end.
    Equation: between the nearest levels a ≤ w ≤ b, r = (b − a)/2:
        φ(w) = ε r⁴ − (w − a)²(w − b)² ≥ 0 is wanted, K = α φ / (2 (w − a)(w − b)(2w − a − b));
        v = −g if φ ≥ 0, or (w − a)(w − b)(2w − a − b) = 0, or −g K > K², else v = K;
        w ← clamp(w + lr v, lowest level, highest level). ε = 1 in the first ``hold`` epochs, then
        ``decay`` times as much in each.
    Use when: you train a network from the start whose weights should have two or a few values.
    Do not use when: trained weights only need less storage: round them.
    Layers: the parameters of groups with ``levels``. Put biases and norms in a group with ``levels=None``,
        which moves by plain SGD.
    Cost: about twenty passes over the constrained weights in each step, and no state of their size.
    Status: variant. The rule is that of the official code, whose ImageNet part passes K to momentum or Adam,
        which rescale it; here the step is that of plain SGD, lr K. The cap of that part on lr |K|, a quarter
        of the interval, is used for two levels as well, because K is infinite halfway between levels. ε is
        relative to the interval, so that 1 always means no constraint. You choose the scale of the levels;
        the SAWB scale of the official code is not implemented.
    Source: Leconte, Schechtman and Moulines, "ASkewSGD: an annealed interval-constrained optimisation method
        to train quantized neural networks", AISTATS 2023 (arXiv 2211.03741).
    Code: aistats2023/537.
    Results: the paper's results on CIFAR and ImageNet are not reproduced here. On digits with weights of ±1
        the test accuracy is 89.2 %. Rounding at the end gives 84.2 %, ASkewSGD without a hold 68.6 %, and
        unconstrained weights 95.4 %: examples/plot_askew_sgd.py.
    Limits: the hold is essential: without it weights stay on the side where they began. φ of a weight outside
        shrinks by the factor 1 − lr α in each step, so lr α must be below 1, and ε must not fall faster.
        There is no momentum and no weight decay, because both would change K. Weights end in intervals around
        the levels, not on them: call `quantize` when done.

    Args:
        params: parameters or parameter groups.
        lr: learning rate. Default 0.1. Range 1e-3 to 1.
        steps_per_epoch: steps after which ε changes.
        levels: the values that weights end at, in rising order; None for plain SGD. Default (-1.0, 1.0).
        hold: epochs without a constraint. Default 50. Range 5 to 100.
        decay: the factor of ε in each epoch after that. Default 0.96. Range 0.8 to 0.999.
        alpha: α, how fast weights outside move in. Default 1. Range 0.1 to 5.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import ASkewSGD
        >>> weight = torch.nn.Parameter(torch.tensor([0.1, -0.2]))
        >>> optimizer = ASkewSGD([weight], steps_per_epoch=10, hold=5, decay=0.8)
        >>> for _ in range(600):
        ...     optimizer.zero_grad()
        ...     (weight - torch.tensor([-0.5, 0.3])).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.quantize()
        >>> weight.data
        tensor([-1.,  1.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        steps_per_epoch: int,
        levels: Sequence[float] | None = (-1.0, 1.0),
        hold: int = 50,
        decay: float = 0.96,
        alpha: float = 1.0,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "levels": levels, "steps_per_epoch": steps_per_epoch, "hold": hold}
        more = {"decay": decay, "alpha": alpha, "maximize": maximize, "steps": 0, "epsilon": 1.0}
        super().__init__(params, {**settings, **more})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        self.require_range("lr", group["lr"], 0, math.inf)
        self.require_range("hold", group["hold"], 0, math.inf)
        self.require_range("decay", group["decay"], 0, 1)
        require_whole(self, steps_per_epoch=group["steps_per_epoch"])
        require_positive(self, alpha=group["alpha"])
        levels = group["levels"]
        if levels is None:
            return
        values = list(levels) if is_list(levels) else []
        finite = len(values) > 1 and all(is_number(level) and math.isfinite(level) for level in values)
        if not (finite and all(low < high for low, high in pairwise(values))):
            raise ValueError(
                f"ASkewSGD: levels must be two or more finite numbers that rise, not {levels!r}; or None for "
                "plain SGD."
            )

    def move(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Take a step with each parameter, at the ε in ``group["epsilon"]``."""
        late = group["steps"] // group["steps_per_epoch"] - group["hold"]
        group["epsilon"] = float(group["decay"] ** max(0, late))
        rate = float(group["lr"])
        for param, gradient in zip(params, gradients, strict=True):
            if group["levels"] is None:
                param.add_(gradient, alpha=-rate)
                continue
            levels = param.new_tensor(group["levels"])
            param.add_(
                make_velocity(param, gradient, levels, group["epsilon"], group["alpha"], rate), alpha=rate
            )
            param.clamp_(levels[0], levels[-1])
        group["steps"] += 1

    @torch.no_grad()
    def quantize(self) -> None:
        """Round every constrained weight to its nearest level (the upper one if halfway), in place."""
        for group in self.param_groups:
            if group["levels"] is not None:
                for param in group["params"]:
                    low, high = find_interval(param, param.new_tensor(group["levels"]))
                    param.copy_(torch.where(param - low < high - param, low, high))


def make_velocity(
    weight: Tensor, gradient: Tensor, levels: Tensor, epsilon: float, alpha: float, rate: float
) -> Tensor:
    """Compute the velocity of each weight: −gradient, or K where that is too slow towards the intervals.

    Args:
        weight: of any shape.
        gradient: of the same shape.
        levels: (k,), rising.
        epsilon: ε, 1 for intervals that cover everything.
        alpha: α.
        rate: the learning rate, which caps K at a quarter of the interval a step.

    Example:
        >>> import torch
        >>> weight, levels = torch.tensor([0.0, 0.5, 0.9]), torch.tensor([-1.0, 1.0])
        >>> make_velocity(weight, torch.zeros(3), levels, epsilon=0.25, alpha=1.0, rate=0.1)
        tensor([-0.0000, 0.2083, -0.0000])
    """
    low, high = find_interval(weight, levels)
    product = (weight - low) * (weight - high)
    room = epsilon * ((high - low) / 2) ** 4 - product.square()
    slope = 2 * product * (2 * weight - low - high)
    cap = (high - low) / (4 * rate) if rate > 0 else torch.full_like(weight, math.inf)
    inward = (alpha * room / slope).clamp(-cap, cap)
    free = (room >= 0) | (slope == 0) | (-gradient * inward > inward.square())
    return torch.where(free, -gradient, inward)


def find_interval(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Find the levels below and above each weight; for a weight outside all levels, the nearest two.

    Example:
        >>> import torch
        >>> find_interval(torch.tensor([-9.0, 0.2, 2.0]), torch.tensor([-1.0, 0.0, 2.0]))
        (tensor([-1.,  0.,  0.]), tensor([0., 2., 2.]))
    """
    upper = torch.searchsorted(levels, weight.detach().contiguous()).clamp_(1, len(levels) - 1)
    return levels[upper - 1], levels[upper]
