"""A user's own model and data as a workload, checked on two samples before any training."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plywise._util.modes import evaluating
from plywise.arena.task import (
    REGRESSION,
    WHOLE_SET,
    Judge,
    Task,
    WholeSetTask,
    choose_task,
    error_rate,
    token_cross_entropy,
)
from plywise.arena.workload import Workload
from plywise.arena.workloads.own_calls import (
    GIVE_LOSS,
    OWN_ERROR,
    OWN_LOSS,
    SCORES,
    STEP,
    check_step,
    describe_batch,
    find_calls,
    make_called,
    step_task,
    wrap_model,
)
from plywise.data.batches import Batch, Part, Split, clone_batch, count_samples, list_targets
from plywise.data.models import NAN_HINT, unwrap_model
from plywise.data.own_data import OwnData, explaining
from plywise.data.parts import Data
from plywise.data.reading import ReadOptions
from plywise.data.sources import Reading
from plywise.errors import AddressError, BlockError, CommandError, DataError, PlywiseError
from plywise.local.split import split
from plywise.registry.resolve import make_model, resolve_data, resolve_function

BATCH_SIZE, STEPS = 128, 1000
"""Defaults; a smaller training part is one batch."""
MOST_BLOCKS = 4
_EXAMPLE = 8


def own_workload(
    name: str,
    model: str,
    data: str | Data,
    *,
    read: str = "",
    loss: str = "",
    metric: str = "",
    step: str = "",
    batch_size: int | None = None,
    keep_batches: int | None = None,
    steps: int | None = None,
    blocks: int | None = None,
    folder: Path | None = None,
) -> Workload:
    """Return a workload of a user's model and data.

    The task follows from the targets: classes (N,), tokens (N, T), or floating-point numbers. Numbers (N,)
    and (N, 1) are converted to the shape of the model's output. A model that takes the targets with a dict of
    inputs and returns a loss is trained by that loss. The model is made and tried on two samples (or on a
    batch of a stream), in eval mode.

    Args:
        name: what to call it.
        model: ``module:name`` of a function that makes the network, a new one each time.
        data: where the data are (see `plywise.registry.resolve.resolve_data`), or data that have been read.
        read: how they are read, see `plywise.data.reading.ReadOptions.parse`; the rest is guessed.
        loss: ``module:name`` of a function (output, y) to a mean loss, a scalar; empty: the usual one.
        metric: ``module:name`` of the metric, the lower the better; empty: error rate or loss.
            With ``step`` a function (model, batch).
        step: ``module:name`` of a function (model, batch) to a mean loss, for models and batches that are
            called in another way; empty: as the batch shows.
        batch_size: samples a batch. Default 128, or all if there are fewer. A stream of batches has its own.
        keep_batches: batches that are kept of a stream. Default 1000.
        steps: steps of a run. Default 1000.
        blocks: blocks for local learners. Default: for classes 4, or as many as the model can be cut into;
            else 0.
        folder: where the batches of a stream are kept (see `plywise.data.sources.Reading`).

    Raises:
        PlywiseError: the data or the model cannot be had, or do not fit each other or the loss.
        BlockError: the model cannot be cut into ``blocks``.

    Example:
        >>> made_by = "plywise.arena.workloads.synthetic:make_model"
        >>> own_workload("mine", made_by, "quadratic").task.metric_name
        'mean squared error'
    """
    reading = Reading(ReadOptions.parse(read), bool(step), batch_size, keep_batches, folder)
    network = _make_network(model)  # before the data, which may take long
    if step and loss:
        raise CommandError("A step function gives the loss: leave --loss out.")
    found = resolve_data(data, reading) if isinstance(data, str) else OwnData(data, "read before")
    train = found.data.train
    with explaining(found.guesses):
        calls = find_calls(network, train, step, loss)
        called = wrap_model(network, calls, step, metric)
        if calls in GIVE_LOSS:
            check_step(step or model, called, train)
            fitting, classes = found.data, 0
        else:
            fitting, classes = _check_scores(called, model, found.data, loss, metric)
        example = clone_batch(next(iter(train.chunks(_EXAMPLE)))[0])
        return replace(
            make_checked_workload(
                name, model, fitting, loss=loss, metric=metric, step=step, calls=calls, classes=classes
            ),
            about=f"{model} on {data if isinstance(data, str) else 'data'}; {found.cut}{_say_how(calls)}.",
            batch_size=min(BATCH_SIZE, len(train)) if batch_size is None else batch_size,
            steps=STEPS if steps is None else steps,
            blocks=_blocks(called, example, classes, blocks),
            guesses=found.guesses,
        )


HOW = {
    SCORES: "the loss is made of the scores in the model's output",
    **dict.fromkeys(
        (OWN_LOSS, OWN_ERROR), "the loss is the one that the model returns (--loss names another)"
    ),
    STEP: "the loss is what the step function returns",
}
"""Descriptions of the ways to call a model."""


def _check_scores(network: nn.Module, model: str, data: Data, loss: str, metric: str) -> tuple[Data, int]:
    """Data that fit a model's scores, and the number of classes of samples or tokens (0 for other tasks)."""
    x, _ = next(iter(data.train.chunks(2)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        output = _output(network, model, clone_batch(x))
    fitting = _fitting(data, output)
    task = _task(fitting, loss, metric)
    _check_outputs(model, output, fitting, task, bool(loss))
    labels = _are_labels(_targets(fitting.train)) and output.dim() == 2
    labelled = labels or (task.loss is token_cross_entropy and output.dim() == 3)
    return fitting, output.shape[-1] if labelled else 0


def _say_how(calls: str) -> str:
    return f"; {HOW[calls]}" if calls else ""


def _targets(part: Part) -> Tensor:
    """Return the targets of a part, or of its first batches, where those of a stream are not of one shape."""
    if isinstance(part, Split):
        return part.y
    targets = next(iter(part.chunks(2)))[1]
    return targets if targets.dim() > 1 else torch.cat([y for _, y in part.chunks(2)])


def make_checked_workload(
    name: str,
    model: str,
    data: Data,
    *,
    loss: str = "",
    metric: str = "",
    step: str = "",
    calls: str = "",
    classes: int = 0,
) -> Workload:
    """Make a workload that `own_workload` has checked; the model is not made, and the data are not checked.

    Args:
        name: what to call it.
        model: as for `own_workload`.
        data: what the checked workload's ``make_data`` gave.
        loss: as for `own_workload`.
        metric: as for `own_workload`.
        step: as for `own_workload`.
        calls: of the checked workload.
        classes: of the checked workload.

    Raises:
        PlywiseError: loss or metric cannot be had.

    Example:
        >>> from plywise.arena.workloads.synthetic import make_data
        >>> make_checked_workload("mine", "module:model", make_data()).task.metric_name
        'mean squared error'
    """
    is_step = calls in GIVE_LOSS
    task = step_task(calls, metric) if is_step else _task(data, loss, metric)
    make = partial(make_called, model, calls, step, metric if is_step else "") if calls else None
    return Workload(
        name=name,
        about=f"{model}, checked before.",
        make_model=make or partial(make_model, model),
        make_data=lambda: data,
        task=task,
        classes=classes,
        calls=calls,
    )


def _make_network(address: str) -> nn.Module:
    """Make the user's network, and check that a second call makes another one."""
    with torch.random.fork_rng(devices=[]):
        first, second = (make_model(address) for _ in range(2))
    if not isinstance(second, nn.Module):
        raise AddressError(f"{address} returned a {type(second).__name__}, not a torch.nn.Module.")
    if first is second:
        raise AddressError(
            f"{address} returned the same network twice: each trial needs a new one, with its own weights. "
            "Make it inside the function."
        )
    if not any(parameter.requires_grad for parameter in second.parameters()):
        raise AddressError(f"{address} made a {type(second).__name__} without a parameter to train.")
    return second


def _output(network: nn.Module, address: str, x: Batch) -> Tensor:
    """Return the network's output for two samples, in eval mode; all modes are restored afterwards."""
    samples = count_samples(x)
    try:
        with evaluating(network):
            output = network(x)
    except PlywiseError:
        raise
    except Exception as error:
        is_plain = isinstance(x, Tensor)
        what = f"{x.dtype} and shape {tuple(x.shape)}" if is_plain else describe_batch(x)
        count = "two" if samples == 2 else samples
        raise AddressError(
            f"{address} fails on {count} inputs of {what}: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(output, Tensor):
        raise AddressError(f"{address} gives a {type(output).__name__}, not one tensor with a row a sample.")
    if output.dim() == 0 or len(output) != samples:
        raise AddressError(f"{address} gives an output of shape {tuple(output.shape)} for {samples} samples.")
    if not bool(torch.isfinite(output).all()):
        kind = "NaN" if bool(output.isnan().any()) else "infinity"
        raise AddressError(
            f"{address} gives {kind} before any training, on {samples} samples without NaN or infinity. "
            f"{NAN_HINT}."
        )
    return output


def _fitting(data: Data, output: Tensor) -> Data:
    """Convert numbers to the shape of the output, (N,) or (N, 1), which would broadcast otherwise."""
    y, shape = _targets(data.train), output.shape[1:]
    if not isinstance(data.train, Split) or not y.is_floating_point() or {y.shape[1:], shape} != {(), (1,)}:
        return data
    return Data(*(Split(part.x, part.y.reshape(-1, *shape)) for part in data.parts))


def _task(data: Data, loss: str, metric: str) -> Task:
    task = _task_of_targets(_targets(data.train), loss, metric)
    is_tensor = isinstance(next(iter(data.train.chunks(2)))[0], Tensor)
    return task if is_tensor else replace(task, losses=None)  # those are differentiated by the input


def _task_of_targets(y: Tensor, loss: str, metric: str) -> Task:
    if not loss:
        task = choose_task(y)
    else:
        descended: Judge = resolve_function(loss, "your loss")
        judged = (error_rate, "error rate") if _are_labels(y) else (descended, loss)
        task = Task(descended, *judged)
    if metric:
        judge = resolve_function(metric, "your metric")
        kind = WholeSetTask if judge in WHOLE_SET else Task
        return kind(task.loss, judge, metric, losses=task.losses)
    if task.metric is error_rate:
        return replace(task, chance=1 - float(y.unique(return_counts=True)[1].max()) / len(y))
    if task is REGRESSION:
        return replace(task, chance=float(y.var(0, correction=0).mean()))
    return task


def _are_labels(y: Tensor) -> bool:
    return not y.is_floating_point() and y.dim() == 1


def _are_one_hot(y: Tensor) -> bool:
    return y.dim() == 2 and y.shape[1] > 1 and bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def _check_outputs(model: str, output: Tensor, data: Data, task: Task, own_loss: bool) -> None:
    y = _targets(data.train)
    if not own_loss and _are_one_hot(y):
        raise DataError(
            f"The targets are one-hot: of {y.shape[1]} numbers a sample, one is 1. Give classes as whole "
            "numbers, y.argmax(1), or say with --loss what is to be done with these."
        )
    if not own_loss and y.is_floating_point() and output.shape[1:] != y.shape[1:]:
        raise AddressError(
            f"{model} gives {tuple(output.shape[1:])} for each sample, and a target {tuple(y.shape[1:])}; "
            "they must be of one shape."
        )
    if task.metric is error_rate or (not own_loss and not y.is_floating_point()):
        _check_classes(model, output, data)
    _check_judge(task.loss, "loss", output, y[: len(output)])
    if isinstance(task, WholeSetTask):  # two samples are not a set
        y = _targets(data.validation)
        output = output[:1].expand(len(y), *output.shape[1:])
    _check_judge(task.metric, "metric", output, y[: len(output)])


def _check_classes(model: str, output: Tensor, data: Data) -> None:
    y = _targets(data.train)
    if output.shape[1:-1] != y.shape[1:] or output.dim() == 1:
        wanted = ", ".join(map(str, (*y.shape[1:], "classes")))
        raise DataError(
            f"{model} gives {tuple(output.shape[1:])} for each sample; for whole-number targets it must be "
            f"({wanted},) scores. If these are numbers to predict, make them floating-point."
        )
    outputs = output.shape[-1]
    largest = max(int(y.max()) for part in data.parts for y in list_targets(part))
    if largest >= outputs:
        raise DataError(
            f"{model} has {outputs} output{'s' if outputs > 1 else ''}, and targets go up to {largest}: "
            f"it needs {largest + 1}. If these are numbers to predict, make them floating-point."
        )


def _check_judge(judge: Callable[..., Any], what: str, output: Tensor, y: Tensor) -> None:
    try:
        value = judge(output, y)
    except Exception as error:
        raise DataError(
            f"The {what} fails on outputs of shape {tuple(output.shape)} and targets of {y.dtype} and shape "
            f"{tuple(y.shape)}: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise DataError(f"The {what} must be a tensor with one number, the mean; it is of {found}.")
    if not bool(torch.isfinite(value)):
        raise DataError(f"The {what} is {float(value)} on two samples before any training.")


def _blocks(network: nn.Module, example: Batch, classes: int, wanted: int | None) -> int:
    """Return how many blocks the network is cut into; what was asked for must be possible."""
    network = unwrap_model(network)
    if wanted is not None:
        if wanted > 0:
            split(network, wanted, example)
        return wanted
    if classes == 0:
        return 0
    for count in range(MOST_BLOCKS, 1, -1):
        try:
            split(network, count, example)
        except BlockError:
            continue
        return count
    return 0
