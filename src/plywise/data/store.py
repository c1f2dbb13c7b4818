"""Finds data files, fetches public ones, and caches arrays that are slow to decode.

Files are searched in the folder that ``PLYWISE_DATA`` names, or otherwise in ``../shared/data`` beside the
repository if there is such a folder. Then follows the cache, ``~/.cache/plywise`` (``XDG_CACHE_HOME`` moves
it), to which `fetch` writes. Only `fetch` uses the network.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.files import written_whole
from plywise._util.renamed import serve_old_names
from plywise._util.suggest import suggestion
from plywise.errors import DataError, PlywiseError

DEADLINE = 600.0
"""The seconds within which a mirror must deliver a file."""
STALL = 20.0
"""The seconds without a byte after which a mirror is given up."""
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Remote:
    """A public file.

    Attributes:
        file: its path below the cache's folder.
        sha256: its digest.
        mirrors: addresses of the file, tried in order.
    """

    file: str
    sha256: str
    mirrors: tuple[str, ...]


def _list_idx_files(folder: str, mirrors: tuple[str, ...], hashes: tuple[str, ...]) -> tuple[Remote, ...]:
    return tuple(
        Remote(f"{folder}/{name}", sha256, tuple(mirror + name for mirror in mirrors))
        for name, sha256 in zip(IDX_FILES, hashes, strict=True)
    )


IDX_FILES = tuple(
    f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)
"""Names of the four files of MNIST and Fashion-MNIST: training images and labels, test images and labels."""

SETS: dict[str, tuple[Remote, ...]] = {
    "mnist": _list_idx_files(
        "mnist",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": _list_idx_files(
        "fashion_mnist",
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar10": (
        Remote(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        ),
    ),
    "cifar100": (
        Remote(
            "cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        ),
    ),
    "tinyshakespeare": (
        Remote(
            "tinyshakespeare.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            (
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt",
            ),
        ),
    ),
}
"""Public data sets that `fetch` knows."""

SOURCES = {
    "uci_concrete": "the UCI repository's Concrete Compressive Strength (doi:10.24432/C5PK67): 8 inputs, "
    "then the strength",
    "uci_energy": "the UCI repository's Energy Efficiency (doi:10.24432/C51307): 8 inputs, then the heating "
    "load",
    "california_housing": "the 1990 census table of California's districts (github.com/ageron/handson-ml2): "
    "8 numbers, 5 columns of 0 and 1 for the nearness of the ocean, then the median house value",
    "compounds": "a table of the boiling points in github.com/CalebBell/chemicals, with columns smiles, "
    "molar_mass and tb_K",
}
"""Origin and content of the data sets that the user must convert to a table first."""


def get_cache_folder() -> Path:
    """Return the folder of fetched files and decoded arrays, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plywise"


def list_folders() -> list[Path]:
    """Return the folders in which files are searched, in this order."""
    if named := os.environ.get("PLYWISE_DATA"):
        return [Path(named), get_cache_folder()]
    beside = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    return [*([beside] if beside.is_dir() else []), get_cache_folder()]


def find_file(*files: str) -> Path | None:
    """Find the first existing one of some files; each folder is searched for all of them."""
    return next(
        (found for folder in list_folders() for file in files if (found := folder / file).is_file()), None
    )


def make_missing_error(name: str, *files: str) -> PlywiseError:
    """Make the error for a missing data set: its files, the searched folders, where to get it."""
    places = " nor in ".join(str(folder) for folder in list_folders())
    how = (
        f"With a network, `plywise workloads fetch {name}` downloads it. Or put"
        if name in SETS
        else f"plywise cannot download it; it is {SOURCES.get(name, 'your own')}. Put"
    )
    return DataError(
        f"The data set {name!r} is missing: {' or '.join(files)} is neither in {places}. {how} the file "
        "into one of these folders, or name its folder in PLYWISE_DATA."
    )


def fetch(name: str, *, deadline: float = DEADLINE) -> list[Path]:
    """Download a public data set into the cache; complete files are not downloaded again.

    Args:
        name: one of `SETS`.
        deadline: the seconds that each mirror has for each file.

    Returns:
        The files.

    Raises:
        PlywiseError: there is no such set, or no mirror delivers a file; the message lists what each did.
    """
    if name not in SETS:
        raise DataError(
            f"No data set called {name!r} can be fetched. {suggestion(name, tuple(SETS))}There are: "
            f"{', '.join(SETS)}."
        )
    return [_fetch(remote, get_cache_folder() / remote.file, deadline) for remote in SETS[name]]


def cache_decoded(
    key: str, decode: Callable[[], dict[str, NDArray[np.uint8]]]
) -> dict[str, NDArray[np.uint8]]:
    """Cache arrays that are slow to decode, under a key, as ``.npy`` files that are memory-mapped.

    Args:
        key: identifies the source of the arrays.
        decode: makes the arrays, by name. The names are also kept.
    """
    folder = get_cache_folder() / "decoded" / key
    index = folder / "names.txt"  # written last: if it exists, all exist
    try:
        names = require_file(index).read_text(encoding="utf-8").split()
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError):
        pass  # missing or damaged arrays are made again
    arrays = decode()
    try:
        for name, array in arrays.items():
            with written_whole(folder / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        with written_whole(index) as file:
            file.write("\n".join(arrays).encode())
    except OSError as error:
        warnings.warn(
            f"Decoded data cannot be kept in {folder}: {describe_failure(error)}. They are made again.",
            stacklevel=2,
        )
    return arrays


def _fetch(remote: Remote, path: Path, deadline: float) -> Path:
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == remote.sha256:
        return path
    failures = []
    for mirror in remote.mirrors:
        try:
            _download(mirror, path, remote.sha256, deadline)
            return path
        except (OSError, http.client.HTTPException, _MirrorError) as error:
            failures.append(f"{mirror}: {_describe(error)}")
    raise DataError(
        f"{remote.file} could not be fetched. {'; '.join(failures)}. Put the file at {path} yourself, or "
        "name its folder in PLYWISE_DATA."
    )


def _describe(error: Exception) -> str:
    """Describe why a mirror failed, without the words that urllib puts around it."""
    reason = error.reason if type(error) is urllib.error.URLError else error
    return describe_failure(reason) if isinstance(reason, Exception) else str(reason)


class _MirrorError(Exception):
    """A mirror delivers another file, or is too slow."""


def _download(url: str, path: Path, sha256: str, deadline: float) -> None:
    end = time.monotonic() + deadline
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(url, timeout=min(STALL, deadline)) as answer,
        written_whole(path) as file,
    ):
        while chunk := answer.read1(_CHUNK):  # what has arrived: slow mirrors must not exceed the deadline
            digest.update(chunk)
            file.write(chunk)
            if time.monotonic() > end:
                raise _MirrorError(f"it was not done after {deadline:g} s")
        if digest.hexdigest() != sha256:
            raise _MirrorError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")


if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = serve_old_names(
        __name__, {"find": "find_file", "folders": "list_folders", "cache_folder": "get_cache_folder"}
    )
