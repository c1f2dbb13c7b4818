"""ProximalAnchor: pull weights towards an earlier point."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from plywise._util.checks import describe_kind
from plywise.errors import PlywiseError, StateError


class ProximalAnchor:
    """A copy of the parameters that pulls them back, for proximal point methods.

    Idea: instead of a loss f, minimise f plus half the squared distance from an earlier point, and move that
        point from time to time. Each such problem is better conditioned, and convex if f is weakly convex.
        LRSGD, PESG, CoDA and FedProx differ in when the point moves, and where to.
    Equation: min f(w) + strength/2 · ‖w − anchor‖², by adding strength · (w − anchor) to the gradient of f.
    Use when: a method has stages or rounds whose iterates should stay near those of the last one, or you want
        to damp noise.
    Do not use when: you want smaller weights: weight decay is an anchor at zero.
    Layers: any dense, real parameters that you give it.
    Cost: a copy of the parameters and three passes over them in each call; another copy, in float32 or wider,
        from the first `accumulate` on. It needs no backward pass.
    Status: faithful to the inexact proximal point method: the pull is one more gradient, and the inner
        problem is not solved exactly. The caller decides when the anchor moves.
    Source: Rockafellar, "Monotone operators and the proximal point algorithm", SIAM Journal on Control and
        Optimization, 1976; Parikh and Boyd, "Proximal Algorithms", 2014.
    Code: no separate code found; a few lines in huiqu18/LRSGD and Optimization-AI/LibAUC (PESG) do the same.
    Results: not reproduced here: it is a part of other methods, and the papers have no figures for it alone.
    Limits: strength · lr must stay below 2, or the iterates diverge. `add_gradient` does not pull a parameter
        whose ``.grad`` is None, because no optimizer would move it. A parameter that does not train is a
        constant in `penalty`. Make a new anchor after parameters have moved to another device.

    Args:
        params: parameters, such as ``model.parameters()``, each once. They are kept by reference, in this
            order.

    Attributes:
        params: the parameters.
        anchors: their anchors, in the same order; no gradient flows through them.
        count: the number of iterates in the average.

    Raises:
        TypeError: ``params`` holds something that is not a tensor.
        ValueError: it is empty, or holds a parameter twice, or one that is complex or not floating-point.

    Example:
        >>> import torch
        >>> from plywise.optim import ProximalAnchor
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> anchor = ProximalAnchor([weight])
        >>> weight.data.add_(1.0)
        tensor([2., 3.])
        >>> weight.grad = torch.zeros(2)
        >>> anchor.add_gradient(0.5)
        >>> weight.grad
        tensor([0.5000, 0.5000])
        >>> anchor.penalty(0.5).item()
        0.5
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = _check_parameters(params)
        self.anchors = [param.detach().clone() for param in self.params]
        self.count = 0
        self._means: list[Tensor] = []

    @torch.no_grad()
    def add_gradient(self, strength: float) -> None:
        """Add ``strength * (param - anchor)`` to each ``.grad``, in place; a ``.grad`` of None stays None.

        Raises:
            ValueError: ``strength`` is negative or not finite.
            PlywiseError: a gradient is sparse.
        """
        _check_strength(strength)
        pairs = [(p, a) for p, a in zip(self.params, self.anchors, strict=True) if p.grad is not None]
        if not pairs or strength == 0:
            return
        gradients = [_require_dense(param) for param, _ in pairs]
        away = torch._foreach_sub([param for param, _ in pairs], [anchor for _, anchor in pairs])
        torch._foreach_add_(gradients, away, alpha=strength)

    def penalty(self, strength: float) -> Tensor:
        """Compute ``strength/2 · ‖params − anchors‖²`` (0-d), with a graph, to be added to a loss.

        Its gradient is what `add_gradient` adds: use only one of the two.

        Raises:
            ValueError: ``strength`` is negative or not finite.
        """
        _check_strength(strength)
        distances = [(p - a).square().sum() for p, a in zip(self.params, self.anchors, strict=True)]
        return 0.5 * strength * sum(distances[1:], start=distances[0])

    @torch.no_grad()
    def refresh(self) -> None:
        """Move the anchor to the present parameters. The running average does not change."""
        torch._foreach_copy_(self.anchors, [param.detach() for param in self.params])

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the present parameters to the running average; call it after each step that should count."""
        values = [param.detach().to(_get_wide_dtype(param)) for param in self.params]
        self.count += 1
        if self.count == 1:
            self._means = [value.clone() for value in values]
            return
        torch._foreach_add_(self._means, torch._foreach_sub(values, self._means), alpha=1 / self.count)

    def average(self) -> list[Tensor]:
        """Return the average since the last `refresh_to_average`, in the order and dtypes of ``params``.

        Raises:
            PlywiseError: nothing was accumulated.
        """
        if not self.count:
            raise PlywiseError(
                "ProximalAnchor has no average: nothing was accumulated since it was made, or since the last "
                "refresh_to_average(). Call accumulate() after each step."
            )
        return [mean.to(param.dtype) for param, mean in zip(self.params, self._means, strict=True)]

    @torch.no_grad()
    def refresh_to_average(self) -> None:
        """Move the anchor to the average of the iterates, and begin a new average.

        Raises:
            PlywiseError: nothing was accumulated.
        """
        torch._foreach_copy_(self.anchors, self.average())
        self.count = 0
        self._means = []

    def state_dict(self) -> dict[str, Any]:
        """Return anchors, running means (none if ``count`` is 0) and count; tensors are not copied."""
        return {"anchors": list(self.anchors), "means": list(self._means), "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; it is checked as a whole before anything changes.

        Raises:
            StateError: the state belongs to other parameters.
        """
        anchors, means, count = state["anchors"], state["means"], state["count"]
        self._check_fit("anchors", anchors)
        if count:
            self._check_fit("means", means)
        torch._foreach_copy_(self.anchors, anchors)
        self.count = count
        self._means = [
            m.to(p.device, _get_wide_dtype(p), copy=True) for m, p in zip(means, self.params, strict=False)
        ]

    def _check_fit(self, what: str, tensors: list[Tensor]) -> None:
        theirs, mine = [tuple(t.shape) for t in tensors], [tuple(p.shape) for p in self.params]
        if theirs != mine:
            raise StateError(
                f"The saved state of ProximalAnchor is of other parameters: its {what} have the shapes "
                f"{theirs}, the parameters here {mine}. Make the anchor from the same parameters, in order.",
                see="state-memory",
            )


def _check_parameters(params: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        what = "a tensor" if isinstance(params, Tensor) else describe_kind(params)
        raise TypeError(f"ProximalAnchor takes a list of tensors, such as model.parameters(), not {what}.")
    checked = list(params)
    for position, param in enumerate(checked):
        if not isinstance(param, Tensor):
            raise TypeError(
                f"ProximalAnchor takes tensors, such as model.parameters(), not {type(param).__name__} "
                f"(at position {position})."
            )
        if not param.is_floating_point():
            raise ValueError(
                f"ProximalAnchor: the parameter at position {position} is of {param.dtype}. It takes real "
                "floating-point parameters only."
            )
    if not checked or len({id(param) for param in checked}) < len(checked):
        trouble = "one of them twice" if checked else "none"
        raise ValueError(f"ProximalAnchor needs each parameter once, and was given {trouble}.")
    return checked


def _check_strength(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise ValueError(f"ProximalAnchor: strength must be a finite number of at least 0, not {strength!r}.")


def _require_dense(param: Tensor) -> Tensor:
    gradient = param.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise PlywiseError(
            f"ProximalAnchor: the gradient of a parameter of shape {tuple(param.shape)} is sparse, and the "
            "pull is dense. Use sparse=False in the embedding, or leave the parameter out of the anchor."
        )
    return gradient


def _get_wide_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a running mean, which would lose late iterates in half precision."""
    return torch.promote_types(param.dtype, torch.float32)
