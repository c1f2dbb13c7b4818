"""Data for classification from wherever a user has it: the bundled digits, a file, a function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plywise._util.import_path import called
from plywise._util.seeded import seeded
from plywise.data.digits import Split, load_digits
from plywise.data.readers import read_npz
from plywise.errors import PlywiseError


@dataclass(frozen=True)
class Arrays:
    """Data for classification.

    Attributes:
        train: what is trained on.
        test: what the accuracy is measured on, if there is any.
        classes: number of classes: one more than the largest label.
    """

    train: Split
    test: Split | None
    classes: int

    def fingerprint(self) -> str:
        """A digest of every value: other data have another one."""
        return digest_of(split for split in (self.train, self.test) if split is not None)


def load_arrays(address: str) -> Arrays:
    """Load data.

    Inputs become float32: bytes (images) are divided by 255, other integers stay as they are, for
    embeddings. Targets are class indices from 0.

    Args:
        address: ``digits``; a ``.npz`` file with ``x_train``, ``y_train`` and perhaps ``x_test``, ``y_test``;
            or ``module:function`` of a function that returns (x, y) or (x, y, x_test, y_test).

    Raises:
        PlywiseError: there are no such data, or they are none for classification.

    Example:
        >>> load_arrays("digits").train.x.shape
        torch.Size([1100, 64])
    """
    if address == "digits":
        digits, _, held_out = load_digits()
        return Arrays(digits, held_out, 10)
    if address.endswith(".npz"):
        parts = _from_file(Path(address))
    elif ":" in address:
        parts = _from_function(address)
    else:
        raise PlywiseError(
            f"Data are 'digits', a .npz file, or module:function of a function that makes them, not "
            f"{address!r}.",
            see="error-data",
        )
    train = _split(parts[0], parts[1], f"{address}: training data")
    if len(parts) == 2:
        return Arrays(train, None, int(train.y.max()) + 1)
    test = _split(parts[2], parts[3], f"{address}: test data")
    if test.x.shape[1:] != train.x.shape[1:]:
        raise PlywiseError(
            f"{address}: a training sample is {tuple(train.x.shape[1:])}, and a test sample "
            f"{tuple(test.x.shape[1:])}.",
            see="error-data",
        )
    return Arrays(train, test, max(int(train.y.max()), int(test.y.max())) + 1)


def made_by(address: str) -> Any:
    """What the user's function at ``module:name`` returns; what it draws is the same each time.

    Raises:
        PlywiseError: see `plywise._util.import_path.called`.
    """
    with seeded(0):
        return called(address, "your data")


def digest_of(splits: Iterable[Split]) -> str:
    """A digest of every value of some sets."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        for tensor in (split.x, split.y):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def tensor_of(values: Any, what: str) -> Tensor:
    """Numbers as a tensor on the CPU, a row for each sample.

    Args:
        values: a tensor, an array, or lists; or a list of tensors, one a sample.
        what: what they are, for the error.

    Raises:
        PlywiseError: they are no array of real, finite numbers with rows.
    """
    try:
        if isinstance(values, list) and values and hasattr(values[0], "shape"):
            values = torch.stack([torch.as_tensor(value) for value in values])
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlywiseError(f"{what} are no array of numbers: {error}.", see="error-data") from error
    if tensor.dim() == 0:
        raise PlywiseError(f"{what} are a single number, not a row for each sample.", see="error-data")
    if tensor.is_complex():
        raise PlywiseError(f"{what} are complex numbers, which no loss here takes.", see="error-data")
    bad = ~torch.isfinite(tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)).all(1)
    if bool(bad.any()):
        raise PlywiseError(
            f"{what} hold NaN or infinity in {int(bad.sum())} of {len(bad)} samples, first in number "
            f"{int(bad.nonzero()[0])}. Fill or drop them; plywise would have to guess.",
            see="error-data",
        )
    return tensor


def inputs_of(values: Any, what: str) -> Tensor:
    """Inputs as networks take them: float32, bytes (images) divided by 255; other integers for embeddings.

    Raises:
        PlywiseError: see `tensor_of`.
    """
    x = tensor_of(values, what)
    if x.dtype == torch.uint8:
        return x.float() / 255
    return x.float() if x.is_floating_point() or x.dtype == torch.bool else x.long()


def _from_file(path: Path) -> tuple[Any, ...]:
    found = read_npz(path)
    names = ["x_train", "y_train"]
    if "x_test" in found or "y_test" in found:
        names += ["x_test", "y_test"]
    if missing := [name for name in names if name not in found]:
        raise PlywiseError(
            f"{path} has no {' and no '.join(missing)}; it has: {', '.join(found)}.", see="error-data"
        )
    return tuple(found[name] for name in names)


def _from_function(address: str) -> tuple[Any, ...]:
    made = made_by(address)
    if not isinstance(made, tuple | list) or len(made) not in (2, 4):
        found = f"{len(made)} things" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
        raise PlywiseError(
            f"{address} must return (x, y) or (x, y, x_test, y_test); it returned {found}.", see="error-data"
        )
    return tuple(made)


def _split(x: Any, y: Any, what: str) -> Split:
    inputs, targets = inputs_of(x, what), _targets(tensor_of(y, what), what)
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise PlywiseError(f"{what} have {len(inputs)} inputs and {len(targets)} targets.", see="error-data")
    return Split(inputs, targets)


def _targets(y: Tensor, what: str) -> Tensor:
    whole = y.long()
    if y.dim() != 1 or not torch.equal(whole.to(y.dtype), y) or (len(y) and int(whole.min()) < 0):
        raise PlywiseError(
            f"{what}: targets must be class indices, one whole number from 0 a sample; these are {y.dtype} "
            f"of shape {tuple(y.shape)}.",
            see="error-data",
        )
    return whole
