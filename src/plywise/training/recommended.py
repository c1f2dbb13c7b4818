"""Recommends an optimizer and a rule for a model and a batch, in one call.

The optimizer is Muon for hidden weights and AdamW for all others. The rule is `plywise.Coordinates` on the
layers where it is worth its time, which may be none: its cost depends on the weights, and that of forward and
backward on the rows of a batch as well. So layers with many rows are turned (those of transformers and
convolutions), and small networks are left to the optimizer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plywise._util.adamw import make_adamw
from plywise._util.checks import is_number, require_whole
from plywise._util.import_path import format_raised
from plywise._util.modes import evaluating
from plywise.data.batches import count_samples
from plywise.engine.explain import LayerRow, Size
from plywise.engine.rule import Rule, check_model
from plywise.engine.sharding import is_spread
from plywise.errors import AttachError, DataError, PlywiseError
from plywise.numerics.polar import count_operations
from plywise.optim.hidden_weights import find_hidden_weights, group_for_muon
from plywise.optim.muon import THREE_ITERATIONS, Muon
from plywise.rules.coordinates import Coordinates

RANKS = (64, 32, 16)
"""Numbers of directions to turn on wide sides, the best first."""

REFRESHES = (5, 10, 25)
"""Steps between two bases at the start, the best first."""

CALLS = 2.0**22
"""Operations of one core in 50 µs, the time of the calls in a small layer's plain step."""

TURN_CALLS = 2.0**23
"""Operations of one core in the time of the calls that turn a layer's gradient and its step."""

TURN_PASSES = 2.0**10
"""Operations of one core in the time of the passes over a weight that turn it, for each of its numbers."""

LITTLE_MORE = 1.2
"""Where even the cheapest settings exceed the budget, better ones may cost so much more."""

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
        price: extra time of a step for the coordinates, relative to forward and backward of the layers that
            the rule could take, as estimated from operations, calls, and passes over the weights.
        memory: extra bytes that the rule keeps.
        left: layers that the rule could handle but leaves to the optimizer, since they would cost too much.
            If that is all of them, the rule only guards the optimizer against gradients that are not finite.
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
        lines = [f"{type(self.optimizer).__name__}({numbers}). {self._explain_muon()}"]
        table = self.rule.explain()
        if not any(row.handled for row in table.rows):
            lines.append(
                "No layer is worth the time of coordinates: forward and backward take less. The rule skips "
                "steps whose gradients are not finite, and does nothing else."
            )
            return "\n".join(lines)
        lines.append(
            f"The coordinates take about {100 * self.price:.0f} % more time than forward and backward alone, "
            f"and {self.memory / 2**20:.1f} MiB of memory."
        )
        if self.left:
            lines.append(f"Too expensive for coordinates: {', '.join(self.left)}.")
        return "\n".join([*lines, table.format(warns=False)])  # layers are left out on purpose

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
    """Settings of the coordinates, the layers that are turned and those that are not, and the price."""

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

    Muon moves the hidden weights, in three iterations, and AdamW all other parameters. Layers where it is
    worth its time are turned: the optimizer works in the eigenbasis of the layer's inputs, whitened in part
    (`plywise.Coordinates`). That takes a time which depends on the weights alone, so layers with many rows in
    a batch are turned (those of transformers and convolutions), and often the output layer; small networks
    are left to the optimizer. Of wide layers only the leading directions are turned, as many as the budget
    allows. AdamW also moves hidden weights so wide that Muon's step would take more than six times their own
    operations. A model without hidden weights is turned as a whole.

    Args:
        model: the model.
        lr: the rate of both. Default 0.02, which suits them in these coordinates; plain AdamW usually needs a
            lower rate.
        batch: an input, or a tuple or dict of inputs, for two passes in evaluation mode, which show the sizes
            of convolutions, the rows of each layer, and which layer gives the output; they leave no gradient.
            Give one for transformers, whose layers have more rows than samples. Without it, layers of unknown
            size are turned, too, and the last layer among the modules is taken to give the output.
        batch_size: samples of the batches that it will be trained with. Default: those of ``batch``, or 128.
        budget: extra time for the coordinates, relative to forward and backward: of a layer that Muon moves
            relative to its own, of all others together relative to the model's. Default 0.5.
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
        AttachError: the model is not a module, or another rule handles it.
        DataError: the model fails on the batch.
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
    if not all(is_number(value) and value > 0 for value in (budget, lr)):
        raise ValueError(f"recommend: budget and lr must be positive, not {budget!r} and {lr!r}.")
    if batch_size is not None:
        require_whole("recommend", batch_size=batch_size)
    rows, hidden = _look(model, batch, batch_size)
    muon = _choose_muon(model, hidden, rows)
    plan = _choose(Coordinates(power, damping=damping), rows, set(muon), budget, is_all=not hidden)
    if not plan.taken and not muon:
        raise AttachError(
            f"recommend finds no layer of this {type(model).__name__} that fits a budget of {budget:g}: each "
            f"would take more. Allow more, recommend(..., budget={2 * budget:g}), or use AdamW as it is.",
            see="attach-no-layer",
        )
    optimizer = _make_optimizer(model, [weight for weight, _ in muon.values()], lr, weight_decay)
    left = tuple(row.name for row in plan.left)
    keys = [key for row in plan.left for key in row.keys]
    chosen: dict[str, Any] = {"exclude": keys or None} if plan.taken else {"layers": []}
    rule = plan.rule.attach(model, optimizer, on_nonfinite=on_nonfinite, **chosen)
    if batch is not None and plan.taken:
        with evaluating(model):
            _differentiate(model, batch)  # so that explain() knows each call
    memory = sum(plan.rule.estimate_cost(row.size)[1] for row in plan.taken if row.size is not None)
    muon_price = sum(operations for _, operations in muon.values()) / _count_plain(rows)
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
    rule = Coordinates()
    _attach(rule, model)
    try:
        hidden = find_hidden_weights(model, None if batch is None else lambda: _differentiate(model, batch))
        if any(parameter.is_complex() for parameter in model.parameters()):
            hidden = []  # torch's AdamW moves complex numbers, Muon's does not
        seen = None if batch is None else max(1, count_samples(batch))
        explained = rule.explain(batch_size or seen or 128).rows
        rows = [row for row in explained if row.handled]
        if not rows:
            raise _refuse(model, explained)
        more = 1.0 if seen is None else (batch_size or seen) / seen
        return [replace(row, size=_scale(row.size, more)) if row.passes else row for row in rows], hidden
    finally:
        rule.detach()


def _attach(rule: Rule, model: nn.Module) -> None:
    """Attach a rule to find what it could take, or say that this model needs no recommendation."""
    check_model(model, "recommend(model, batch=x)")
    try:
        rule.attach(model, make_adamw(list(model.parameters()) or [torch.zeros(0)], 1.0))
    except AttachError as error:
        if not error.page.endswith("attach-no-layer"):
            raise
        raise AttachError(
            f"recommend knows nothing better than AdamW for this {type(model).__name__}. {error}",
            see="attach-no-layer",
        ) from None


def _refuse(model: nn.Module, rows: Iterable[LayerRow]) -> AttachError:
    """Return the error for a model that has no layer for the rule, with the reason of its largest layer."""
    largest = max(rows, key=lambda row: row.parameters)
    trains = largest.parameters > 0
    why = f"it leaves {largest.name!r} alone: {largest.reason}" if trains else "none of its layers trains"
    return AttachError(
        f"recommend knows nothing better than AdamW for this {type(model).__name__}: {why}.",
        see="attach-no-layer",
    )


def _scale(size: Size | None, more: float) -> Size | None:
    """Return the size of a layer's problem in batches so many times as large."""
    return None if size is None else replace(size, n=max(1, round(size.n * more)))


def _run(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch, or raise DataError that says how it was called, and what it raised."""
    try:
        if isinstance(batch, Mapping):  # a tokenizer's encoding is one, and no dict
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    except PlywiseError:
        raise
    except Exception as error:
        stars = "**" if isinstance(batch, Mapping) else "*" if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"recommend calls this {type(model).__name__} as model({stars}batch), and it fails: "
            f"{format_raised(error)}. batch= takes a tensor of inputs, or a tuple or a dict of those that "
            "the forward takes: no targets, and no DataLoader."
        ) from error


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


def _choose(
    basis: Coordinates, rows: list[LayerRow], muon: set[str], budget: float, *, is_all: bool
) -> _Plan:
    """Choose the layers that are worth their time, or all, and the best settings that fit the budget."""
    rules = [replace(basis, rank=rank, refresh_every=every) for rank in RANKS for every in REFRESHES]
    taken = rows if is_all else _choose_layers(rules[-1], rows, muon, budget)
    left = [row for row in rows if row not in taken]
    prices = [(rule, _price(rule, taken, rows)) for rule in rules]
    limit = max(budget, LITTLE_MORE * prices[-1][1])
    rule, price = next(found for found in prices if found[1] <= limit)
    return _Plan(rule, taken, left, price)


def _choose_layers(rule: Coordinates, rows: list[LayerRow], muon: set[str], budget: float) -> list[LayerRow]:
    """Choose the layers to turn with these settings.

    Muon makes all directions of a step equally long by itself, so that a layer of its has to be cheap beside
    its own forward and backward. AdamW's layers gain more, and have to be cheap beside those of the model.
    """
    others = [row for row in rows if muon.isdisjoint(row.keys)]
    while others and _price(rule, others, rows) > budget:
        others.remove(max(others, key=lambda row: _count_turning(rule, row)))
    return [
        row
        for row in rows
        if row in others or (not muon.isdisjoint(row.keys) and _price(rule, [row], [row]) <= budget)
    ]


def _price(rule: Coordinates, taken: list[LayerRow], rows: list[LayerRow]) -> float:
    """Return the time that turning some layers takes, relative to forward and backward of these rows."""
    return sum(_count_turning(rule, row) for row in taken) / _count_plain(rows)


def _count_turning(rule: Coordinates, row: LayerRow) -> float:
    """Operations of one core in the time that turning a layer takes; none if its size is not known yet."""
    size = row.size
    if size is None:
        return 0.0
    return rule.estimate_cost(size)[0] + TURN_PASSES * size.g * size.m * size.d + TURN_CALLS


def _count_plain(rows: list[LayerRow]) -> float:
    """Operations of the plain step of these layers, their calls included."""
    return sum(row.size.plain + CALLS for row in rows if row.size is not None) or math.inf
