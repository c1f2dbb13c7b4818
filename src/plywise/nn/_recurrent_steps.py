"""The equations of torch's recurrent layers, step by step, with every product a call of `F.linear`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
"""(h,) or, for an LSTM, (h, c); a row is a sequence of the batch."""


class Recurrent(NamedTuple):
    """The weights that act on the state: of a layer and a direction, or of a cell."""

    weight: Tensor
    bias: Tensor | None
    projection: Tensor | None = None


Step = Callable[[Tensor, State, Recurrent], State]
"""Takes the input's share of the gates and the state before; gives the state after."""


def step_tanh(gates: Tensor, state: State, recurrent: Recurrent) -> State:
    """Do a step of `torch.nn.RNN` with tanh."""
    return ((gates + F.linear(state[0], recurrent.weight, recurrent.bias)).tanh(),)


def step_relu(gates: Tensor, state: State, recurrent: Recurrent) -> State:
    """Do a step of `torch.nn.RNN` with ReLU."""
    return ((gates + F.linear(state[0], recurrent.weight, recurrent.bias)).relu(),)


def step_lstm(gates: Tensor, state: State, recurrent: Recurrent) -> State:
    """Do a step of `torch.nn.LSTM`."""
    h, c = state
    i, f, g, o = (gates + F.linear(h, recurrent.weight, recurrent.bias)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if recurrent.projection is None else F.linear(h, recurrent.projection), c


def step_gru(gates: Tensor, state: State, recurrent: Recurrent) -> State:
    """Do a step of `torch.nn.GRU`, whose reset gate acts behind the product with the state."""
    (h,) = state
    input_r, input_z, input_n = gates.chunk(3, 1)
    state_r, state_z, state_n = F.linear(h, recurrent.weight, recurrent.bias).chunk(3, 1)
    r, z = (input_r + state_r).sigmoid(), (input_z + state_z).sigmoid()
    n = (input_n + r * state_n).tanh()
    return (n + z * (h - n),)


STEPS: dict[str, Step] = {
    "RNN_TANH": step_tanh,
    "RNN_RELU": step_relu,
    "LSTM": step_lstm,
    "GRU": step_gru,
}
"""The step of each kind of layer, by what torch calls its mode."""


def run_steps(
    step: Step, gates: Sequence[Tensor], state: State, recurrent: Recurrent, reverse: bool
) -> tuple[Tensor, State]:
    """Run a layer in a direction over all time steps.

    Args:
        step: the layer's equation.
        gates: the input's share of the gates, a tensor a time step. A step may have fewer rows than the step
            before: the last sequences of the batch have ended.
        state: the state at the start, with a row for each sequence.
        recurrent: the weights that act on the state.
        reverse: run from the last time step to the first.

    Returns:
        The outputs of all time steps, in the order of time and one below the other; and the state in which
        each sequence ends.
    """
    return (_run_backward if reverse else _run_forward)(step, gates, state, recurrent)


def _run_forward(
    step: Step, gates: Sequence[Tensor], state: State, recurrent: Recurrent
) -> tuple[Tensor, State]:
    outputs, ends = [], []
    for step_gates in gates:
        count, last_count = len(step_gates), len(state[0])
        if count < last_count:  # the last sequences have ended
            parts = [part.split([count, last_count - count]) for part in state]
            state = tuple(first for first, _ in parts)
            ends.append(tuple(last for _, last in parts))
        state = step(step_gates, state, recurrent)
        outputs.append(state[0])
    if ends:  # the longest sequences are the first rows
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ends), strict=True))
    return torch.cat(outputs), state


def _run_backward(
    step: Step, gates: Sequence[Tensor], state: State, recurrent: Recurrent
) -> tuple[Tensor, State]:
    start, state = state, tuple(part[: len(gates[-1])] for part in state)
    outputs = []
    for step_gates in reversed(gates):
        count, last_count = len(step_gates), len(state[0])
        if count > last_count:  # shorter sequences begin here, with their last element
            new = [part[last_count:count] for part in start]
            state = tuple(torch.cat(parts) for parts in zip(state, new, strict=True))
        state = step(step_gates, state, recurrent)
        outputs.append(state[0])
    return torch.cat(outputs[::-1]), state
