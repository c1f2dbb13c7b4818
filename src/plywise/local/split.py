"""Cuts a model into blocks of about equal cost."""

import math
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from plywise._util.checks import describe_kind
from plywise._util.modes import evaluating
from plywise.data.batches import TARGETS, Batch, clone_batch, list_tensors
from plywise.data.models import call_model
from plywise.errors import BlockError
from plywise.local.blocks import Blocks
from plywise.local.cutting.units import ADVICE, copy_of, find_units, join_units, own_randomness

_REPEATS = 5


def split(model: nn.Module, k: int, example: Batch) -> Blocks:
    """Cut a model into a sequence of blocks of about equal cost.

    Cuts are made where a single tensor crosses, in nested Sequentials and in forwards that torch.fx can
    trace; what has no parameters stays with the layer before. Where a forward calls the layers of an
    `nn.ModuleList` (or a Sequential) in a loop, as transformers of Hugging Face and timm do, cuts are made
    between these layers, whatever else it does: its inputs (ids, masks) are carried along with the signal,
    and each block runs the model's own forward with the other layers left out. The costs of these units,
    forward and backward, are measured on a copy of the model in train mode; the cuts make the most expensive
    block as cheap as possible. The blocks hold the model's own modules, parameters and buffers, under the
    names that they have in the model. While it measures there are two copies of the model beside it.

    Args:
        model: the model. It gives one tensor, or an output that holds one (``.logits``, the first of a
            tuple). It stays as it is (lazy layers are materialised).
        k: number of blocks.
        example: a typical training batch of inputs: a tensor, or a dict or tuple of tensors, passed to the
            model by name or by position; batch norm needs two samples.

    Returns:
        The blocks. A block that is not just a sequence of modules is a `torch.fx.GraphModule`: numbers that
        forward reads from attributes are fixed at their present values, and ``self.training`` becomes the
        mode of the block.

    Raises:
        BlockError: there are fewer than ``k`` units (the error says where several tensors cross, a parameter
            is shared, …), the model can neither be traced nor has a row of layers, returns something else
            than one tensor with a row for each sample, or cannot be copied.

    Example:
        >>> import torch, plywise as pw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> blocks = pw.split(model, 2, torch.randn(4, 8))
        >>> blocks.shapes
        (torch.Size([8]), torch.Size([16]), torch.Size([3]))
        >>> blocks[1].get_parameter("2.weight") is model[2].weight
        True
    """
    if not isinstance(model, nn.Module):
        raise BlockError(
            f"split needs a torch.nn.Module as first argument, not {describe_kind(model)}. Write "
            "plywise.split(model, 4, x): the model itself, the number of blocks, a small batch of inputs."
        )
    if not isinstance(k, Integral) or k < 1:
        raise BlockError(f"A model is cut into 1 block or more, a whole number, not {k!r}.")
    if k == 1 and isinstance(example, Tensor):
        return _blocks([model], model, example)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        with torch.no_grad(), evaluating(model):  # materialises them; copies cannot be made before
            call_model(model, clone_batch(example), TARGETS)
    with torch.inference_mode(False), own_randomness(model, example):
        units, reasons = find_units(model, example)
        if len(units) < k:
            names = ", ".join(unit.label for unit in units)
            more = [f"and {len(reasons) - 4} more"] if len(reasons) > 4 else []
            why = f"Not cut further: {'; '.join([*reasons[:4], *more])}. " if reasons else ""
            raise BlockError(
                f"{type(model).__name__} can be cut into {len(units)} at most ({names}), and {k} blocks "
                f"were asked for. {why}Ask for fewer blocks, or {ADVICE}."
            )
        rehearsal = copy_of(model)
        costs = measure([unit.assemble(rehearsal) for unit in units], example)
    starts = [part.start for part in balance(costs, k)]
    return _blocks([unit.assemble(model) for unit in join_units(units, starts)], model, example)


def balance(costs: Sequence[float], k: int) -> list[range]:
    """Divide a sequence of units into ``k`` blocks, the most expensive of which is as cheap as possible.

    Of these partitions, take the one with the least sum of squares, which balances the other blocks, too.
    Exact.

    Args:
        costs: of the units, first to last; not negative.
        k: number of blocks, at most as many as units.

    Returns:
        The units of each block.

    Raises:
        BlockError: there are fewer than ``k`` units, or ``k`` is below 1.

    Example:
        >>> balance([8, 4, 2, 2, 1, 1], 2)
        [range(0, 1), range(1, 6)]
    """
    if not 1 <= k <= len(costs):
        raise BlockError(f"{len(costs)} units cannot be {k} blocks.")
    sums = list(accumulate(costs, initial=0.0))
    worst, _ = _cheapest(sums, k, max, lambda cost: cost)
    _, cuts = _cheapest(sums, k, operator.add, lambda cost: cost**2 if cost <= worst else math.inf)
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _cheapest(
    sums: list[float], k: int, add: Callable[[float, float], float], price: Callable[[float], float]
) -> tuple[float, list[int]]:
    """Return the least total price of ``k`` blocks, by dynamic programming, and where they start and end."""
    totals = [0.0] + [math.inf] * (len(sums) - 1)
    starts: list[list[int]] = []
    for _ in range(k):
        best = [
            min(
                ((add(totals[start], price(sums[stop] - sums[start])), start) for start in range(stop)),
                default=(math.inf, 0),
            )
            for stop in range(len(sums))
        ]
        totals = [total for total, _ in best]
        starts.append([start for _, start in best])
    cuts = [len(sums) - 1]
    for level in reversed(starts):
        cuts.append(level[cuts[-1]])
    return totals[-1], cuts[::-1]


@torch.enable_grad()
def measure(units: Sequence[nn.Module], example: Batch) -> list[float]:
    """Median seconds of forward and backward of each unit in train mode; their gradients are set to None."""
    costs, carried = [], any(getattr(unit, "carries", False) for unit in units)
    value = list_tensors(example)[0].detach()
    for number, unit in enumerate(units):
        unit.train()
        value.requires_grad_(number > 0 and (value.is_floating_point() or value.is_complex()))
        seconds = []
        for _ in range(_REPEATS + 1):
            x = value.clone()  # for units that write into what they get
            start = _read_clock(x)
            output = unit(x, example) if carried else unit(x)
            if output.requires_grad:
                output.backward(torch.ones_like(output))
            seconds.append(_read_clock(x) - start)
        unit.zero_grad()
        value = output.detach()
        costs.append(statistics.median(seconds[1:]))  # the first one warms up
    return costs


def _read_clock(x: Tensor) -> float:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter()


def _blocks(modules: list[nn.Module], model: nn.Module, example: Batch) -> Blocks:
    """Return the blocks; what their one forward does to the example and to the model's buffers is undone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    blocks = Blocks(modules, clone_batch(example))
    for buffer, value in before:
        if not torch.equal(buffer, value):
            buffer.copy_(value)
    return blocks
