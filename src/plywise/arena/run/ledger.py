"""Keeps trials in a file, one JSON line each, written whole or not at all, with a check at its end."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.files import remove_unfinished, require_writable, written_whole
from plywise._util.sealed import is_sealed, seal, unseal
from plywise.arena.scoring.records import Key, make_key
from plywise.errors import BenchError


class Ledger:
    """The trials of an experiment, appended to a file as they end.

    A line that a crash cut off is removed before the next one is written. A failed write, as on a full disk,
    leaves the earlier lines as they were. Damaged lines, as a power cut leaves them, are not read as trials.

    Args:
        path: the file; made where missing. None: trials are kept in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        require_writable(path.parent)
        path.touch()
        self.lines = {make_key(line): line for line, _ in _split(path)[0]}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the file for adding trials, and read what it holds now.

        Damaged lines are moved to a file beside it, with a warning: their trials are lost.

        Raises:
            PlywiseError: another process is adding trials.
        """
        if self.path is None:
            yield
            return
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise BenchError(
                f"Another process is adding trials to {self.path}. Let it finish or end it, or name another "
                "folder."
            ) from error
        try:
            remove_unfinished(self.path)
            os.truncate(self.path, require_file(self.path).read_bytes().rfind(b"\n") + 1)
            _set_damaged_aside(self.path)
            self.lines = {make_key(line): line for line in read(self.path)}
            yield
        finally:
            lock.release()

    def add(self, line: dict[str, Any]) -> None:
        """Append a trial, within `writing`.

        Raises:
            PlywiseError: it could not be written; the file is as it was before.
        """
        if self.path is None:
            self.lines[make_key(line)] = line
            return
        text = seal(json.dumps(line, ensure_ascii=False, allow_nan=False)) + "\n"
        before = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                self.lines[make_key(line)] = line  # from here on it is kept, whatever interrupts
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, before)
            self.lines.pop(make_key(line), None)
            raise BenchError(
                f"A trial could not be written: {describe_failure(error, self.path)}. The {len(self.lines)} "
                "trials before are kept."
            ) from error

    def __contains__(self, key: Key) -> bool:
        return key in self.lines


def read(path: Path, again: str = "The command that wrote them") -> Iterator[dict[str, Any]]:
    """Yield the trials of a file; none if it is not there.

    A last line without its end is just being written, or was cut off by a crash: it is not a trial.

    Args:
        path: the file.
        again: what runs trials again whose lines are damaged, as the first words of a sentence.

    Raises:
        PlywiseError: a line is not a trial, or not what was written.
    """
    whole, damaged = _split(path)
    if damaged:
        number, _, why = damaged[0]
        raise BenchError(
            f"Line {number} of {path} is not a trial of a bench, or damaged ({why}). "
            f"{again} sets such lines aside, and runs their trials again."
        )
    return (line for line, _ in whole)


def _set_damaged_aside(path: Path) -> None:
    whole, damaged = _split(path)
    if not damaged:
        return
    aside = path.with_suffix(".damaged")
    with require_file(aside).open("ab") as file:
        file.write(b"".join(text + b"\n" for _, text, _ in damaged))
    with written_whole(path) as file:
        file.write(b"".join(text + b"\n" for _, text in whole))
    numbers = ", ".join(str(number) for number, _, _ in damaged)
    warnings.warn(
        f"{path} is damaged in line {numbers} ({damaged[0][2]}). What was there is in {aside.name} "
        "now, and those trials will be run again.",
        RuntimeWarning,
        stacklevel=4,
    )


def _split(path: Path) -> tuple[list[tuple[dict[str, Any], bytes]], list[tuple[int, bytes, str]]]:
    """Return a file's trials with their text, and damaged lines with number, text and reason.

    Only the oldest lines have no check; a later line without one has lost it. A trial counts once, also where
    its line is there twice.
    """
    whole: dict[Key, tuple[dict[str, Any], bytes]] = {}
    damaged: list[tuple[int, bytes, str]] = []
    content = require_file(path).read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    sealed = False
    for number, text in enumerate(content.split(b"\n") if content else (), 1):
        try:
            words = text.decode()
            line = unseal(words)
            key = make_key(line)
            if sealed and not is_sealed(words):
                raise ValueError("its check is lost")
            if whole.get(key, (None, text))[1] != text:
                raise ValueError("a line before it has another result of the same trial")
        except (ValueError, KeyError, TypeError) as error:
            damaged.append((number, text, str(error) if isinstance(error, ValueError) else repr(error)))
        else:
            sealed = is_sealed(words)
            whole[key] = line, text
    return list(whole.values()), damaged
