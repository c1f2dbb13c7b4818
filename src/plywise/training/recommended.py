"""Recommends an optimizer and a rule for a model and a batch, in one call.

The method is always Muon for hidden weights and AdamW for all others, in `plywise.Coordinates`. Layers,
numbers of directions, and the weights that Muon moves are chosen so that a step does not cost too much.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.adamw import make_adamw
from plywise._util.modes import evaluating
from plywise.data.batches import count_samples
from plywise.engine.explain import LayerRow, Size
from plywise.engine.rule import Rule
from plywise.engine.sharding import is_spread
from plywise.errors import AttachError
from plywise.numerics.polar import count_operations
from plywise.optim.hidden_weights import find_hidden_weights, group_for_muon
from plywise.optim.muon import THREE_ITERATIONS, Muon
from plywise.rules.coordinates import Coordinates

RANKS = (64, 32, 16)
"""Numbers of directions to turn on wide sides, the best first."""

REFRESHES = (5, 10, 25)
"""Steps between two bases at the start, the best first."""

CALLS = 2.0**21
"""Operations of one core in 60 µs, the time of the calls in a small layer's plain step."""

MUON_COST = 6.0
"""Most operations of Muon's step for a layer, relative to its forward and backward. Muon's are in large
products, and in bfloat16 from 96 rows on where the processor can: then six times the operations take two or
three times the time."""

BETAS = (0.9, 0.99)
"""Second moments over 100 steps: bases turn slowly, and older squares belong to older axes."""


@dataclass(frozen=True)
class Recommendation:
    """The choice of `recommend`; it unpacks as ``optimizer, rule = recommendation``.

    Attributes:
        optimizer: the optimizer, to be used as any other.
        rule: the rule, attached to the model.
        price: extra operations of a step for the coordinates, relative to forward and backward of the layers
            that the rule could take; small layers are counted by the time of their calls.
        memory: extra bytes that the rule keeps.
        left: layers that the rule could handle but leaves to the optimizer, since they would cost too much.
        muon: state-dict keys of the weights that Muon moves. AdamW moves all others.
        muon_price: operations of Muon's step, relative to the same.
    """

    optimizer: Optimizer
    rule: Rule
    price: float
    memory: float
    left: tuple[str, ...]
    muon: tuple[str, ...] = ()
    muon_price: float = 0.0

    def __iter__(self) -> Iterator[Any]:
        yield self.optimizer
        yield self.rule

    def explain(self) -> str:
        """Describe the choice, its cost, and what happens to each layer."""
        group = self.optimizer.param_groups[0]
        numbers = f"lr={group['lr']:g}, weight_decay={group['weight_decay']:g}"
        lines = [
            f"{type(self.optimizer).__name__}({numbers}) in the coordinates of the rule below.",
            f"The coordinates take {100 * self.price:.0f} % more operations a step than plain AdamW and "
            f"{self.memory / 2**20:.1f} MiB of memory; small layers take longer than that, by calls.",
            self._explain_muon(),
        ]
        if self.left:
            lines.append(f"Too expensive for the budget, left to the optimizer: {', '.join(self.left)}.")
        return "\n".join([*lines, str(self.rule.explain())])

    def _explain_muon(self) -> str:
        if not self.muon:
            return (
                "AdamW moves all parameters: hidden weights, which Muon could move, are spread over "
                "processes or too wide for it, or there are none."
            )
        first, others = self.muon[0], len(self.muon) - 1
        more = f" and {others} other{'s' * (others > 1)}" if others else ""
        return (
            f"Muon moves hidden weights, {first}{more}, which takes {100 * self.muon_price:.0f} % more "
            "operations; AdamW moves all other parameters."
        )


@dataclass(frozen=True)
class _Plan:
    """Settings that fit the budget, the layers that they are for, and the price."""

    rule: Coordinates
    taken: list[LayerRow]
    left: list[LayerRow]
    price: float


def recommend(
    model: nn.Module,
    lr: float = 0.02,
    *,
    batch: Any = None,
    batch_size: int | None = None,
    budget: float = 0.5,
    power: float = 0.25,
    damping: float = 1.0,
    weight_decay: float = 0.1,
    on_nonfinite: Literal["skip", "raise", "propagate"] = "skip",
) -> Recommendation:
    """Make an optimizer for a model, with a rule attached that fits its layers.

    Muon moves the hidden weights, in three iterations, and AdamW all other parameters, both in the eigenbasis
    of each layer's inputs, whitened in part (`plywise.Coordinates`). Of wide layers only the leading
    directions are turned, as many as the budget allows; layers that would not fit at all are not turned.
    AdamW also moves hidden weights so wide that Muon's step would take more than six times their own
    operations.

    Args:
        model: the model.
        lr: the rate of both. Default 0.02, which suits them in these coordinates; plain AdamW usually needs a
            lower rate.
        batch: an input, or a tuple or dict of inputs, for two passes in evaluation mode, which show the sizes
            of convolutions and which layer gives the output, and leave no gradient. Without it, layers of
            unknown size are handled, too, and the last layer among the modules is taken to give the output.
        batch_size: samples of the batches that it will be trained with. Default: those of ``batch``, or 128.
        budget: extra operations of a step for the coordinates, relative to forward and backward of the layers
            that train. Default 0.5.
        power: how far inputs are whitened, 0 to 0.5. Default 0.25. If you tune it, try 0, too: the best value
            depends on the data.
        damping: what is added to the eigenvalues before they are whitened, relative to their mean. Default
            1. The larger it is, the less is whitened. Low values may look good on one seed and fail on
            others. Range 0.1 to 10.
        weight_decay: decoupled decay. Default 0.1. The second number to tune, after the rate.
        on_nonfinite: what happens to a step whose gradients are not finite, as for `Rule.attach`: "skip",
            "raise" or "propagate". Default "skip".

    Returns:
        Optimizer and rule; `Recommendation.explain` says what was chosen, and why.

    Raises:
        AttachError: the model has no layer that a rule could take.
        ValueError: the budget or the rate is not positive, or another number is out of range.

    Source: the method's card, `plywise.Coordinates`; the choice is ours.

    Example:
        >>> import torch, plywise as pw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer, rule = pw.recommend(model, batch_size=32)
        >>> rule.rank
        64
        >>> rule.detach()
    """
    if not budget > 0 or not lr > 0:
        raise ValueError(f"recommend: budget and lr must be positive, not {budget!r} and {lr!r}.")
    rows, hidden = _look(model, batch, batch_size)
    plan = _choose(Coordinates(power, damping=damping), rows, budget)
    if not plan.taken:
        raise AttachError(
            f"recommend finds no layer of this {type(model).__name__} that fits a budget of {budget:g}: each "
            f"would take more. Allow more, recommend(..., budget={2 * budget:g}), or use AdamW as it is.",
            see="attach-no-layer",
        )
    muon = _choose_muon(model, hidden, rows)
    optimizer = _make_optimizer(model, [weight for weight, _ in muon.values()], lr, weight_decay)
    exclude = [row.name for row in plan.left]
    rule = plan.rule.attach(model, optimizer, exclude=exclude or None, on_nonfinite=on_nonfinite)
    if batch is not None:
        with evaluating(model):
            _differentiate(model, batch)  # so that explain() knows each call
    memory = sum(plan.rule.estimate_cost(row.size)[1] for row in plan.taken if row.size is not None)
    muon_price = sum(operations for _, operations in muon.values()) / _count_plain(rows)
    left = tuple(exclude)
    return Recommendation(optimizer, rule, plan.price, 4 * memory, left, tuple(muon), muon_price)


def _make_optimizer(
    model: nn.Module, hidden: list[nn.Parameter], lr: float, weight_decay: float
) -> Optimizer:
    """Muon for these weights and AdamW for all others; AdamW alone without any."""
    if not hidden:
        return make_adamw(model.parameters(), lr, betas=BETAS, weight_decay=weight_decay)
    return Muon(
        group_for_muon(model, hidden),
        lr,
        weight_decay,
        betas=BETAS,
        ns_coefficients=THREE_ITERATIONS,
        ns_steps=len(THREE_ITERATIONS),
        adjust_lr_fn="balanced",
    )


def _choose_muon(
    model: nn.Module, hidden: list[nn.Parameter], rows: list[LayerRow]
) -> dict[str, tuple[nn.Parameter, float]]:
    """Hidden weights that are not too wide for Muon, and the operations of its step, by state-dict key."""
    sizes = {key: row.size for row in rows for key in row.keys}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {}
    for weight in hidden:
        name = names[id(weight)]
        size, operations = sizes.get(name), _count_muon(weight)
        fits = size is None or operations <= MUON_COST * (size.plain + CALLS)
        if fits and not is_spread(weight):
            chosen[name] = weight, operations
    return chosen


def _count_muon(weight: Tensor) -> float:
    """Operations of Muon's iterations on a weight, in the order that takes more of them."""
    small, large = sorted((len(weight), weight.numel() // max(1, len(weight))))
    return count_operations(small, large, len(THREE_ITERATIONS))


def _look(model: nn.Module, batch: Any, batch_size: int | None) -> tuple[list[LayerRow], list[nn.Parameter]]:
    """Find the layers that the rule can handle, with the sizes of their problems, and the hidden weights."""
    rule = Coordinates().attach(model, make_adamw(model.parameters(), 1.0))
    try:
        hidden = find_hidden_weights(model, None if batch is None else lambda: _differentiate(model, batch))
        seen = None if batch is None else max(1, count_samples(batch))
        rows = [row for row in rule.explain(batch_size or seen or 128).rows if row.handled]
        more = 1.0 if seen is None else (batch_size or seen) / seen
        return [replace(row, size=_scale(row.size, more)) if row.passes else row for row in rows], hidden
    finally:
        rule.detach()


def _scale(size: Size | None, more: float) -> Size | None:
    """The size of a layer's problem in batches so many times as large."""
    return None if size is None else replace(size, n=max(1, round(size.n * more)))


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@torch.enable_grad()
def _differentiate(model: nn.Module, batch: Any) -> None:
    """Let a forward and a backward pass show the calls' sizes; no gradient is kept."""
    output = _run(model, batch)
    values = output.values() if isinstance(output, dict) else output
    values = values if isinstance(output, dict | tuple | list) else [output]
    sums = [value.sum() for value in values if isinstance(value, Tensor) and value.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sums:
        torch.autograd.grad(sums, parameters, allow_unused=True)


def _choose(basis: Coordinates, rows: list[LayerRow], budget: float) -> _Plan:
    """The best settings whose price is within the budget; with the cheapest, only the layers that fit."""
    rules = [replace(basis, rank=rank, refresh_every=every) for rank in RANKS for every in REFRESHES]
    plans = [_price(rule, rows) for rule in rules]
    fitting = [plan for plan in plans if plan.price <= budget]
    if fitting:
        return fitting[0]
    rule = plans[-1].rule
    taken, left = sorted(rows, key=lambda row: _price(rule, [row]).price), []
    while taken and _price(rule, rows, taken).price > budget:
        left.append(taken.pop())
    plan = _price(rule, rows, taken)
    return _Plan(rule, plan.taken, left, plan.price)


def _price(rule: Coordinates, rows: list[LayerRow], taken: list[LayerRow] | None = None) -> _Plan:
    """Return the cost of a rule on some of these layers, relative to the plain steps of all of them."""
    taken = rows if taken is None else taken
    plain = _count_plain(rows)
    extra = sum(rule.estimate_cost(row.size)[0] for row in taken if row.size is not None)
    return _Plan(rule, taken, [], extra / plain)


def _count_plain(rows: list[LayerRow]) -> float:
    """Operations of the plain step of these layers, their calls included."""
    return sum(row.size.plain + CALLS for row in rows if row.size is not None) or math.inf
