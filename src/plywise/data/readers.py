"""Readers of the formats of public data sets, with numpy and the standard library only.

Each reader takes a path and returns arrays or text. A faulty file raises an error that names it. Files may be
compressed by gzip, whatever their names.
"""

import lzma
import math
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.memory import free_memory
from plywise.data.unpacking import check_size, open_unpacked, read_bytes
from plywise.errors import DataError, PlywiseError

Bytes = NDArray[np.uint8]

_IDX_DIMENSIONS = 32
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class _Cifar(NamedTuple):
    """A binary version of CIFAR: name, files (the last is the test set), labels for each row, classes."""

    name: str
    files: tuple[str, ...]
    labels: int
    classes: int


_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR10 = _Cifar(
    "CIFAR-10", (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"), 1, 10
)
_CIFAR100 = _Cifar("CIFAR-100", ("train.bin", "test.bin"), 2, 100)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8; line ends are not changed.

    Raises:
        PlywiseError: it cannot be read, or is not text.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}.") from error


def read_idx(path: Path) -> NDArray[np.generic]:
    """Read an array in the IDX format of MNIST.

    Returns:
        The array, in the byte order of this machine, with the shape and type that the file states.

    Raises:
        PlywiseError: it cannot be read, is not an IDX file, or holds more or less than its header states.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise DataError(
            f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}, not with 00 00, "
            "a type (08 for bytes) and the number of dimensions."
        )
    kind, dimensions = np.dtype(_IDX_TYPES[content[2]]), content[3]
    if dimensions > _IDX_DIMENSIONS:
        raise DataError(
            f"{path} says that its array has {dimensions} dimensions; the most are {_IDX_DIMENSIONS}. It is "
            "damaged: get it again."
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path} is cut short: it ends inside its header. Get it again.")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    _check_length(path, len(content), start + math.prod(shape) * kind.itemsize)
    array = np.frombuffer(content, kind, offset=start).reshape(shape)
    return array.astype(kind.newbyteorder("="), copy=False)


def read_cifar10_archive(path: Path) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Read CIFAR-10 as it is published: ``cifar-10-binary.tar.gz``.

    Returns:
        Training images (50000, 32, 32, 3) and labels (50000,), test images (10000, 32, 32, 3) and labels.

    Raises:
        PlywiseError: it cannot be read, is not such an archive, or lacks a batch.
    """
    return _read_cifar_archive(path, _CIFAR10)


def read_cifar100_archive(path: Path) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Read CIFAR-100 as it is published: ``cifar-100-binary.tar.gz``, with the 100 fine classes.

    Returns:
        Training images (50000, 32, 32, 3) and labels (50000,), test images (10000, 32, 32, 3) and labels.

    Raises:
        PlywiseError: it cannot be read, is not such an archive, or lacks a file.
    """
    return _read_cifar_archive(path, _CIFAR100)


def read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of a ``.npz`` file by name. Pickled objects are refused: they could run code.

    Raises:
        PlywiseError: there is no such file, it is damaged, it holds objects, or it does not fit into memory.
    """
    try:
        with require_file(path).open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    check_size(path, sum(info.file_size for info in archive.infolist()), free_memory())
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise DataError(f"{path} holds a single array (.npy), not named ones (.npz).")
            with arrays:
                return {name: arrays[name] for name in arrays.files}
    except PlywiseError:
        raise
    except OSError as error:
        raise DataError(f"{describe_failure(error, path)}.") from error
    except Exception as error:  # zipfile, zlib and numpy have errors of their own
        reason = str(error).rstrip(".")
        if "allow_pickle" in reason:
            reason = (
                "it holds pickled objects, and reading them would run code. Save arrays of numbers, by "
                "numpy.savez"
            )
        raise DataError(f"{path} cannot be read as a .npz file of arrays: {reason}.") from error


def read_colour_images(path: Path) -> tuple[Bytes, Bytes]:
    """Read colour images that are stored as prediction residuals, compressed by xz, in a ``.npz`` file.

    The file holds ``images_0``, ``images_1``, ... (each an xz stream), ``labels``, ``hw`` (height and width)
    and ``step``. Pixels come in raster order, channels as G, R, B. A value of G is predicted from its
    neighbours to the left, above and above left, by the median edge detector of LOCO-I; R and B from G and
    the same prediction of R-G and B-G. With ``step`` 1 the images are exact; a larger one is the step to
    which residuals were rounded.

    Returns:
        Images (N, height, width, 3) and labels (N,), bytes.

    Raises:
        PlywiseError: it cannot be read, or is not such a file.
    """
    arrays = read_npz(path)
    streams = [arrays[f"images_{number}"] for number in range(len(arrays)) if f"images_{number}" in arrays]
    if missing := [name for name in ("hw", "step", "labels") if name not in arrays]:
        raise DataError(f"{path} has no {', '.join(missing)}: it is not a file of colour images.")
    height, width = (int(size) for size in arrays["hw"])
    most = 3 * height * width * len(arrays["labels"])

    def decode(stream: NDArray[np.generic]) -> Bytes:
        # compressed data must not decide how much memory they take
        codes = np.frombuffer(lzma.LZMADecompressor().decompress(stream.tobytes(), most + 1), np.uint8)
        if len(codes) > most:
            raise ValueError(f"a part of it unpacks to more than {most} bytes")
        planes = codes.reshape(3, -1, height, width)  # G, R, B
        return _decode_images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), int(arrays["step"]))

    try:
        with ThreadPoolExecutor(2) as pool:  # numpy and lzma release the interpreter lock
            images = np.concatenate(list(pool.map(decode, streams)))
    except (lzma.LZMAError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}. Get it again.") from error
    if len(images) != len(arrays["labels"]):
        raise DataError(f"{path} has {len(images)} images and {len(arrays['labels'])} labels.")
    return images, arrays["labels"].astype(np.uint8)


def _decode_images(codes: Bytes, step: int) -> Bytes:
    """Decode images (N, height, width, 3) from codes (G R B, height, width, N), all images at once."""
    _, height, width, count = codes.shape
    values = np.zeros(codes.shape, np.int16)  # G, R-G, B-G
    images = np.empty((count, height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            green: NDArray[np.int16] | int = 0
            for plane, channel in enumerate((1, 0, 2)):
                guess = _predict(values[plane], y, x, 0 if plane else 128)
                if plane:
                    guess = np.clip(guess + green, 0, 255)
                code = codes[plane, y, x].astype(np.int16)
                residual = (code >> 1) ^ -(code & 1)  # 0, 1, 2, 3, ... are 0, -1, 1, -2, ...
                value = (guess + residual) & 255 if step == 1 else np.clip(guess + residual * step, 0, 255)
                images[:, y, x, channel] = value
                values[plane, y, x] = value - green
                green = green if plane else value
    return images


def _predict(values: NDArray[np.int16], y: int, x: int, first: int) -> NDArray[np.int16]:
    """Predict by the median edge detector: the plane through three neighbours, or one of them at an edge."""
    if not (x and y):
        if x or y:
            return values[y, x - 1] if x else values[y - 1, x]
        return np.full(values.shape[2], first, np.int16)
    left, above, corner = values[y, x - 1], values[y - 1, x], values[y - 1, x - 1]
    low, high = np.minimum(left, above), np.maximum(left, above)
    flat = left + above - corner
    return np.where(corner >= high, low, np.where(corner <= low, high, flat)).astype(np.int16)


def _read_cifar_archive(path: Path, kind: _Cifar) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    found: dict[str, tuple[Bytes, Bytes]] = {}
    try:
        with open_unpacked(path) as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
            for member in archive:  # file by file, so that the archive is never in memory as a whole
                name = Path(member.name).name
                if name not in kind.files or not member.isreg():
                    continue
                check_size(path, member.size, free_memory())
                if (file := archive.extractfile(member)) is not None:
                    found[name] = _read_cifar_batch(path / name, file.read(), kind)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a tar archive, or damaged: {error}. Get it again.") from error
    if missing := [name for name in kind.files if name not in found]:
        raise DataError(f"{path} has no {', '.join(missing)}: it is not {kind.name}'s binary version.")
    *train, test = (found[name] for name in kind.files)
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return images, labels, *test


def _read_cifar_batch(path: Path, content: bytes, kind: _Cifar) -> tuple[Bytes, Bytes]:
    """Read images and labels; of several labels in a row, take the last one, which is the fine class."""
    size = kind.labels + _CIFAR_PIXELS
    if len(content) % size or not content:
        raise DataError(
            f"{path} has {len(content):,} bytes, no multiple of the {size} that an image and its label take: "
            f"it is cut short, or no batch of {kind.name}'s binary version."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels, pixels = rows[:, kind.labels - 1], rows[:, kind.labels :]
    if labels.max() >= kind.classes:
        raise DataError(f"{path} has a label of {labels.max()}: it is not a batch of {kind.name}.")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.copy()


def _check_length(path: Path, found: int, expected: int) -> None:
    if found != expected:
        why = "it is cut short" if found < expected else "there is more in it"
        raise DataError(f"{path} has {found:,} bytes and its header says {expected:,}: {why}. Get it again.")
