"""Reads files that may be compressed by gzip, and refuses those that would not fit into memory."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.memory import free_memory
from plywise.errors import DataError

_CHUNK = 1 << 20


@contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes; it is unpacked if it is compressed by gzip, whatever its name.

    Raises:
        PlywiseError: there is no such file, it cannot be read, or its compressed data are damaged; also while
            it is read.
    """
    try:
        with require_file(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed:
                with gzip.open(file) as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut short or damaged: {error}. Get it again.") from error
    except OSError as error:
        raise DataError(f"{describe_failure(error, path)}.") from error


def read_bytes(path: Path) -> bytearray:
    """Read a file, unpacked if it is compressed by gzip.

    Raises:
        PlywiseError: see `open_unpacked`; or it holds more than the free memory.
    """
    most, content = free_memory(), bytearray()
    with open_unpacked(path) as file:
        while chunk := file.read(_CHUNK):
            content += chunk
            check_size(path, len(content), most)
    return content


def check_size(path: Path, size: int, most: int | None) -> None:
    """Refuse a size that exceeds the free memory: a few kilobytes can unpack to terabytes of zeros.

    Raises:
        PlywiseError: there is not enough memory for so many bytes.
    """
    if most is not None and size > most:
        raise DataError(
            f"{path} holds more than {most / 2**20:,.0f} MiB once it is unpacked, and no more memory is free."
        )
