"""Finds the smallest units that blocks can be made of, and tries them on an example."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from plywise._util.modes import evaluating
from plywise.data.batches import TARGETS, Batch, clone_batch, list_tensors
from plywise.data.models import call_model, find_scores
from plywise.errors import BlockError
from plywise.local.cutting.chain import Piece, collect_tensors, label, learns, read_chain
from plywise.local.cutting.spine import SpineUnit, find_spine, list_units
from plywise.local.cutting.tracing import StaysWholeError

Unit = Piece | SpineUnit
"""What blocks are made of: of a trace, or of layers that are called in a loop."""

ADVICE = "pass blocks of your own: Blocks([...], example)"


def find_units(model: nn.Module, example: Batch) -> tuple[Sequence[Unit], list[str]]:
    """Return the units of a model, each with a parameter. The model stays as it is.

    They come from a trace by torch.fx, or are the layers that its forward calls in a loop, whichever are
    more.

    Args:
        model: the model.
        example: a small batch of inputs.

    Returns:
        The units, first to last, and why they are not smaller, place by place.

    Raises:
        BlockError: see `plywise.split`.
    """
    traced: tuple[Sequence[Unit], list[str]] = [], []
    untraced = ""
    if isinstance(example, Tensor):
        try:
            traced = _trace_units(model, example)
        except StaysWholeError as error:
            untraced = f"{error}; "
    if len(traced[0]) > 1 and not _has_longer_row(model, len(traced[0])):
        return traced
    try:
        looped = _loop_units(model, example)
    except StaysWholeError as error:
        if isinstance(example, Tensor) and not untraced:
            return traced
        why = f"{untraced}and as to a loop over its layers, {error}" if untraced else str(error)
        raise BlockError(f"{type(model).__name__} cannot be cut: {why}. Fix that, or {ADVICE}.") from error
    return looped if len(looped[0]) > len(traced[0]) else traced


def join_units(units: Sequence[Unit], starts: Sequence[int]) -> list[Unit]:
    """Join units that follow one another, from each of these places to the next."""
    return [reduce(add, units[start:stop]) for start, stop in pairwise([*starts, len(units)])]


def _has_longer_row(model: nn.Module, count: int) -> bool:
    return any(isinstance(m, nn.ModuleList) and len(m) >= count for m in model.modules())


def _loop_units(model: nn.Module, example: Batch) -> tuple[Sequence[Unit], list[str]]:
    """Return the layers that a model's forward calls in a loop, tried on an example.

    Raises:
        StaysWholeError: there are none, or blocks of them do not do what the model does.
    """
    try:
        with own_randomness(model, example):
            units = list_units(model, find_spine(model, example))
    except StaysWholeError:
        raise
    except Exception as error:
        raise StaysWholeError(f"it fails on the example: {type(error).__name__}: {error}") from error
    if len(units) < 2:
        raise StaysWholeError("its layers have no parameters of their own")
    with torch.no_grad(), evaluating(model), own_randomness(model, example):
        expected = find_scores(call_model(model, clone_batch(example), TARGETS))
        s = list_tensors(example)[0]
        for unit in units:
            s = unit.assemble(model)(s, clone_batch(example))
    if not isinstance(expected, Tensor) or s.shape != expected.shape:
        raise StaysWholeError("it returns no scores, one tensor")
    if not torch.allclose(s, expected, 1e-3, 1e-5, equal_nan=True):
        raise StaysWholeError("its layers, one block after another, do not do what it does")
    return units, []


def _trace_units(model: nn.Module, example: Tensor) -> tuple[Sequence[Unit], list[str]]:
    """Return what a trace by torch.fx shows.

    Raises:
        StaysWholeError: there is none.
        BlockError: the model fails, or does not do what was traced.
    """
    pieces, reasons = read_chain(model)
    kept = {**_find_unsound(model, pieces, example), **_find_tied(model, pieces)}
    together: list[Piece] = []
    for number, piece in enumerate(pieces):
        if number - 1 in kept:
            together[-1] += piece
        else:
            together.append(piece)
    kept = {cut: reason for cut, reason in kept.items() if learns(model, pieces[cut + 1].nodes)}
    units: list[Piece] = []
    for unit in together:
        if units and not (learns(model, unit.nodes) and learns(model, units[-1].nodes)):
            units[-1] += unit  # what has no parameters belongs to what comes before
        else:
            units.append(unit)
    return units, list(dict.fromkeys([*reasons, *kept.values()]))


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy to try things on, without gradients.

    Raises:
        BlockError: the model cannot be copied.
    """
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise BlockError(
            f"{type(model).__name__} cannot be copied, and costs are measured on a copy: {error}. Fix that, "
            f"or {ADVICE}."
        ) from error
    copied.zero_grad()
    return copied


@contextmanager
def own_randomness(model: nn.Module, example: Batch) -> Iterator[None]:
    """Use separate random numbers; the caller's random state is not changed."""
    tensors = (*list_tensors(example), *model.parameters(), *model.buffers())
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device for device in devices if device is not None]):
        yield


def _find_tied(model: nn.Module, pieces: list[Piece]) -> dict[int, str]:
    """Cuts between two uses of a parameter or buffer, with the reason; cut i comes after piece i."""
    first: dict[Tensor, tuple[int, str]] = {}
    cuts: dict[int, str] = {}
    for number, piece in enumerate(pieces):
        for name, tensor in collect_tensors(model, piece.nodes):
            start, other = first.setdefault(tensor, (number, name))
            reason = f"{name!r} is used twice" if name == other else f"{name!r} and {other!r} are one tensor"
            cuts |= dict.fromkeys(range(start, number), reason)
    return cuts


def _find_unsound(model: nn.Module, pieces: list[Piece], example: Tensor) -> dict[int, str]:
    """Find cuts that no tensor with a row for each sample crosses, or one that a later piece writes into.

    Raises:
        BlockError: the model fails, or the pieces do not do what it does.
    """
    reference, rehearsal = copy_of(model), copy_of(model)
    parts = [piece.assemble(rehearsal) for piece in pieces]
    cuts: dict[int, str] = {}
    for training in (True, False):
        for part in (reference, *parts):
            part.train(training)
        with torch.no_grad():
            expected = _run_whole(reference, example)
            found, faults = _run_pieces(pieces, parts, example)
        cuts = {**faults, **cuts}
        is_alike = isinstance(found, Tensor) and found.shape == expected.shape
        if not is_alike or not torch.allclose(found, expected, 1e-3, 1e-5, equal_nan=True):
            raise BlockError(
                f"{type(model).__name__} does not do what torch.fx traced: its forward depends on more "
                f"than its input's values (a type, a clock, Python's random numbers). Fix that, or {ADVICE}."
            )
    return {cut: reason for cut, reason in cuts.items() if cut < len(pieces) - 1}


def _run_whole(model: nn.Module, example: Tensor) -> Tensor:
    """Return the output of a whole model, which must have a row for each sample."""
    try:
        with own_randomness(model, example):
            output: Tensor = model(example.clone())
    except Exception as error:
        mode = "train" if model.training else "eval"
        raise BlockError(f"{type(model).__name__} fails on the example in {mode} mode: {error}.") from error
    if fault := _fault(output, len(example)):
        raise BlockError(f"{type(model).__name__} hands on {fault}. Fix that, or {ADVICE}.")
    return output


def _run_pieces(pieces: list[Piece], parts: list[nn.Module], example: Tensor) -> tuple[Any, dict[int, str]]:
    """Return the output of the pieces one after the other, and what is wrong with the cuts between them."""
    values, versions = [example.clone()], list[int]()
    faults: dict[int, str] = {}
    for number, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
        values.append(part(values[-1]))
        if fault := _fault(values[-1], len(example)):
            faults.setdefault(number, f"{label(piece.result)} hands on {fault}")
        for cut, version in enumerate(versions):
            if _version(values[cut + 1]) != version:
                faults.setdefault(cut, f"{label(piece.nodes[0])} writes into what it gets")
        versions.append(_version(values[-1]))
    return values[-1], faults


def _fault(value: object, samples: int) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, not one tensor"
    if value.dim() == 0 or len(value) != samples:
        return f"{tuple(value.shape)} for {samples} samples"
    return ""


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) else 0
