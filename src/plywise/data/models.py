"""Calls a model with a batch, and finds scores and loss in its output."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from plywise.data.batches import TARGETS, Batch
from plywise.engine.capture.masked_rows import use_found_mask
from plywise.errors import AddressError

Step = Callable[[nn.Module, Batch], Any]
"""A function of a model and a batch that returns a number: the loss to minimise, or a metric."""

NAN_HINT = (
    "Look for a logarithm, a root or a division in the model, for NaN in its weights, and for large inputs"
)
"""What to do if an untrained model gives NaN; data are checked when they are read."""

OUTPUTS = ("logits", "prediction_logits", "last_hidden_state", "sample", "out")
"""Attributes or keys of a model's output that may hold its scores; the first that exists does."""


def call_model(model: nn.Module, x: Batch, without: tuple[str, ...] = ()) -> Any:
    """Call a model with a batch's inputs: mappings by name, tuples by position, others as one argument.

    Of a mapping, entries that the forward does not take are left out, and so are those in ``without``. If the
    forward has no argument of that name, the only entry of a mapping is passed by position. Where the mapping
    has an ``attention_mask`` (N, T), positions where it is 0 are left out of rules' statistics
    (`plywise.rows`).

    Raises:
        PlywiseError: the forward takes none of the entries.
    """
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return model(*x)
    if not isinstance(x, Mapping):
        return model(x)
    given = {name: value for name, value in x.items() if name not in without}
    mask = find_mask(x)
    with nullcontext() if mask is None else use_found_mask(mask):
        taken = _find_taken(model, given)
        if taken:
            return model(**taken)
        if len(given) == 1:
            return model(next(iter(given.values())))
    raise AddressError(
        f"{type(model).__name__} takes none of the entries {', '.join(map(str, x))} by name. Call them as "
        "its forward does, or give --step with a function step(model, batch) that calls it."
    )


def find_mask(x: Batch) -> Tensor | None:
    """Find the mask of the positions that count, (N, T), if the inputs of a batch have one."""
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _find_taken(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return dict(given)
    names = {one.name for one in parameters if one.kind is not one.VAR_POSITIONAL}
    return {name: value for name, value in given.items() if name in names}


def find_scores(output: Any) -> Any:
    """Find the scores in an output: ``.logits`` or another of `OUTPUTS`, the first of a tuple, or itself.

    A first entry without dimensions is skipped: it is a loss, which some models return before their scores.
    """
    if isinstance(output, Tensor):
        return output
    entries = _list_entries(output)
    for name in OUTPUTS:
        if isinstance(entries.get(name), Tensor):
            return entries[name]
    tensors = [value for value in entries.values() if isinstance(value, Tensor) and value.dim()]
    return tensors[0] if tensors else output


def find_loss(output: Any) -> Tensor | None:
    """Find the loss that a model returns: ``.loss``, a number at the start of a tuple, or a single number."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else None
    entries = _list_entries(output)
    loss = entries.get("loss", entries.get("0"))
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _list_entries(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", map(str, range(len(output))))
        return dict(zip(names, output, strict=True))
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return dict(getattr(output, "__dict__", {}))


def get_own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that the model itself computes from inputs and targets; a step function.

    Raises:
        PlywiseError: the model returned no loss.
    """
    loss = find_loss(call_model(model, batch))
    if loss is None:
        raise AddressError(f"{type(model).__name__} returned no loss.")
    return loss


def compute_own_error(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the error rate of a classifier that takes the targets (N,) with its inputs."""
    y: Tensor = next(batch[name] for name in TARGETS if name in batch)
    scores: Tensor = find_scores(call_model(model, batch))
    return scores.argmax(1).ne(y).float().mean()


class ScoresModel(nn.Module):
    """A model whose inputs may be any batch, and whose output is one tensor, the scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Batch) -> Any:
        """Compute the scores of the inputs."""
        return find_scores(call_model(self.model, x, TARGETS))


class StepModel(nn.Module):
    """A model whose forward is a step function: it returns the loss of a batch; in eval mode loss and metric.

    With it, code that trains on a loss of the output can also train with a step function.
    """

    def __init__(self, model: nn.Module, step: Step, metric: Step | None = None) -> None:
        super().__init__()
        self.model = model
        self._step, self._metric = step, metric

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch, and in eval mode also the metric."""
        loss = _read_number(self._step(self.model, batch), self._step)
        if self.model.training:
            return loss
        metric = loss if self._metric is None else _read_number(self._metric(self.model, batch), self._metric)
        return torch.stack([loss, metric.to(loss)])


def _read_number(value: Any, function: Step) -> Tensor:
    value = torch.as_tensor(value) if isinstance(value, int | float) else value
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    found = (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
    raise AddressError(
        f"{getattr(function, '__name__', 'The step function')} returned {found}; it must return one number, "
        "the mean over the batch."
    )


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model of the user."""
    return model.model if isinstance(model, ScoresModel | StepModel) else model
