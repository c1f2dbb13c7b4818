"""Loads public data sets by name, in whichever of their formats is on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from plywise._util.file_errors import require_file
from plywise._util.renamed import serve_old_names
from plywise.data.readers import (
    Bytes,
    read_cifar10_archive,
    read_cifar100_archive,
    read_colour_images,
    read_idx,
    read_npz,
    read_text,
)
from plywise.data.store import IDX_FILES, cache_decoded, find_file, list_folders, make_missing_error
from plywise.data.tables import read_rows, read_table
from plywise.errors import DataError

Images = tuple[Bytes, Bytes, Bytes, Bytes]
"""Training images and labels, test images and labels."""
Numbers = NDArray[np.float64]

_TOKENS = ("C", "c", "O", "o", "N", "n", "F", "Cl", "Br", "I", "S", "s", "P", "Si", "=", "#", "(", "@")


def load_grey_images(name: str) -> Images:
    """Load ``mnist`` or ``fashion_mnist``: images (N, 28, 28), bytes; 60,000 for training, 10,000 for test.

    Raises:
        PlywiseError: neither ``NAME.npz`` nor the four IDX files, in a folder NAME, are there; or one is
            damaged.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    for folder in list_folders():
        whole = folder / f"{name}.npz"
        if whole.is_file():
            arrays = read_npz(whole)
            if lacking := [part for part in names if part not in arrays]:
                raise DataError(f"{whole} has no {', '.join(lacking)}; it has: {', '.join(arrays)}.")
            x, y, x_test, y_test = (arrays[part].astype(np.uint8) for part in names)
            return x, y, x_test, y_test
        parts = [folder / name / part for part in IDX_FILES]
        if all(part.is_file() for part in parts):
            x, y, x_test, y_test = (read_idx(part).astype(np.uint8) for part in parts)
            return x, y, x_test, y_test
    raise make_missing_error(name, f"{name}.npz", f"{name}/{IDX_FILES[0]} (and the other three)")


def load_cifar10() -> Images:
    """Load CIFAR-10: images (N, 32, 32, 3), bytes; 50,000 for training, 10,000 for test, in file order.

    Decoded images stay in the cache.

    Raises:
        PlywiseError: neither ``cifar10_train.npz`` with ``cifar10_test.npz`` nor ``cifar-10-binary.tar.gz``
            is there; or one is damaged.
    """
    return _load_colour_images("cifar10", "cifar-10-binary.tar.gz", read_cifar10_archive)


def load_cifar100() -> Images:
    """Load CIFAR-100 with its 100 fine classes; images and sizes are as in `load_cifar10`.

    Decoded images stay in the cache. ``.npz`` files may hold the images rounded, see `read_colour_images`.

    Raises:
        PlywiseError: neither ``cifar100_train.npz`` with ``cifar100_test.npz`` nor
            ``cifar-100-binary.tar.gz`` is there; or one is damaged.
    """
    return _load_colour_images("cifar100", "cifar-100-binary.tar.gz", read_cifar100_archive)


def load_tiny_shakespeare() -> str:
    """Load a million characters of Shakespeare's plays.

    Raises:
        PlywiseError: neither ``tinyshakespeare.txt`` nor ``tinyshakespeare.txt.gz`` is there.
    """
    return read_text(_require_file("tinyshakespeare", "tinyshakespeare.txt", "tinyshakespeare.txt.gz"))


def load_numeric_table(name: str) -> tuple[Numbers, Numbers]:
    """Load a table of numbers, ``NAME.csv`` or ``NAME.csv.gz``, whose last column is the target.

    Returns:
        Inputs (N, d), NaN where a value is missing, and targets (N,).

    Raises:
        PlywiseError: there is no such file, or it is not such a table.
    """
    table = read_table(_require_file(name, f"{name}.csv.gz", f"{name}.csv")).numbers
    return table[:, :-1], table[:, -1]


def load_boiling_points() -> tuple[Numbers, Numbers]:
    """Load organic compounds (``compounds.csv.gz``): counts from their formulas, and boiling points.

    Returns:
        Inputs (N, 20): how often each of 18 tokens is in the SMILES formula, rings, molar mass in g/mol; and
        boiling points (N,) in K. Compounds without a known boiling point are left out.

    Raises:
        PlywiseError: there is no such file, or it lacks a column.
    """
    path = _require_file("compounds", "compounds.csv.gz", "compounds.csv")
    rows = read_rows(path)
    if lacking := [name for name in ("smiles", "molar_mass", "tb_K") if name not in rows[0]]:
        raise DataError(f"{path} has no column {', '.join(lacking)}.")
    known = [row for row in rows if row["tb_K"]]
    x = np.array([_read_formula(row["smiles"], row["molar_mass"]) for row in known])
    return x, np.array([float(row["tb_K"]) for row in known])


def _read_formula(smiles: str, mass: str) -> list[float]:
    tokens = re.findall(r"Cl|Br|Si|[A-Za-z=#(@]|[0-9]", smiles)
    rings = sum(token.isdigit() for token in tokens) / 2  # a digit opens a ring, and closes it
    return [*(float(tokens.count(token)) for token in _TOKENS), rings, float(mass)]


def _require_file(name: str, *files: str) -> Path:
    path = find_file(*files)
    if path is None:
        raise make_missing_error(name, *files)
    return path


def _load_colour_images(name: str, archive: str, read: Callable[[Path], Images]) -> Images:
    for folder in list_folders():
        parts = [folder / f"{name}_{part}.npz" for part in ("train", "test")]
        if all(part.is_file() for part in parts):
            return _read_cached(name, _read_residuals, *parts)
        if (folder / archive).is_file():
            return _read_cached(name, read, folder / archive)
    raise make_missing_error(name, archive, f"{name}_train.npz (with {name}_test.npz)")


def _read_residuals(train: Path, test: Path) -> Images:
    return (*read_colour_images(train), *read_colour_images(test))


def _read_cached(name: str, read: Callable[..., Images], *sources: Path) -> Images:
    names = ("x", "y", "x_test", "y_test")
    digest = hashlib.blake2b(digest_size=8)
    for path in sources:
        with require_file(path).open("rb") as file:  # both formats end with the checksums of what is in them
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            digest.update(f"{size};".encode() + file.read())
    arrays = cache_decoded(
        f"{name}-{digest.hexdigest()}", lambda: dict(zip(names, read(*sources), strict=True))
    )
    x, y, x_test, y_test = (arrays[name] for name in names)
    return x, y, x_test, y_test


if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(
        __name__,
        {
            "grey_images": "load_grey_images",
            "cifar10": "load_cifar10",
            "cifar100": "load_cifar100",
            "tiny_shakespeare": "load_tiny_shakespeare",
            "numeric_table": "load_numeric_table",
            "boiling_points": "load_boiling_points",
        },
    )
