"""Says in a sentence why a file or a folder could not be read or written, and what to do about it."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import exists, isdir, islink
from pathlib import Path

from plywise.errors import FileError

_REASONS = {
    errno.EEXIST: "is there already: move it away, or name another place",
    errno.EACCES: "may not be read or written by you: change its permissions, or name another place",
    errno.EPERM: "may not be changed by you: change its permissions, or name another place",
    errno.EROFS: "is on a disk that is read-only: name another place",
    errno.ENOSPC: "does not fit on its disk, which is full: make room there, or name another place",
    errno.EDQUOT: "does not fit into your share of its disk: make room there, or name another place",
    errno.EISDIR: "is a folder, and plywise needs a file there: move it away, or name another place",
    errno.ELOOP: "is a link that cannot be followed: remove it, or name another place",
    errno.ENAMETOOLONG: "has a name that is too long for its disk: name another place",
    errno.ENXIO: (
        "is a pipe, a socket or a device, and plywise needs a file there: move it away, or name another place"
    ),
    errno.EIO: "cannot be read from or written to its disk, which may be failing: look after the disk",
    errno.ESTALE: "was removed on its disk in the network while it was in use: give the command again",
}
"""What is wrong with a path, and what to do, by the number of the system's error."""


def describe_failure(error: Exception, path: Path | None = None) -> str:
    """Return an error's reason without a period; for one of the system, what to do about its file, too.

    Args:
        error: the error.
        path: the file, for errors of the system that do not name theirs.

    Example:
        >>> describe_failure(IsADirectoryError(errno.EISDIR, "Is a directory", "runs/log.jsonl"))
        'runs/log.jsonl is a folder, and plywise needs a file there: move it away, or name another place'
    """
    named = getattr(error, "filename", None)
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else path
    if not isinstance(error, OSError) or not error.errno or path is None:
        return str(getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and (file := _find_file(path)):
        return f"{file} is a file, and plywise needs a folder there: move it away, or name another place"
    if error.errno in (errno.ENOENT, errno.EEXIST) and (link := _find_dangling(path)):
        return (
            f"{link} is a link to {link.readlink()}, which does not exist: make that, remove the link, or "
            "name another place"
        )
    if error.errno == errno.EACCES and not exists(path):
        above = next((one for one in path.parents if exists(one)), path.parent)
        return (
            f"{path} cannot be made or read, since {above} is closed to you: change the permissions of that "
            "folder, or name another place"
        )
    if error.errno == errno.ENOENT:
        return f"There is no file {path}"
    reason = _REASONS.get(error.errno)
    return f"{path} {reason}" if reason else f"{path}: {error.strerror or error}"


def require_file(path: Path) -> Path:
    """Return the path of a file that is about to be opened: opening a pipe may wait for ever.

    A path where nothing is, or a folder, is returned, too: opening it raises the system's own error.

    Raises:
        OSError: a pipe, a socket or a device is there; with the number that the system gives for sockets.
    """
    if os.path.exists(path):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))
    return path


@contextmanager
def explaining_files() -> Iterator[None]:
    """Turn errors of the system about a path that leave the block into `FileError`, which says what to do.

    Raises:
        FileError: a file or a folder could not be read or written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of a network, or a pipe
            raise
        made = FileError(f"{describe_failure(error)}.")
        made.__notes__[:0] = getattr(error, "__notes__", ())
        raise made from error


def _find_file(path: Path) -> Path | None:
    """Find what is there and no folder: the path, or one above it."""
    return next((one for one in (path, *path.parents) if exists(one) and not isdir(one)), None)


def _find_dangling(path: Path) -> Path | None:
    """Find the link that leads to nothing: the path, or one above it."""
    return next((one for one in (path, *path.parents) if islink(one) and not exists(one)), None)
