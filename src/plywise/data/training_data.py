"""Data for `plywise train` and `plywise pipeline`, with the kind of their targets."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from plywise.data.batches import Part, list_targets
from plywise.data.own_data import Parts
from plywise.data.parts import compute_digest
from plywise.data.reading import IGNORED
from plywise.errors import DataError

CLASSES, TOKENS, LABELS, NUMBERS, WHOLE = "classes", "tokens", "labels", "numbers", "whole batches"
"""Kinds of targets: classes (N,), tokens (N, T), zeros and ones (N, C), numbers, or those of a step
function."""


@dataclass(frozen=True)
class TrainingData:
    """Data to train on, and perhaps to test on.

    Attributes:
        train: the training data.
        test: the data for testing the result, if there are any.
        kind: the kind of the targets.
        outputs: the number of scores for a sample (for a position, with tokens): one more than the largest
            class, or the number of labels or numbers; 0 for whole batches.
        note: sentences on choices made for the user; empty if there were none.
    """

    train: Part
    test: Part | None
    kind: str
    outputs: int
    note: str = ""

    def fingerprint(self) -> str:
        """Compute a digest of every value, to recognise other data."""
        return compute_digest(part for part in (self.train, self.test) if part is not None)


def take_training_data(address: str, parts: Parts, is_whole: bool = False) -> TrainingData:
    """Make training data from the parts that were read.

    The result is tested on the test part, or on the validation part if there is no test part.

    Args:
        address: their name in errors.
        parts: the result of `plywise.data.own_data.read_parts`.
        is_whole: whether they are whole batches, for a step function.

    Raises:
        PlywiseError: the targets are of an unknown kind.
    """
    name = next((name for name in ("test", "validation") if name in parts), "")
    train, test = parts["train"], parts.get(name)
    notes = [*parts.guesses, *_note_parts(parts)]
    if is_whole:
        return TrainingData(train, test, WHOLE, 0, "\n".join(notes))
    kind = _find_kind(address, train)
    if kind == LABELS:
        notes.append("Targets of zeros and ones are labels, several of which a sample may have.")
    both = [part for part in (train, test) if part is not None]
    outputs = _count_outputs(kind, both)
    if kind == CLASSES and outputs == 1:
        raise DataError(
            f"{address}: all targets are class 0, so there is nothing to tell apart. Look at how the classes "
            "were read; targets that are numbers to predict are floats, or --read targets=numbers."
        )
    return TrainingData(train, test, kind, outputs, "\n".join(notes))


def _note_parts(parts: Parts) -> list[str]:
    if "validation" not in parts:
        return []
    if "test" in parts:
        return ["The validation part is not used: training has nothing to choose by it."]
    return ["The result is judged on the validation part, since there is no test part."]


def _find_kind(address: str, train: Part) -> str:
    y = next(list_targets(train))
    if not y.is_floating_point():
        if y.dim() in (1, 2):
            return CLASSES if y.dim() == 1 else TOKENS
    elif (
        y.dim() == 2
        and y.shape[1] > 1
        and all(bool(((t == 0) | (t == 1)).all()) for t in list_targets(train))
    ):
        return LABELS
    elif y.dim() in (1, 2):
        return NUMBERS
    raise DataError(
        f"{address}, train: targets are classes (N,), tokens (N, T), labels (N, C) of zeros and ones, or "
        f"numbers (N,) or (N, d); these are {y.dtype} of shape {tuple(y.shape)}."
    )


def _count_outputs(kind: str, parts: list[Part]) -> int:
    if kind in (CLASSES, TOKENS):
        return 1 + max(int(y.max()) for part in parts for y in list_targets(part))
    y = next(list_targets(parts[0]))
    return 1 if y.dim() == 1 else y.shape[1]


# ---- losses and metrics ------------------------------------------------------------------------


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Compute the cross entropy of scores (N, C) and classes (N,), or of (N, T, C) and tokens (N, T)."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), ignore_index=IGNORED)


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error; (N,) and (N, 1) are treated alike."""
    return F.mse_loss(output.reshape(y.shape), y)


LOSSES = {
    CLASSES: F.cross_entropy,
    TOKENS: cross_entropy,
    LABELS: F.binary_cross_entropy_with_logits,
    NUMBERS: squared_error,
}
"""The usual loss of each kind of targets."""


def count_right(kind: str, output: Tensor, y: Tensor) -> tuple[float, float]:
    """Return a batch's sum of right answers or squared errors, and their number."""
    if kind == NUMBERS:
        return float((output.reshape(y.shape) - y).square().sum()), float(y.numel())
    if kind == LABELS:
        return float(((output > 0) == (y > 0.5)).sum()), float(y.numel())
    known = y != IGNORED
    return float(((output.argmax(-1) == y) & known).sum()), float(known.sum())
