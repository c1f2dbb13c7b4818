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

from plywise.addresses import called
from plywise.data.digits import Split, load_digits
from plywise.errors import PlywiseError

_DTYPES = {torch.float64: torch.float32, torch.float16: torch.float32, torch.bfloat16: torch.float32}


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
            f"{address!r}."
        )
    train = _split(parts[0], parts[1], f"{address}: training data")
    if len(parts) == 2:
        return Arrays(train, None, int(train.y.max()) + 1)
    test = _split(parts[2], parts[3], f"{address}: test data")
    if test.x.shape[1:] != train.x.shape[1:]:
        raise PlywiseError(
            f"{address}: a training sample is {tuple(train.x.shape[1:])}, and a test sample "
            f"{tuple(test.x.shape[1:])}."
        )
    return Arrays(train, test, max(int(train.y.max()), int(test.y.max())) + 1)


def digest_of(splits: Iterable[Split]) -> str:
    """A digest of every value of some sets."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        for tensor in (split.x, split.y):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def _from_file(path: Path) -> tuple[Any, ...]:
    if not path.is_file():
        raise PlywiseError(f"There is no data file {path}.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile, zlib and numpy have errors of their own
        raise PlywiseError(f"{path} cannot be read as a .npz file of arrays: {error}.") from error
    names = ["x_train", "y_train"]
    if "x_test" in found or "y_test" in found:
        names += ["x_test", "y_test"]
    if missing := [name for name in names if name not in found]:
        raise PlywiseError(f"{path} has no {' and no '.join(missing)}; it has: {', '.join(found)}.")
    return tuple(found[name] for name in names)


def _from_function(address: str) -> tuple[Any, ...]:
    made = called(address, "your data")
    if not isinstance(made, tuple | list) or len(made) not in (2, 4):
        found = f"{len(made)} things" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
        raise PlywiseError(f"{address} must return (x, y) or (x, y, x_test, y_test); it returned {found}.")
    return tuple(made)


def _split(x: Any, y: Any, what: str) -> Split:
    inputs, targets = _inputs(_tensor(x, what), what), _targets(_tensor(y, what), what)
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise PlywiseError(f"{what} have {len(inputs)} inputs and {len(targets)} targets.")
    return Split(inputs, targets)


def _tensor(values: Any, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlywiseError(f"{what} are no array of numbers: {error}.") from error
    if tensor.dim() == 0:
        raise PlywiseError(f"{what} are a single number, not a row for each sample.")
    return tensor.detach().cpu()


def _inputs(x: Tensor, what: str) -> Tensor:
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        return x.long()
    x = x.to(_DTYPES.get(x.dtype, x.dtype))
    if not bool(torch.isfinite(x).all()):
        raise PlywiseError(f"{what} hold NaN or infinity.")
    return x


def _targets(y: Tensor, what: str) -> Tensor:
    whole = y.long()
    if y.dim() != 1 or not torch.equal(whole.to(y.dtype), y) or (len(y) and int(whole.min()) < 0):
        raise PlywiseError(
            f"{what}: targets must be class indices, one whole number from 0 a sample; these are {y.dtype} "
            f"of shape {tuple(y.shape)}."
        )
    return whole
