"""Makes tensors of users' arrays and lists, and of the results of their functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plywise._util.import_path import call_factory
from plywise._util.renamed import serve_old_names
from plywise._util.seeded import seeded
from plywise.errors import DataError

_AT_ONCE = 1 << 16  # numbers


def call_user_function(address: str) -> Any:
    """Call the user's function at ``module:name``, with fixed seeds, and return its result.

    Raises:
        PlywiseError: see `plywise._util.import_path.call_factory`.
    """
    with seeded(0):
        return call_factory(address, "your data")


WORDS = (
    "Words become numbers by numpy.unique(words, return_inverse=True)[1], dates by a difference to one of "
    "them."
)


def make_tensor(values: Any, what: str) -> Tensor:
    """Make a tensor of numbers on the CPU, with a row for each sample.

    Args:
        values: a tensor, an array, or lists; or a list of tensors, one for each sample.
        what: their name in errors.

    Raises:
        PlywiseError: they are not an array of real numbers with rows, or some are not finite in float32.
    """
    if isinstance(values, np.ndarray):
        values = _make_readable(values, what)
    try:
        if isinstance(values, list) and values and hasattr(values[0], "shape"):
            values = torch.stack([torch.as_tensor(value) for value in values])
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(values, list | tuple) and values and isinstance(values[0], str):
            raise DataError(f"{what} are words, and no numbers. {WORDS}") from error
        reason = str(error).rstrip(".")
        raise DataError(f"{what} are not an array of numbers: {reason}.") from error
    if tensor.dim() == 0:
        raise DataError(f"{what} are a single number, not a row for each sample.")
    if tensor.is_complex():
        raise DataError(f"{what} are complex numbers, which no loss here takes.")
    if len(tensor) and not tensor.numel():
        raise DataError(f"{what} hold no number: their shape is {tuple(tensor.shape)}.")
    bad = _find_non_finite(tensor)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        is_large = bool(tensor[first].float().isinf().any())
        large = " Numbers that float32 does not hold, above 3.4e38, are infinite." if is_large else ""
        raise DataError(
            f"{what} hold NaN or infinity in {int(bad.sum())} of {len(bad)} samples, first in number "
            f"{first}, counted from 0. Fill or drop them; plywise would have to guess.{large}"
        )
    return tensor


def _make_readable(values: NDArray[Any], what: str) -> NDArray[Any]:
    """Convert an array to a type that torch knows: in this machine's byte order, at most float64.

    Raises:
        PlywiseError: its type is not one of numbers.
    """
    if values.dtype.kind not in "biufc":
        raise DataError(f"{what} are of type {values.dtype}, which is not a number. {WORDS}")
    if values.dtype == np.longdouble:
        return values.astype(np.float64)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _find_non_finite(tensor: Tensor) -> Tensor:
    """Find the samples with NaN or infinity, (N,), also after conversion to float32.

    Samples are checked in pieces, because the check takes more memory than the samples.
    """
    bad = torch.zeros(len(tensor), dtype=torch.bool)
    if not tensor.is_floating_point() or not tensor.numel():
        return bad
    at_once = max(1, _AT_ONCE * len(tensor) // tensor.numel())
    narrow = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    # into allocated memory: small new blocks between large ones prevent reuse
    for part, found in zip(tensor.split(at_once), bad.split(at_once), strict=True):
        found.copy_(torch.isfinite(part.reshape(len(part), -1).to(narrow)).all(1).logical_not_())
    return bad


def read_nested(values: Any, what: str, read: Callable[[Any, str], Tensor] | None) -> Any:
    """Read arrays in any nesting of mappings, tuples and dataclasses by ``read``.

    A list is an array, or holds samples to be stacked.

    Args:
        values: the arrays.
        what: their name in errors.
        read: makes a tensor of an array. None: arrays become tensors, and other values do not change.
    """
    if isinstance(values, Mapping):
        return {key: read_nested(value, f"{what}, {key!r}", read) for key, value in values.items()}
    if isinstance(values, tuple) and (read is None or any(hasattr(value, "shape") for value in values)):
        parts = [read_nested(value, what, read) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        names = [field.name for field in dataclasses.fields(values)]
        made = {name: read_nested(getattr(values, name), f"{what}, {name!r}", read) for name in names}
        return type(values)(**made)
    if read is not None:
        return read(values, what)
    if isinstance(values, list):
        return [read_nested(value, what, read) for value in values]
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(__name__, {"tensor_of": "make_tensor"})
