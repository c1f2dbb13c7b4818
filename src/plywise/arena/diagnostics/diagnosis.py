"""Examines a model's layers for a few batches: their backward values and their inputs."""

import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from plywise.arena.diagnostics.covariance import Inputs
from plywise.arena.diagnostics.layer_record import LayerRecord, euclidean_norm
from plywise.arena.task import Judge
from plywise.arena.workload import Workload
from plywise.data.batches import Batch, count_samples, endless_batches
from plywise.data.models import NAN_HINT, unwrap_model
from plywise.data.parts import Data
from plywise.engine.call import LinearCall
from plywise.engine.selection import collect_parameters
from plywise.errors import BenchError, DataError, PlywiseError
from plywise.rules.backprop import Backprop

BATCHES = 8
"""Batches looked at, by default."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """The measurements of one layer that a rule could handle.

    What was not seen is None: a layer that no loss reaches, or a frozen one below which nothing trains.

    Attributes:
        name: qualified name in the model.
        type: class name.
        inputs: features that one output reads, d.
        outputs: outputs, all groups.
        parameters: numbers in its weight and bias.
        trains: whether its weight is trained.
        uses: calls in a forward pass, on average.
        rows: rows of A that a sample gives in one call: 1 for a linear layer of plain features, positions for
            a convolution.
        backward: root mean square of the backward value: the gradient of the batch's mean loss at the layer's
            output.
        backward_to_last: norm of the backward value of one sample, over all its positions and outputs, over
            that of the last layer; unlike the root mean square it is alike in layers of any shape.
        silent: share of its outputs at which that gradient was exactly 0 for every row of every batch. Their
            weights learn nothing.
        rate: norm of a plain step at rate 1 over the norm of the weight, root mean square over the batches.
        noise: share of a batch's squared gradient norm that differs from batch to batch, 0 to 1; None for
            one batch.
        read: its inputs.
    """

    name: str
    type: str
    inputs: int
    outputs: int
    parameters: int
    trains: bool
    uses: float
    rows: float | None
    backward: float | None
    backward_to_last: float | None
    silent: float | None
    rate: float | None
    noise: float | None
    read: Inputs | None


@dataclass(frozen=True)
class Left:
    """A module with parameters that no rule handles, and why."""

    name: str
    type: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """The measurements of a model over a few batches. `dataclasses.asdict` of it is JSON.

    Attributes:
        model: class name of the model.
        parameters: numbers in all its parameters.
        batches: batches looked at.
        batch_size: samples in the largest one.
        loss: mean loss over the batches; None if no layer could be looked at.
        layers: from the first to the last one that a backward pass met; after them those that none did.
        left: modules with parameters that no rule handles.
        backward_ratio: norm of a sample's backward value at the last layer over that at the first one: above
            1 they shrink on their way down.
        rate_spread: the largest effective rate of a trained layer over the smallest one above 0.
    """

    model: str
    parameters: int
    batches: int
    batch_size: int
    loss: float | None
    layers: tuple[LayerDiagnosis, ...]
    left: tuple[Left, ...]
    backward_ratio: float | None
    rate_spread: float | None


def diagnose(
    model: nn.Module, loss: Judge, batches: Iterable[tuple[Batch, Batch]], *, seed: int = 0
) -> Diagnosis:
    """Examine a model's layers for a few batches. Nothing is trained.

    A copy of the model is examined, in the model's present mode. The model's buffers, gradients and hooks do
    not change, and neither does the random state. This takes twice the memory of the model in addition, for
    the copy and for a sum of gradients.

    Args:
        model: any model; it takes a batch's x.
        loss: outputs and targets to the mean loss, a scalar.
        batches: pairs (x, y) on the model's device, each a tensor (B, ...) or such in any nesting.
        seed: of what is random in the forward pass.

    Raises:
        PlywiseError: there is no batch, nothing trains, a loss or a value inside is not finite, or the model
            cannot be copied.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
        >>> found = diagnose(model, nn.functional.mse_loss, [(x, torch.zeros(4, 1))])
        >>> found.layers[0].read.condition
        4.0
    """
    network = _copy(getattr(model, "_orig_mod", model))
    own = unwrap_model(network)
    layers = _find_layers(own)
    records = {name: LayerRecord(module) for name, module, reason in layers if not reason}
    kept = list(batches)
    if not kept:
        raise BenchError("A diagnosis needs one batch at least; there is none.")
    devices = sorted({p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"})
    losses: list[float] = []
    if records:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            losses = _watch(network, own, loss, kept, records)
    mean = statistics.fmean(losses) if losses else None
    return _summarize(own, layers, records, [count_samples(x) for x, _ in kept], mean)


def diagnose_workload(
    workload: Workload, data: Data, *, batches: int = BATCHES, batch_size: int | None = None, seed: int = 0
) -> Diagnosis:
    """`diagnose` for a workload: a fresh model in training mode, batches of the training part.

    Args:
        workload: model, loss and batch size.
        data: its data.
        batches: how many batches.
        batch_size: samples a batch. Default: the workload's.
        seed: of weights and batches.

    Example:
        >>> from plywise.arena.workloads import find_workload
        >>> digits = find_workload("digits-mlp")
        >>> [layer.name for layer in diagnose_workload(digits, digits.make_data(), batches=1).layers]
        ['0', '2', '4', '6']
    """
    size = workload.batch_size if batch_size is None else batch_size
    if batches < 1 or size < 1:
        raise BenchError(f"Batches and samples a batch are 1 at least, not {batches} and {size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = workload.make_model()
    drawn = islice(endless_batches(data.train, size, seed), batches)
    return diagnose(model, workload.task.loss, drawn, seed=seed)


def layer_series(diagnosis: Diagnosis) -> dict[str, list[Any]]:
    """A diagnosis as the ``layers`` of a bench's report: names, and a number for each by what it is."""
    seen = [layer for layer in diagnosis.layers if layer.uses]
    read = [layer.read for layer in seen]
    return {
        "names": [layer.name or layer.type for layer in seen],
        "backward value": [layer.backward for layer in seen],
        "effective rate": [layer.rate for layer in seen],
        "condition of inputs": [one.condition if one else None for one in read],
        "effective rank of inputs": [one.effective_rank if one else None for one in read],
        "noise of the gradient": [layer.noise for layer in seen],
    }


def layers_before(workload: Workload, data: Data) -> dict[str, Any]:
    """Return a workload's layers before training, as a bench's description keeps them under ``layers``.

    Where they cannot be looked at, ``layers`` is None and ``unseen`` says why: that is no reason not to
    train, and training will name what is wrong.
    """
    try:
        return {"layers": layer_series(diagnose_workload(workload, data))}
    except Exception as error:
        return {"layers": None, "unseen": f"{type(error).__name__}: {str(error).split('. ')[0].rstrip('.')}"}


# ---- measuring -------------------------------------------------------------------------------------


def _find_layers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Name, module and, for those that are not looked at, the reason, of each module with parameters."""
    found: dict[str, tuple[str, nn.Module, str]] = {}
    for entry in collect_parameters(model, frozenset(("linear", "conv"))):
        for path, ref, _ in entry.owners:
            module = ref()
            assert module is not None
            looked_at = entry.attribute == "weight" and entry.expected and not entry.excluded
            reason = "" if looked_at else entry.excluded or "it is not a linear layer or convolution of torch"
            if path not in found or not reason:
                found[path] = path, module, reason
    return list(found.values())


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)  # without hooks of plywise: a rule at work is not in the way
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).split('. ')[0]}"
        raise BenchError(
            f"This {type(model).__name__} cannot be copied ({why}), and a diagnosis looks at a copy, so that "
            "your model stays as it is. Diagnose a fresh one, before its first forward pass."
        ) from error


def _watch(
    model: nn.Module,
    own: nn.Module,
    loss: Judge,
    batches: Sequence[tuple[Batch, Batch]],
    records: dict[str, LayerRecord],
) -> list[float]:
    """Forward and backward for each batch, recorded layer by layer; the losses."""

    def record(call: LinearCall, *_: Any) -> None:
        if call.name not in records:
            return
        if not records[call.name].calls:
            records[call.name].place = -sum(one.calls > 0 for one in records.values())
        records[call.name].add(call)

    losses = []
    rule = Backprop().attach(own)
    with rule.observing(record):
        for number, (x, y) in enumerate(batches, 1):
            value = loss(model(x), y)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise DataError(
                    f"The loss of batch {number} is {losses[-1]} before any training. {NAN_HINT}."
                )
            trained = [p for p in model.parameters() if p.requires_grad]
            if not (trained and value.requires_grad):
                raise PlywiseError(
                    f"Nothing in this {type(model).__name__} trains: the loss depends on no parameter with "
                    "requires_grad=True."
                )
            # nothing arrives in .grad
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
            reached = {id(p) for p, gradient in zip(trained, gradients, strict=True) if gradient is not None}
            for one in records.values():
                one.end_batch(reached)
    return losses


# ---- summary -------------------------------------------------------------------------------------


def _summarize(
    model: nn.Module,
    found: list[tuple[str, nn.Module, str]],
    records: dict[str, LayerRecord],
    sizes: list[int],
    loss: float | None,
) -> Diagnosis:
    reasons = {name: reason for name, _, reason in found if reason} | _find_uses_without_calls(records)
    seen = sorted((name for name in records if records[name].calls), key=lambda name: records[name].place)
    names = [*seen, *(name for name in records if name not in seen and name not in reasons)]
    last = records[seen[-1]].norm() if seen else None
    layers = tuple(_summarize_layer(name, records[name], len(sizes), last) for name in names)
    first = records[seen[0]].norm() if seen else None
    rates = [layer.rate for layer in layers if layer.rate]
    return Diagnosis(
        model=type(model).__name__,
        parameters=_count_parameters(model.parameters()),
        batches=len(sizes),
        batch_size=max(sizes),
        loss=loss,
        layers=layers,
        left=tuple(
            Left(
                name,
                type(module).__name__,
                _count_parameters(module.parameters(recurse=False)),
                reasons[name],
            )
            for name, module, _ in found
            if name in reasons
        ),
        backward_ratio=last / first if first and last else None,
        rate_spread=max(rates) / min(rates) if rates else None,
    )


def _find_uses_without_calls(records: dict[str, LayerRecord]) -> dict[str, str]:
    """Layers that were not called, nor a layer that shares their weight, but got a gradient; and why."""
    called = {id(record.weight) for record in records.values() if record.calls}
    why = "its weight is used without calling the layer"
    return {
        name: why for name, record in records.items() if record.reached and id(record.weight) not in called
    }


def _summarize_layer(name: str, record: LayerRecord, batches: int, last: float | None) -> LayerDiagnosis:
    module, weight = record.module, record.weight
    own = record.norm()
    lazy = nn.parameter.is_lazy(weight)
    size = 0.0 if lazy else euclidean_norm(weight.detach())
    norm = math.sqrt(statistics.fmean(n**2 for n in record.norms)) if record.norms else None
    return LayerDiagnosis(
        name=name,
        type=type(module).__name__,
        inputs=0 if lazy else record.width or weight[0].numel(),
        outputs=0 if lazy else weight.shape[0],
        parameters=_count_parameters(module.parameters(recurse=False)),
        trains=weight.requires_grad,
        uses=record.calls / batches,
        rows=record.rows / record.samples if record.samples else None,
        backward=math.sqrt(record.squares / record.entries) if record.entries else None,
        backward_to_last=own / last if own is not None and last else None,
        silent=None if record.has_gradient is None else 1 - float(record.has_gradient.float().mean()),
        rate=norm / size if norm is not None and size else None,
        noise=record.noise(),
        read=record.covariance.summarize(),
    )


def _count_parameters(parameters: Iterable[Any]) -> int:
    return sum(p.numel() for p in parameters if not nn.parameter.is_lazy(p))
