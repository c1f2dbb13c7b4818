"""Atomic files, also after a power cut, and folders for results."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

from plywise._util.file_errors import explaining_files
from plywise.errors import CommandError

_UNFINISHED = ".tmp"


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for bytes, which appears at ``path`` at the end, complete and on the disk, or not at all.

    Its folder is made where missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        # A rename is atomic only within one file system, hence the temporary file beside its target.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    try:
        with naming(path):
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else a power cut may keep the new name without what is in it
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the system that leave the block the path: a write that fails does not say where."""
    try:
        yield
    except OSError as error:
        if not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary file


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of writing a file with `written_whole`.

    The caller must hold the lock that each process holds which writes this file.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".plan.json.abcd1234.tmp").touch()
        >>> remove_unfinished(folder / "plan.json")
        >>> list(folder.iterdir())
        []
    """
    for left in path.parent.glob(f".{escape(path.name)}.*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove what is at a path, if anything is: a file, a link, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> Path:
    """Write ``text`` to ``path`` atomically, making its folder where missing; returns the path."""
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))
    return path


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    with suppress(OSError):  # not on Windows, and not on every network's disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_file(path: Path) -> None:
    """Raise PlywiseError if what should be a folder for results is a file, or a link to nothing."""
    if path.is_symlink() and not path.exists():
        raise CommandError(
            f"{path} is a link to {path.readlink()}, which does not exist: make this folder, or name another "
            "one with --out."
        )
    if path.exists() and not path.is_dir():
        raise CommandError(f"{path} is a file; --out names a folder.")


def make_folder(path: Path) -> None:
    """Make a folder for results, with those above it, where missing.

    Raises:
        PlywiseError: a file has its name, or it cannot be made.
    """
    refuse_file(path)
    with explaining_files():
        path.mkdir(parents=True, exist_ok=True)


def require_writable(path: Path) -> None:
    """Make a folder for results where missing, and check that files can be made in it.

    Raises:
        PlywiseError: see `make_folder`; or it is read-only.
    """
    make_folder(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise CommandError(
            f"Nothing can be written to the folder {path}: it is read-only, for you at least. Change that, "
            "or name another one with --out."
        )
