"""A look at a model's layers for a few batches: what each of them is asked for, and what it reads."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from plywise.arena.diagnose.covariance import MOST_GROUPS, Covariance, Inputs
from plywise.arena.task import Judge
from plywise.arena.workload import Workload
from plywise.data.batches import endless_batches
from plywise.data.parts import Data
from plywise.engine.call import LinearCall
from plywise.engine.selection import collect_parameters
from plywise.errors import PlywiseError
from plywise.rules.backprop import Backprop

BATCHES = 8
"""Batches looked at, by default."""
MOST_ROWS = 1024
"""Rows of a layer's inputs that one batch adds to the covariance; a convolution has thousands of them."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """What was seen of one layer that a rule could handle.

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
        silent: share of its outputs at which that gradient was exactly 0 for every row of every batch: what
            feeds them learns nothing from them.
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
    """What a few batches showed. `dataclasses.asdict` of it is JSON.

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
    model: nn.Module, loss: Judge, batches: Iterable[tuple[Tensor, Tensor]], *, seed: int = 0
) -> Diagnosis:
    """Look at a model's layers for a few batches. Nothing is trained.

    A copy of the model is looked at, in the mode that the model is in: its buffers, gradients and hooks stay
    as they are, and so does the random state. That costs the memory of the model twice more, for the copy and
    for a sum of gradients.

    Args:
        model: any model; it takes a batch's x.
        loss: outputs and targets to the mean loss, a scalar.
        batches: pairs (x, y), x (B, ...), on the model's device.
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
    network = _copied(getattr(model, "_orig_mod", model))
    layers = _find_layers(network)
    looks = {name: _Look(module) for name, module, reason in layers if not reason}
    kept = list(batches)
    if not kept:
        raise PlywiseError("A diagnosis needs one batch at least; there is none.", see="error-bench")
    devices = sorted({p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"})
    losses: list[float] = []
    if looks:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            losses = _watch(network, loss, kept, looks)
    mean = statistics.fmean(losses) if losses else None
    return _told(network, layers, looks, [len(x) for x, _ in kept], mean)


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
        raise PlywiseError(
            f"Batches and samples a batch are 1 at least, not {batches} and {size}.", see="error-bench"
        )
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
    """What a bench's description tells of a workload's layers before training, as ``layers``.

    Where they cannot be looked at, ``layers`` is None and ``unseen`` says why: that is no reason not to
    train, and training will name what is wrong.
    """
    try:
        return {"layers": layer_series(diagnose_workload(workload, data))}
    except Exception as error:
        return {"layers": None, "unseen": f"{type(error).__name__}: {str(error).split('. ')[0].rstrip('.')}"}


# ---- looking -------------------------------------------------------------------------------------


def _find_layers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Name, module and, for those that are not looked at, the reason, of each module with parameters."""
    found: dict[str, tuple[str, nn.Module, str]] = {}
    for entry in collect_parameters(model, frozenset(("linear", "conv"))):
        for path, ref in entry.owners:
            module = ref()
            assert module is not None
            looked_at = entry.attribute == "weight" and entry.expected and not entry.excluded
            reason = "" if looked_at else entry.excluded or "it is no linear layer or convolution of torch"
            if path not in found or not reason:
                found[path] = path, module, reason
    return list(found.values())


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)  # without hooks of plywise: a rule at work is not in the way
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).split('. ')[0]}"
        raise PlywiseError(
            f"This {type(model).__name__} cannot be copied ({why}), and a diagnosis looks at a copy, so that "
            "your model stays as it is. Diagnose a fresh one, before its first forward pass.",
            see="error-bench",
        ) from error


def _watch(
    model: nn.Module, loss: Judge, batches: Sequence[tuple[Tensor, Tensor]], looks: dict[str, _Look]
) -> list[float]:
    """Forward and backward for each batch, under the eyes of the looks; the losses."""

    def look(call: LinearCall, *_: Any) -> None:
        if call.name not in looks:
            return
        if not looks[call.name].calls:
            looks[call.name].place = -sum(one.calls > 0 for one in looks.values())
        looks[call.name].see(call)

    losses = []
    rule = Backprop().attach(model)
    with rule.observing(look):
        for number, (x, y) in enumerate(batches, 1):
            value = loss(model(x), y)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise PlywiseError(
                    f"The loss of batch {number} is {losses[-1]}: look for NaN or infinity in the data, and "
                    "at the size of the weights.",
                    see="error-data",
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
            for one in looks.values():
                one.end_batch(reached)
    return losses


class _Look:
    """What is gathered about one layer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.width = 0
        self.calls, self.place = 0, 0
        self.rows = self.samples = self.entries = 0
        self.squares, self.reached = 0.0, False
        self.heard: Tensor | None = None
        self.covariance = Covariance()
        self.gradient: Tensor | None = None  # of this batch: one layer may be called several times
        self.gradients: Tensor | None = None  # their sum over the batches
        self.norms: list[float] = []

    @property
    def weight(self) -> Tensor:
        """The layer's weight, which a lazy layer makes in its first forward."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    def see(self, call: LinearCall) -> None:
        """One call's problem."""
        delta = call.delta.detach()
        self.calls += 1
        self.rows, self.samples = self.rows + call.row_count, self.samples + call.samples
        self.entries += delta.numel()
        self.squares += _norm(delta) ** 2
        heard = call.map.bias_gradient(delta.abs()) != 0
        self.width = call.width
        self.heard = heard if self.heard is None else self.heard | heard
        self.covariance.add(self._sampled_rows(call))
        if self.weight.requires_grad:
            gradient = call.weight_gradient(delta).detach().to(call.dtype)
            self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def _sampled_rows(self, call: LinearCall) -> Tensor:
        """Some of the rows, (g, n, d); never are those of all samples made if there are too many."""
        positions = max(1, call.row_count // max(1, call.samples))
        a = call.a if call.a.dim() > 1 else call.a[None]
        rows = call.map.rows(a[: max(1, MOST_ROWS // positions)].detach())
        return rows[:MOST_GROUPS, :: math.ceil(rows.shape[1] / MOST_ROWS) or 1]

    def end_batch(self, reached: set[int]) -> None:
        """The batch's gradient is complete; ``reached`` are the parameters that have one."""
        self.reached |= id(self.weight) in reached
        if self.gradient is not None:
            self.norms.append(_norm(self.gradient))
            self.gradients = self.gradient if self.gradients is None else self.gradients + self.gradient
            self.gradient = None

    def norm(self) -> float | None:
        """Norm of a sample's backward value."""
        return math.sqrt(self.squares / self.samples) if self.samples else None

    def noise(self) -> float | None:
        """Share of a gradient's mean square norm that is its variance, estimated without bias."""
        count = len(self.norms)
        if count < 2 or self.gradients is None or not any(self.norms):
            return None
        whole = statistics.fmean(norm**2 for norm in self.norms)
        mean = (_norm(self.gradients) / count) ** 2
        return min(1.0, max(0.0, whole - mean) * count / (count - 1) / whole)


def _norm(tensor: Tensor) -> float:
    """Euclidean norm; tiny gradients do not underflow on the way."""
    tensor = tensor.float()
    largest = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
    return float(largest) * float(torch.linalg.vector_norm(tensor / largest)) if float(largest) else 0.0


# ---- telling -------------------------------------------------------------------------------------


def _told(
    model: nn.Module,
    layers_: list[tuple[str, nn.Module, str]],
    looks: dict[str, _Look],
    sizes: list[int],
    loss: float | None,
) -> Diagnosis:
    reasons = {name: reason for name, _, reason in layers_ if reason} | _apart(looks)
    seen = sorted((name for name in looks if looks[name].calls), key=lambda name: looks[name].place)
    names = [*seen, *(name for name in looks if name not in seen and name not in reasons)]
    last = looks[seen[-1]].norm() if seen else None
    layers = tuple(_layer(name, looks[name], len(sizes), last) for name in names)
    first = looks[seen[0]].norm() if seen else None
    rates = [layer.rate for layer in layers if layer.rate]
    return Diagnosis(
        model=type(model).__name__,
        parameters=_count(model.parameters()),
        batches=len(sizes),
        batch_size=max(sizes),
        loss=loss,
        layers=layers,
        left=tuple(
            Left(name, type(module).__name__, _count(module.parameters(recurse=False)), reasons[name])
            for name, module, _ in layers_
            if name in reasons
        ),
        backward_ratio=last / first if first and last else None,
        rate_spread=max(rates) / min(rates) if rates else None,
    )


def _apart(looks: dict[str, _Look]) -> dict[str, str]:
    """Layers whose weight got a gradient though nobody called them, nor a layer that shares it; and why."""
    called = {id(look.weight) for look in looks.values() if look.calls}
    why = "its weight is used without calling the layer"
    return {name: why for name, look in looks.items() if look.reached and id(look.weight) not in called}


def _layer(name: str, look: _Look, batches: int, last: float | None) -> LayerDiagnosis:
    module, weight = look.module, look.weight
    own = look.norm()
    lazy = nn.parameter.is_lazy(weight)
    size = 0.0 if lazy else _norm(weight.detach())
    norm = math.sqrt(statistics.fmean(n**2 for n in look.norms)) if look.norms else None
    return LayerDiagnosis(
        name=name,
        type=type(module).__name__,
        inputs=0 if lazy else look.width or weight[0].numel(),
        outputs=0 if lazy else weight.shape[0],
        parameters=_count(module.parameters(recurse=False)),
        trains=weight.requires_grad,
        uses=look.calls / batches,
        rows=look.rows / look.samples if look.samples else None,
        backward=math.sqrt(look.squares / look.entries) if look.entries else None,
        backward_to_last=own / last if own is not None and last else None,
        silent=None if look.heard is None else 1 - float(look.heard.float().mean()),
        rate=norm / size if norm is not None and size else None,
        noise=look.noise(),
        read=look.covariance.told(),
    )


def _count(parameters: Iterable[Any]) -> int:
    return sum(p.numel() for p in parameters if not nn.parameter.is_lazy(p))
