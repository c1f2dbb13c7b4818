"""Where trials are kept: one JSON line each, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from plywise.arena.scoring.records import Key, key_of
from plywise.errors import PlywiseError


class Ledger:
    """The trials of an experiment, appended to a file as they end.

    A line that a crash cut off is taken away before the next is written. What could not be written, on a full
    disk, leaves the lines before as they were.

    Args:
        path: the file; made where missing. None: trials are kept in memory alone.

    Raises:
        PlywiseError: a line before the last is no JSON: somebody else has written there.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.lines = {key_of(line): line for line in read(path)}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one who adds trials, from what the file holds now.

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
            raise PlywiseError(
                f"Another process is adding trials to {self.path}. Let it finish or end it, or name another "
                "folder.",
                see="error-bench",
            ) from error
        try:
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
            self.lines = {key_of(line): line for line in read(self.path)}
            yield
        finally:
            lock.release()

    def add(self, line: dict[str, Any]) -> None:
        """Append a trial, within `writing`.

        Raises:
            PlywiseError: it could not be written; the file is as it was before.
        """
        if self.path is None:
            self.lines[key_of(line)] = line
            return
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        before = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                self.lines[key_of(line)] = line  # from here on it is kept, whoever interrupts
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, before)
            self.lines.pop(key_of(line), None)
            raise PlywiseError(
                f"A trial could not be written to {self.path}: {error.strerror}. The {len(self.lines)} "
                "trials before are kept; make room, and go on.",
                see="error-bench",
            ) from error

    def __contains__(self, key: Key) -> bool:
        return key in self.lines


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The trials of a file; none if it is not there.

    A last line without its end is just being written, or was cut off by a crash: it is no trial.

    Raises:
        PlywiseError: a line is no trial.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    for number, text in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            line = json.loads(text)
            key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise PlywiseError(
                f"Line {number} of {path} is no trial of a bench ({error!r}).", see="error-bench"
            ) from error
        yield line
