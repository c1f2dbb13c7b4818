"""Attaching every rule alike: those with memory want an optimizer, and something to remember."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from plywise import Rule, StatefulRule
from plywise.testing.contract.models import compute_loss, make_batch

MOST_WARM_STEPS = 5
"""The largest number of steps in which a rule learns before it is tested."""

WARM_ROWS = 2
"""So few that backward itself makes the moves of most linear layers, and the step those of convolutions."""


def attach(
    rule: Rule,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    warm: Callable[[], Tensor] | tuple[int, ...] | None = None,
    **options: Any,
) -> Rule:
    """Attach ``rule``, without an optimizer if it can do without.

    With empty memory a rule does nothing special. ``warm`` is a loss, or the shape of an input, on which a
    rule with memory first learns for some steps, with weights, buffers, random numbers and the optimizer's
    own state as before.
    """
    if not (rule.remembers or (rule.needs_backward_scale and optimizer is not None)):
        return rule.attach(model, optimizer, **options)
    if optimizer is None:
        optimizer = SGD(model.parameters(), lr=0.1)
        options.setdefault("on_nonfinite", "raise")  # the default without an optimizer
    rule.attach(model, optimizer, **options)
    if warm is not None:
        learn(model, optimizer, warm, count_warm_steps(rule))
    return rule


def count_warm_steps(rule: Rule) -> int:
    """Count the steps after which a lone layer acts by its memory, and of several some are due to refresh.

    After two cycles but one step it is a layer's turn neither to learn for the first time nor to refresh.
    """
    cycle = rule.refresh_every if isinstance(rule, StatefulRule) else 1
    return min(max(2 * cycle - 1, 3), MOST_WARM_STEPS)


def learn(
    model: nn.Module,
    optimizer: Optimizer,
    warm: Callable[[], Tensor] | tuple[int, ...],
    steps: int,
) -> None:
    """Take steps that change nothing except the rule's memory."""
    loss = warm if callable(warm) else _make_loss(model, warm)
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    assert not any(list_own_keys(state) for state in optimizer.state.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
    optimizer.zero_grad()
    for parameter, state in list(optimizer.state.items()):
        for key in list_own_keys(state):
            del state[key]
        if not state:
            del optimizer.state[parameter]


def list_own_keys(state: dict[Any, Any]) -> list[Any]:
    """List the keys of the optimizer's own state, without those of a rule."""
    return [key for key in state if not str(key).startswith("plywise.")]


def _make_loss(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    batch = make_batch(shape, WARM_ROWS, next(model.parameters()).dtype, seed=77)
    return lambda: compute_loss(model, batch)
