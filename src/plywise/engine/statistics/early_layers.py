"""Layers whose updates backward makes in every step, though the rule makes those of others at the step.

A weight that is computed (weight norm, pruning) has no ``.grad`` from which the step could make an update,
and the ``.grad`` of a weight that is used in several ways is the sum over all of them.
"""

import torch
from torch import Tensor

from plywise.engine.call import LinearCall
from plywise.engine.contract import ROUNDING_ERROR, State, StatefulContract
from plywise.engine.finite import find_finite, measure_norms

GRADIENT = "plywise.gradient"
"""Among the evidence of such a layer: the gradient of this use, as a matrix."""


def gather_gradient(call: LinearCall) -> Tensor:
    """Return the plain gradient of one use of a weight, (g, m, k)."""
    return call.matrix(call.gradient()).to(call.dtype)


def measure_scale(rule: StatefulContract, memory: State, gradient: Tensor) -> State:
    """Return the factor that gives updates the norm of their gradients, until the next refresh.

    Args:
        rule: a rule that `keeps_norm`.
        memory: the state after a refresh.
        gradient: that of this step, (g, m, k).

    Returns:
        What changes in the state; the same as before if the gradient is zero or not finite.
    """
    stacked = {key: value.unsqueeze(0) for key, value in memory.items()}
    updates, _ = rule.finish_stacked(stacked, gradient.clone().unsqueeze(0))
    before, after = measure_norms([gradient, updates[0]], torch.float64)
    scale = (before / after).to(memory["scale"].dtype)
    return {"scale": torch.where((after > 0) & scale.isfinite(), scale, memory["scale"])}


def learn_from_call(rule: StatefulContract, call: LinearCall, processes: int) -> State:
    """Return what a layer would learn from this call alone; nothing if that is not finite.

    Args:
        rule: the rule.
        call: the call.
        processes: how many train together. All are assumed to have rows like these.
    """
    evidence = rule.gather(call.times(1 / processes), 0)
    memory = dict(rule.learn({}, {key: value * processes for key, value in evidence.items()}))
    memory.pop(ROUNDING_ERROR, None)
    if not all(find_finite(list(memory.values()))):
        return {}
    memory |= rule.refresh(memory, call.name, call.health)
    if rule.keeps_norm:
        memory |= measure_scale(rule, memory, gather_gradient(call))
        if not bool(memory["scale"] > 0):
            return {}
    return memory
