"""Reads data by the user's options, or by a guess, which is printed with the flag that overrules it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from plywise._util.suggest import suggestion
from plywise.data.arrays import make_tensor
from plywise.errors import CommandError, DataError

MOST_CLASSES = 20
"""Whole numbers in a table above this are taken as counts and predicted as numbers."""
WHOLE = 2**24
"""float32 holds each whole number up to this."""
IGNORED = -100
"""The target that torch's losses ignore."""
_AT_ONCE = 1 << 18  # targets that are examined
_CHOICES = {
    "header": ("yes", "no"),
    "targets": ("classes", "numbers"),
    "inputs": ("numbers", "images", "tokens"),
}


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading data; an empty option is guessed, and the guess is printed.

    Attributes:
        header: whether the first line of a .csv file holds names: yes or no.
        target: name of the column of a .csv file that holds the targets. Default: the last one.
        targets: classes or numbers.
        inputs: numbers (float32), images (bytes, divided by 255) or tokens (whole numbers, for embeddings).
    """

    header: str = ""
    target: str = ""
    targets: str = ""
    inputs: str = ""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) and value not in choices:
                raise CommandError(
                    f"--read {name}= takes {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}."
                )

    @staticmethod
    def parse(text: str) -> ReadOptions:
        """Parse the options of a flag such as ``header=no,targets=numbers``.

        Raises:
            PlywiseError: there is no such option, or it does not take that value.

        Example:
            >>> ReadOptions.parse("header=no,targets=numbers").targets
            'numbers'
        """
        known = [entry.name for entry in fields(ReadOptions)]
        values = {}
        for word in filter(None, text.split(",")):
            name, equals, value = (part.strip() for part in word.partition("="))
            if not (equals and value) or name not in known:
                hint = suggestion(name, tuple(known)) or f"Known are: {', '.join(known)}."
                raise CommandError(
                    f"--read takes name=value, as in header=no,targets=numbers, not {word!r}. {hint}"
                )
            values[name] = value
        return ReadOptions(**values)


@dataclass
class Reader:
    """Turns a user's data into tensors.

    Args:
        options: the user's options.

    Attributes:
        guesses: a sentence for each guess, with the flag that overrules it.
    """

    options: ReadOptions
    guesses: list[str] = field(default_factory=list)

    def note(self, guess: str) -> None:
        """Note a guess, once."""
        if guess and guess not in self.guesses:
            self.guesses.append(guess)

    def read_inputs(self, values: Any, what: str) -> Tensor:
        """Read inputs as networks take them, with a row for each sample.

        Bytes become float32 and are divided by 255, since they usually are images. Other whole numbers become
        int64, for embeddings, and all other numbers float32.

        Raises:
            PlywiseError: see `plywise.data.arrays.make_tensor`.
        """
        x = make_tensor(values, f"{what}: the inputs")
        kind = self.options.inputs or self._guess_inputs(x)
        if kind == "tokens":
            return x.long()
        return x.float() / 255 if kind == "images" else x.float()

    def _guess_inputs(self, x: Tensor) -> str:
        if x.is_floating_point() or x.dtype == torch.bool:
            return "numbers"
        if x.dtype == torch.uint8:
            self.note(
                "The inputs are bytes and were taken as images, divided by 255; --read inputs=numbers takes "
                "them as they are."
            )
            return "images"
        self.note(
            "The inputs are whole numbers and were left so, as tokens for embeddings; --read inputs=numbers "
            "makes them floating-point."
        )
        return "tokens"

    def read_targets(self, values: Any, what: str) -> Tensor:
        """Read targets: whole numbers are classes or tokens, int64; other numbers are float32.

        Raises:
            PlywiseError: see `plywise.data.arrays.make_tensor`; or they are neither.
        """
        y = make_tensor(values, f"{what}: the targets")
        if self.options.targets == "numbers":
            return y.float()
        if y.is_floating_point():
            return self._read_floating_targets(y, what)
        if y.dim() == 2 and y.shape[1] == 1:
            raise DataError(
                f"{what}: the targets are whole numbers of shape {tuple(y.shape)}. Classes are of shape "
                "(N,), as of y[:, 0]; numbers to predict are floating-point, or --read targets=numbers."
            )
        y = y.long()
        least = int(y.min()) if y.numel() else 0
        if least < 0 and (y.dim() < 2 or bool(((y < 0) & (y != IGNORED)).any())):
            raise DataError(
                f"{what}: the targets hold {least}; classes and tokens count from 0 ({IGNORED} is a token "
                "that the loss ignores)."
            )
        return y

    def look_for_gaps(self, y: Tensor) -> None:
        """Note it if some classes of the training samples have none: they may be counts, or count from 1."""
        if self.options.targets or y.is_floating_point() or y.dim() != 1 or not len(y):
            return
        values = torch.cat([piece.unique() for piece in y.split(_AT_ONCE)]).unique()
        if int(values[-1]) >= len(values):
            first = int((values != torch.arange(len(values))).nonzero()[0])
            self.note(
                f"The targets are whole numbers from {int(values[0])} to {int(values[-1])}, taken as "
                f"classes, so that class {first} has no sample; --read targets=numbers takes them as numbers "
                "to predict."
            )

    def _read_floating_targets(self, y: Tensor, what: str) -> Tensor:
        whole = y.dim() == 1 and bool((y == y.round()).all())
        if self.options.targets == "classes":
            if not whole or (y.numel() and float(y.min()) < 0):
                raise DataError(
                    f"{what}: targets must be class indices, one whole number from 0 a sample; these are "
                    f"{y.dtype} of shape {tuple(y.shape)}."
                )
            return y.long()
        if whole and y.numel() and _may_be_classes(y.unique()):
            self.note(
                f"The targets are floating-point, though just whole numbers from {float(y.min()):g} to "
                f"{float(y.max()):g}, and were taken as numbers to predict; --read targets=classes takes "
                "them as classes."
            )
        return y.float()

    def read_words(self, y: Tensor, words: Sequence[str], name: str, what: str) -> Tensor:
        """Read targets that are words, which the table has numbered, as classes.

        Raises:
            PlywiseError: some are missing.
        """
        y = make_tensor(y, f"{what}: the targets")
        shown = ", ".join(words[:10]) + (", ..." if len(words) > 10 else "")
        self.note(
            f"The targets (column {name!r}) are words and were taken as {_count_classes(len(words))}, in the "
            f"order of the alphabet: {shown}."
        )
        return y.long()

    def read_column(self, y: Tensor, name: str, what: str) -> Tensor:
        """Read the targets of a table as classes, int64, or as numbers, float32.

        Classes are numbered from 0 in the order of their values.

        Raises:
            PlywiseError: the column cannot be read in this way.
        """
        y = make_tensor(y, f"{what}: the targets")
        pieces = y.split(_AT_ONCE)
        if self.options.targets == "numbers" or not all(bool((p == p.round()).all()) for p in pieces):
            if self.options.targets == "classes":
                raise DataError(
                    f"{what}: column {name!r} holds other than whole numbers: these are not classes."
                )
            return y.float()
        values = torch.cat([piece.unique() for piece in pieces]).unique()
        span = f"are the whole numbers {float(values[0]):g} to {float(values[-1]):g}"
        if not self.options.targets and not _may_be_classes(values):
            self.note(
                f"The targets (column {name!r}) {span} and were taken as numbers to predict; --read "
                "targets=classes takes them as classes."
            )
            return y.float()
        if not self.options.targets:
            first = "" if float(values[0]) == 0 else ", numbered from 0"
            self.note(
                f"The targets (column {name!r}) {span} and were taken as {_count_classes(len(values))}"
                f"{first}; --read targets=numbers takes them as numbers to predict."
            )
        if float(values.abs().max()) > WHOLE:
            raise DataError(
                f"{what}: column {name!r} holds classes as numbers above {WHOLE:,}, of which float32 takes "
                "neighbours for one. Number the classes from 0."
            )
        numbers = torch.empty(len(y), dtype=torch.int64)
        for piece, out in zip(pieces, numbers.split(_AT_ONCE), strict=True):
            torch.searchsorted(values, piece, out=out)
        return numbers


def _count_classes(count: int) -> str:
    return f"{count} classes" if count > 1 else "one class"


def _may_be_classes(values: Tensor) -> bool:
    """Tell whether whole numbers look like classes: two values, or consecutive ones from 0 or 1."""
    first, last, count = float(values[0]), float(values[-1]), len(values)
    return count == 2 or (first in (0, 1) and count <= MOST_CLASSES and last == first + count - 1)
