"""Sends a model's inputs along with a signal, as tensors and a form: a text that describes their nesting.

Nothing is unpickled and no class is made by its name: there are dicts, tuples, lists, numbers and text.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plywise.data.batches import Batch
from plywise.errors import PipelineError

BROKEN = "What a message from the stage before says of the model's inputs is broken."


def flatten_carried(batch: Batch) -> list[Tensor]:
    """Return the form of a batch, bytes, and its tensors; nothing for None.

    Raises:
        PipelineError: it holds what has no place in a message.
    """
    if batch is None:
        return []
    tensors: list[Tensor] = []
    text = json.dumps(_describe(batch, tensors)).encode()
    return [torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors]


def restore_carried(parts: list[Tensor]) -> Batch:
    """Inverse of `flatten_carried`.

    Raises:
        PipelineError: the form is broken, or does not fit the tensors.
    """
    if not parts:
        return None
    form, *tensors = parts
    try:
        return _build(json.loads(bytes(form.tolist())), tensors)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise PipelineError(BROKEN, see="pipeline-batch") from error


def _describe(batch: Batch, tensors: list[Tensor]) -> list[Any]:
    if isinstance(batch, Tensor):
        tensors.append(batch)
        return ["tensor", len(tensors) - 1]
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return ["dict", {key: _describe(value, tensors) for key, value in batch.items()}]
    if type(batch) in (tuple, list):
        return [type(batch).__name__, [_describe(value, tensors) for value in batch]]
    if batch is None or isinstance(batch, bool | int | float | str):
        return ["value", batch]
    raise PipelineError(
        f"The blocks carry the model's inputs along, and a {type(batch).__name__} among them does not go "
        "between stages: give the model's inputs as tensors in dicts (with names as keys), tuples or lists.",
        see="pipeline-batch",
    )


def _build(form: Any, tensors: list[Tensor]) -> Batch:
    kind, what = form
    if kind == "tensor" and 0 <= what < len(tensors):
        return tensors[what]
    if kind == "dict":
        return {key: _build(value, tensors) for key, value in what.items()}
    if kind in ("tuple", "list"):
        values = [_build(value, tensors) for value in what]
        return tuple(values) if kind == "tuple" else values
    if kind == "value":
        return what
    raise ValueError(kind)
