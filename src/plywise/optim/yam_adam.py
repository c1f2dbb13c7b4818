"""YamAdam: Adam without a learning rate; its step has the units of the weights."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from plywise.optim.plain import Group, PlainOptimizer

BUFFERS = ("mean", "variance", "steps", "step_now")
"""m, v, s and h of the equation."""


class YamAdam(PlainOptimizer):
    """Adam with no learning rate and no decay rates to tune.

    Idea: a gradient has the units of loss over weight. So a step must be divided by a quantity in units of
        gradients and multiplied by one in units of weights. As in AdaDelta, the latter is the size of the
        steps so far; as in Adam, the gradient is a running mean. The decay rate follows from how steps grow
        or shrink.
    Equation: m⁺ = b m + (1 − b) g, v⁺ = b v + (1 − b)(g − m)², s⁺ = b s + (1 − b) h², h⁺ = m⁺ √((s⁺ + ε)/(v⁺
        + ε)), b⁺ = σ((‖h‖₁ + ε)/(‖h⁺‖₁ + ε)) − ε, w ← w − h⁺; all begin at 0, and b is one number for each
        tensor.
    Use when: nothing may be tuned, or an untuned baseline is wanted.
    Do not use when: a learning rate can be tuned, or you want a schedule: there is no learning rate to
        change.
    Layers: any dense, real parameters.
    Cost: four copies of the weights, about fifteen passes over them and two norms of each tensor in each
        step.
    Status: faithful to the author's code, which uses m and h of the last step in v and s, and ε under the
        root.
    Source: Yamada, "Hyperparameter-free optimizer of gradient-descent method incorporating unit correction
        and moment estimation", bioRxiv 348557, 2018.
    Code: yamada-kd/YamAdam (Theano).
    Results: the paper's results are not reproduced here, because its tables were not available to us. On
        digits after 300 steps the test accuracy is 95.3 %; Adam reaches 92.6 % at its default rate and 95.8 %
        at the best of eight rates (examples/plot_yam_adam.py).
    Limits: the first step of a weight is at most √ε. Where the gradient hardly changes, v is near 0, and a
        step can be many times as large as the last one. There is no weight decay. In half precision 1 − ε
        rounds to 1: keep the weights in float32.

    Args:
        params: parameters or parameter groups.
        eps: ε, added to squared steps and squared gradients alike. Default 1e-6. Range 1e-10 to 1e-4.
        maximize: go up instead of down. Default False.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from plywise.optim import YamAdam
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = YamAdam([weight])
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight.abs().max().item() < 0.1
        True
    """

    def __init__(self, params: ParamsT, eps: float = 1e-6, *, maximize: bool = False) -> None:
        super().__init__(params, {"eps": eps, "maximize": maximize})

    def check(self, group: Group) -> None:
        """Raise ValueError for a setting that is out of range."""
        self.require_range("eps", group["eps"], 0, math.inf)
        if group["eps"] == 0:
            raise ValueError("YamAdam: eps must be above 0: it is the first step's length, squared.")

    def move(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Take a step with each parameter separately."""
        for param, gradient in zip(params, gradients, strict=True):
            state = self.state[param]
            if "decay" not in state:
                state.update({name: torch.zeros_like(param) for name in BUFFERS}, decay=param.new_zeros(()))
            param.sub_(advance(state, gradient, group["eps"]))


def advance(state: dict[str, Any], gradient: Tensor, eps: float) -> Tensor:
    """Bring ``state`` (`BUFFERS`, and b as ``decay``) up to date in place; return the step h⁺.

    Example:
        >>> import torch
        >>> state = {name: torch.zeros(1) for name in (*BUFFERS, "decay")}
        >>> advance(state, torch.tensor([5.0]), eps=1e-6)
        tensor([0.0010])
    """
    decay, mean, step = state["decay"], state["mean"], state["step_now"]
    fresh = 1 - decay
    last = step.norm(1)
    state["variance"].mul_(decay).add_(fresh * (gradient - mean).square())
    state["steps"].mul_(decay).add_(fresh * step.square())
    mean.mul_(decay).add_(fresh * gradient)
    torch.mul(mean, ((state["steps"] + eps) / (state["variance"] + eps)).sqrt(), out=step)
    decay.copy_(torch.sigmoid((last + eps) / (step.norm(1) + eps)) - eps)
    return step
