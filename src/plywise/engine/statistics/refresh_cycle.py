"""Spreads the expensive refreshes of layers over the steps of a cycle, and makes cycles longer."""

from collections.abc import Mapping

from plywise.engine.processes.replicas import deal_out

FIRST_CYCLES = 2
"""Cycles before they become longer."""


def count_intervals(step: int, cycle: int, slowdown: int) -> int:
    """Return how many times as long the intervals are at a step as at the start of training.

    That is a power of two which follows the square root of the cycles so far: inputs change fast at first,
    and then less and less.

    Args:
        step: steps taken so far.
        cycle: steps of the first cycles.
        slowdown: the largest result.

    Example:
        >>> [count_intervals(step, 5, 8) for step in (0, 9, 10, 39, 40, 159, 160, 10_000)]
        [1, 1, 2, 2, 4, 4, 8, 8]
    """
    times = step // (FIRST_CYCLES * cycle)
    return min(slowdown, 1 << (times.bit_length() + 1) // 2)


def choose_phases(
    costs: Mapping[str, float], others: Mapping[str, tuple[int, float]], length: int
) -> dict[str, int]:
    """Choose phases for new layers so that every step of a cycle costs about the same.

    The most expensive layers choose first; layers of equal cost choose in the given order. A phase is chosen
    once, when the layer learns for the first time, and saved with the layer's statistics: layers that are
    found later do not change it.

    Args:
        costs: what the refresh of each new layer costs.
        others: phase and cost of the layers that have chosen before.
        length: steps of a cycle.

    Example:
        >>> choose_phases({"a": 1.0, "b": 4.0, "c": 2.0}, {}, 2)
        {'b': 0, 'c': 1, 'a': 1}
    """
    load = [0.0] * length
    for phase, cost in others.values():
        load[phase % length] += cost
    return deal_out(costs, load)
