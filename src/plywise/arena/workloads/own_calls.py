"""Finds how to call a user's model: plainly, for its scores, for its own loss, or by a step function."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plywise._util.modes import evaluating
from plywise.arena.task import Judge, Task, step_loss, step_metric
from plywise.data.batches import TARGETS, Batch, Part, clone_batch, list_tensors
from plywise.data.models import (
    ScoresModel,
    StepModel,
    call_model,
    compute_own_error,
    find_loss,
    find_scores,
    get_own_loss,
)
from plywise.errors import AddressError, PlywiseError
from plywise.registry.resolve import make_model, resolve_function

PLAIN, SCORES, STEP = "", "scores", "step"
OWN_LOSS, OWN_ERROR = "own loss", "own loss and classes"
"""Ways to call a model. With `OWN_ERROR` its scores are of classes, and it is judged by the error rate."""
GIVE_LOSS = (STEP, OWN_LOSS, OWN_ERROR)
"""Ways in which the model's output is a loss."""


def find_calls(network: nn.Module, train: Part, step: str, loss: str) -> str:
    """Return how a model is to be called with these data, tried on two samples, or on a batch of a stream.

    Args:
        network: the model. It stays as it is.
        train: training samples.
        step: the address of a step function; it decides.
        loss: the address of a loss of outputs and targets: the model's own loss is not asked for.
    """
    if step:
        return STEP
    x, _ = next(iter(train.chunks(2)))
    if not isinstance(x, Tensor):
        wants_targets = isinstance(x, Mapping) and any(name in x for name in TARGETS) and not loss
        return _find_own_loss(network, x) if wants_targets else SCORES
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(network):
            return PLAIN if isinstance(network(x.clone()), Tensor) else SCORES
    except Exception:  # what fails is said by the check that follows
        return PLAIN


def _find_own_loss(network: nn.Module, x: Mapping[str, Any]) -> str:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(network):
            output = call_model(network, clone_batch(x))
    except Exception:
        return SCORES
    if find_loss(output) is None:
        return SCORES
    scores, y = find_scores(output), next(x[name] for name in TARGETS if name in x)
    is_classes = isinstance(scores, Tensor) and scores.dim() == 2 and y.dim() == 1
    return OWN_ERROR if is_classes and not y.is_floating_point() else OWN_LOSS


def make_called(address: str, calls: str, step: str = "", metric: str = "") -> nn.Module:
    """Make the user's model, wrapped so that it takes a batch's inputs and returns one tensor.

    Args:
        address: ``module:name`` of the function that makes it.
        calls: one of the ways above.
        step: ``module:name`` of the step function.
        metric: ``module:name`` of the metric: of a model and a batch with a step function, of outputs and
            targets where the model returns its own loss.

    Raises:
        PlywiseError: one of them cannot be had.
    """
    return wrap_model(make_model(address), calls, step, metric)


def wrap_model(network: nn.Module, calls: str, step: str = "", metric: str = "") -> nn.Module:
    """`make_called` for a model that is there."""
    if calls == SCORES:
        return ScoresModel(network)
    if calls == STEP:
        judge = resolve_function(metric, "your metric") if metric else None
        return StepModel(network, resolve_function(step, "your step"), judge)
    if calls in GIVE_LOSS:
        judge = partial(judge_scores, resolve_function(metric, "your metric")) if metric else None
        return StepModel(network, get_own_loss, judge or (compute_own_error if calls == OWN_ERROR else None))
    return network


def judge_scores(judge: Judge, model: nn.Module, batch: Any) -> Tensor:
    """Convert a metric of outputs and targets into one of a model and a batch."""
    y = next(batch[name] for name in TARGETS if name in batch)
    return judge(find_scores(call_model(model, batch)), y)


def step_task(calls: str, metric: str) -> Task:
    """Return the task of a model that is called by a step function, or returns its own loss."""
    name = "error rate" if calls == OWN_ERROR else "loss"
    return Task(step_loss, step_metric, metric or name)


def check_step(address: str, network: nn.Module, train: Part) -> None:
    """Try a step function, or a model's own loss, on two samples or on a batch of a stream.

    Raises:
        PlywiseError: it fails, its loss depends on no parameter, or is not finite.
    """
    x, _ = next(iter(train.chunks(2)))
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.no_grad(), evaluating(network):
                numbers = network(clone_batch(x))
            loss = network(clone_batch(x)).reshape(-1)[0]
    except PlywiseError:
        raise
    except Exception as error:
        raise AddressError(
            f"{address} fails on a batch of {describe_batch(x)}: {type(error).__name__}: {error}."
        ) from error
    if not bool(torch.isfinite(numbers).all()):
        raise AddressError(
            f"{address}: loss and metric of a batch are {numbers.tolist()} before any training."
        )
    if not loss.requires_grad:
        raise AddressError(
            f"{address}: the loss of a batch depends on no parameter that trains. Return it as a tensor with "
            "its graph."
        )


def describe_batch(x: Batch) -> str:
    """Describe the tensors of a batch.

    Example:
        >>> describe_batch({"ids": torch.zeros(2, 7)})
        "{'ids': float32 (2, 7)}"
    """
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe_batch(value)}" for key, value in x.items()) + "}"
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in list_tensors(x))
