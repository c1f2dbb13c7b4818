"""Data for classification: what `plywise train` and `plywise pipeline` take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plywise.data.arrays import digest_of
from plywise.data.digits import Split
from plywise.data.own_data import Parts
from plywise.errors import PlywiseError


@dataclass(frozen=True)
class ClassData:
    """Data for classification.

    Attributes:
        train: what is trained on.
        test: what the accuracy is measured on, if there is any.
        classes: number of classes: one more than the largest label.
        note: what was chosen or guessed for the user, in sentences; empty if nothing was.
    """

    train: Split
    test: Split | None
    classes: int
    note: str = ""

    def fingerprint(self) -> str:
        """A digest of every value: other data have another one."""
        return digest_of(split for split in (self.train, self.test) if split is not None)


def take_classes(address: str, parts: Parts) -> ClassData:
    """Data for classification, of the parts that were read.

    Accuracy is measured on the test part; on the validation part if there is no other.

    Args:
        address: what they are called in errors.
        parts: what `plywise.data.own_data.read_parts` has read.

    Raises:
        PlywiseError: the targets are not classes.
    """
    train = _with_classes(parts["train"], f"{address}, train")
    name = next((name for name in ("test", "validation") if name in parts), "")
    test = _with_classes(parts[name], f"{address}, {name}") if name else None
    classes = 1 + max(int(part.y.max()) for part in (train, test) if part is not None)
    return ClassData(train, test, classes, _note(parts))


def _note(parts: Parts) -> str:
    notes = list(parts.guesses)
    if "validation" in parts and "test" in parts:
        notes.append("The validation part is not used: training has nothing to choose by it.")
    elif "validation" in parts:
        notes.append("The accuracy is measured on the validation part, since there is no test part.")
    return "\n".join(notes)


def _with_classes(part: Split, what: str) -> Split:
    y: Tensor = part.y
    whole = y.long()
    if y.dim() != 1 or not bool((whole.to(y.dtype) == y).all()) or int(whole.min()) < 0:
        raise PlywiseError(
            f"{what}: targets must be class indices, one whole number from 0 a sample; these are {y.dtype} "
            f"of shape {tuple(y.shape)}.",
            see="error-data",
        )
    return Split(part.x, whole)
