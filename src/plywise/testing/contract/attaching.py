"""Attaching every rule alike: those with memory want an optimizer, and something to remember."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from plywise import Rule
from plywise.testing.contract.models import compute_loss, make_batch

WARM_STEPS = 5
"""Then a lone layer acts by its memory, and of several some do while others take their turn to refresh."""

WARM_ROWS = 2
"""So few that backward itself makes the moves of most linear layers, and the step those of convolutions."""


def attach(
    rule: Rule,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    warm: Callable[[], Tensor] | tuple[int, ...] | None = None,
    steps: int = WARM_STEPS,
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
        learn(model, optimizer, warm, steps)
    return rule


def learn(
    model: nn.Module,
    optimizer: Optimizer,
    warm: Callable[[], Tensor] | tuple[int, ...],
    steps: int = WARM_STEPS,
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
    dtype = next(model.parameters()).dtype
    return lambda: compute_loss(model, make_batch(shape, WARM_ROWS, dtype, seed=77))
