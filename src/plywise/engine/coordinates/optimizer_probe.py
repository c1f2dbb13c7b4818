"""Finds how an optimizer uses weights, gradients and momenta, by running a small copy of it."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise.errors import AttachError

RATE, DECAY = 0.125, 0.25
"""Rate and weight decay of the copies: exact in every float, and large enough to show."""

START = ((1.0, -2.0), (3.0, 0.5))
GRADIENTS = (((0.5, -1.0), (2.0, 0.25)), ((-1.0, 0.75), (0.5, 1.5)))


@dataclass(frozen=True)
class OptimizerTraits:
    """How an optimizer uses weights and gradients.

    Attributes:
        decay: "decoupled" if weight decay multiplies weights by ``1 - lr · weight_decay``; "coupled" if it
            adds ``weight_decay · W`` to the gradient (to the negative one, if the optimizer maximizes);
            "none" if the optimizer has none.
        linear: names of the entries in its state that are linear in the gradients: momenta.
        quadratic: names of those that are quadratic in them: second moments.
    """

    decay: Literal["decoupled", "coupled", "none"]
    linear: tuple[str, ...]
    quadratic: tuple[str, ...]


def probe_optimizer(optimizer: Optimizer) -> OptimizerTraits:
    """Find an optimizer's traits by steps of small copies of it.

    Raises:
        AttachError: its steps depend on the weights by more than a weight decay (Adafactor, LAMB,
            schedule-free averages), or it cannot be copied or run without a closure.
    """
    try:
        return _probe(optimizer)
    except AttachError:
        raise
    except Exception as error:
        raise AttachError(
            f"Coordinates: a small copy of {type(optimizer).__name__} could not be made and stepped "
            f"({type(error).__name__}: {error}), so its use of weights and momenta stays unknown. Use an "
            "optimizer that is made from parameters and keyword settings, and that steps without a closure.",
            see="attach-optimizer",
        ) from error


def _probe(optimizer: Optimizer) -> OptimizerTraits:
    has_decay = "weight_decay" in optimizer.defaults
    plain = _run(optimizer, START, GRADIENTS, 0.0)
    shifted = _run(optimizer, torch.tensor(START, dtype=torch.float64, device="cpu") + 1, GRADIENTS, 0.0)
    if not _are_close(plain.move, shifted.move):
        raise AttachError(
            f"Coordinates turns the steps of an optimizer, and those of {type(optimizer).__name__} depend on "
            "the weights themselves, which are not turned. Use one whose steps depend on gradients only: "
            "SGD, AdamW, RMSprop, Muon and the like.",
            see="attach-optimizer",
        )
    doubled = _run(optimizer, START, _scale(GRADIENTS, 2.0), 0.0)
    negated = _run(optimizer, START, _scale(GRADIENTS, -1.0), 0.0)
    linear, quadratic = [], []
    for name, value in plain.state.items():
        if value.shape == plain.move.shape and bool(value.any()):
            twice, opposite = doubled.state[name], negated.state[name]
            if _are_close(twice, 2 * value) and _are_close(opposite, -value):
                linear.append(name)
            if _are_close(twice, 4 * value) and _are_close(opposite, value):
                quadratic.append(name)
    decay = _find_decay(optimizer) if has_decay else "none"
    return OptimizerTraits(decay, tuple(linear), tuple(quadratic))


def _find_decay(optimizer: Optimizer) -> Literal["decoupled", "coupled"]:
    start = torch.tensor(START, dtype=torch.float64, device="cpu")
    with_decay = _run(optimizer, START, _scale(GRADIENTS, 0.0), DECAY).move + start
    added = _run(
        optimizer, START, _scale(GRADIENTS, 0.0), 0.0, add=DECAY * find_direction(_find_group(optimizer))
    )
    if _are_close(with_decay, added.move + start):  # SGD without momentum is both, with it this
        return "coupled"
    if _are_close(with_decay, start * (1 - RATE * DECAY) ** len(GRADIENTS)):
        return "decoupled"
    raise AttachError(
        f"Coordinates: the weight decay of {type(optimizer).__name__} neither multiplies weights by "
        "1 - lr · weight_decay nor adds weight_decay · W to the gradient. Use another optimizer.",
        see="attach-optimizer",
    )


def find_direction(group: dict[str, Any]) -> int:
    """Return -1 for a group of parameters whose gradients the optimizer follows upwards, else 1."""
    return -1 if group.get("maximize") else 1


def _find_group(optimizer: Optimizer) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if group["params"])


@dataclass(frozen=True)
class _Outcome:
    """Attributes: move: how the weights moved; state: tensors of the optimizer's state."""

    move: Tensor
    state: dict[str, Tensor]


def _run(optimizer: Optimizer, start: Any, gradients: Any, decay: float, add: float = 0.0) -> _Outcome:
    """Run some steps of a small copy, with ``add · W`` added to each gradient."""
    before = torch.as_tensor(start, dtype=torch.float64, device="cpu").clone()
    weight = nn.Parameter(before.clone())
    copy = _make_copy(optimizer, weight, decay)
    for gradient in gradients:
        weight.grad = torch.as_tensor(gradient, dtype=torch.float64, device="cpu") + add * weight.detach()
        copy.step()
    state = {name: value for name, value in copy.state[weight].items() if isinstance(value, Tensor)}
    return _Outcome(weight.detach() - before, state)


def _make_copy(optimizer: Optimizer, weight: nn.Parameter, decay: float) -> Optimizer:
    group = _find_group(optimizer)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {**optimizer.defaults, **{key: value for key, value in group.items() if key != "params"}}
    settings = {key: value for key, value in settings.items() if key in accepted}
    settings |= {"lr": RATE} | ({"weight_decay": decay} if "weight_decay" in accepted else {})
    for key in ("fused", "capturable", "differentiable"):
        if key in settings:
            settings[key] = False
    return type(optimizer)([weight], **settings)


def _scale(gradients: Any, factor: float) -> Tensor:
    return factor * torch.tensor(gradients, dtype=torch.float64, device="cpu")


def _are_close(first: Tensor, second: Tensor) -> bool:
    return bool(torch.allclose(first.double(), second.double(), rtol=1e-4, atol=1e-7))
