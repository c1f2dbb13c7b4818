"""The folder of one run, with its plan, its checkpoints and its logs.

Its files are checked when they are read, so that damage by a power cut or a failing disk is reported.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.files import remove, remove_unfinished, require_writable, write_whole
from plywise._util.sealed import is_sealed, seal, unseal
from plywise._util.version import __version__
from plywise.data.training_data import TrainingData
from plywise.errors import StateError
from plywise.local import checkpoint
from plywise.training.config import TrainConfig, make_config

JUDGED = {"accuracy", "error"}
"""Fields that only the last line of an epoch has."""
_LOGS = "log*.jsonl"
_START = "--fresh starts again in its place, another --out beside it."


@dataclass(frozen=True)
class RunRecord:
    """The plan, data and cuts that a run started with.

    Attributes:
        plan: by the flags' names.
        data: the data's fingerprint.
        starts: where the model was cut (see `plywise.training.build.ResolvedTraining.make_blocks`).
    """

    plan: Mapping[str, Any]
    data: str
    starts: tuple[int, ...]


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; `begin` makes it where it is missing.

    Attributes:
        checkpoints: the folder of the checkpoints in it.
        notes: sentences on damage found when the run started, and what was done about it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.notes: list[str] = []
        self._plan = path / "plan.json"
        self._lock: Callable[[], object] | None = None

    def record(self) -> RunRecord | None:
        """Read the record of the run in this folder; None if there is no run.

        Raises:
            StateError: it cannot be read.
        """
        if not lexists(self._plan):
            if checkpoint.steps(self.checkpoints):
                raise StateError(
                    f"{self.path} has checkpoints, but no plan.json to say of what. {_START}", see="state-run"
                )
            return None
        try:
            saved = unseal(require_file(self._plan).read_text(encoding="utf-8"))
            return RunRecord(dict(saved["plan"]), str(saved["data"]), tuple(map(int, saved["starts"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{self._plan} is not a plan of plywise, or damaged: {describe_failure(error)}. {_START}",
                see="state-run",
            ) from error

    def check(self, plan: TrainConfig, data: TrainingData) -> RunRecord | None:
        """Return the record of the run to go on with; None if there is none.

        Raises:
            StateError: what is in the folder is another plan's, or the checkpoints are gone.
        """
        record = self.record()
        if record is None:
            return None
        differences = plan.differences(record.plan)
        if record.data != data.fingerprint():
            theirs = record.plan.get("data")
            if theirs == plan.data:
                differences.append(f"what {plan.data} holds has changed since")
            else:
                differences.append(f"data is {theirs} there and {plan.data} here")
        if plan.split is not None and plan.split != record.starts:
            differences.append(f"split is {_join(record.starts)} there and {_join(plan.split)} here")
        if differences:
            raise StateError(
                f"{self.path} holds a run of another plan: {'; '.join(differences)}. {_START}",
                see="state-run",
            )
        if not checkpoint.steps(self.checkpoints) and any(path.stat().st_size for path in self._logs()):
            raise StateError(
                f"{self.path} has the log of a run, and no checkpoint in {self.checkpoints}: bring them "
                f"back to go on. {_START}",
                see="state-run",
            )
        return record

    def begin(
        self, plan: TrainConfig, data: TrainingData, starts: tuple[int, ...], *, fresh: bool
    ) -> int | None:
        """Prepare the folder: write the plan, and cut the logs back to the last checkpoint.

        Args:
            plan: the plan, which has passed `check`.
            data: the data.
            starts: where the model was cut.
            fresh: delete the run in the folder.

        Returns:
            The step of the checkpoint to go on from; None if there is none. A damaged one is set aside, and
            the one before it taken; ``notes`` say so.

        Raises:
            StateError: another process is at work in the folder; or all checkpoints are damaged.
        """
        self._hold()
        for path in (self._plan, *self._logs()):
            remove_unfinished(path)
        if fresh:
            self._clear()
        step = self._last_whole()
        record = {"plan": plan.as_json(), "data": data.fingerprint(), "starts": starts}
        text = json.dumps({"plywise": __version__, **record}, ensure_ascii=False, indent=1)
        write_whole(self._plan, seal(text) + "\n")
        logged: set[int] = set()
        for path in self._logs():
            kept, lost = cut_back(path, step or 0)
            logged |= kept
            if lost:
                self.notes.append(f"{path} is damaged: {lost} of its lines are lost.")
        if lacking := (step or 0) - len(logged):
            self.notes.append(f"The log in {self.path} lacks {lacking} of {step} steps.")
        return step

    def _last_whole(self) -> int | None:
        """Return the step of the last checkpoint that is not damaged; later ones are set aside."""
        step, damaged = checkpoint.find_whole(self.checkpoints)
        if step is None and damaged:
            raise StateError(
                f"{checkpoint.format_damaged(self.checkpoints, damaged)} There is no other. {_START}",
                see="state-run",
            )
        if damaged:
            aside = ", ".join(checkpoint.set_aside(self.checkpoints, other).name for other in damaged)
            self.notes.append(
                f"{checkpoint.format_damaged(self.checkpoints, damaged)} It goes on from step {step}; "
                f"renamed: {aside}."
            )
        return step

    def release(self) -> None:
        """Release the folder for other processes."""
        if self._lock is not None:
            self._lock()
            self._lock = None

    def _hold(self) -> None:
        """Make the folder, and lock it against other processes until this one releases it, or ends."""
        require_writable(self.path)
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        self.release()
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        self._lock = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise StateError(
                f"Another process is at work in {self.path}: wait for its end, or give another --out.",
                see="state-run",
            ) from error
        except OSError:  # a file system without locks
            pass

    def last_step(self) -> int | None:
        """Return the step of the last checkpoint; None if there is none."""
        steps = checkpoint.steps(self.checkpoints)
        return steps[-1] if steps else None

    def plan(self) -> TrainConfig:
        """Return the plan of the run in this folder.

        Raises:
            StateError: there is no run.
            PlywiseError: the plan is of another version of plywise.
        """
        record = self.record()
        if record is None:
            raise StateError(f"{self.path} holds no run.", see="state-run")
        return make_config(record.plan, str(self._plan))

    def last_line(self) -> dict[str, Any]:
        """Return the last line of all logs; empty if there is none."""
        lines = [line for path in self._logs() for line, _ in read_lines(path)]
        return max(lines, key=lambda line: (line["step"], bool(JUDGED & line.keys())), default={})

    def _logs(self) -> list[Path]:
        return sorted(self.path.glob(_LOGS))

    def _clear(self) -> None:
        """Remove a run's files and no others; the plan goes last, so that no run is without its plan."""
        for path in (*self._logs(), self.path / "tensorboard", self.checkpoints, self._plan):
            remove(path)


def _join(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers)) or "none"


def cut_back(path: Path, step: int) -> tuple[set[int], int]:
    """Drop a log's lines after ``step``, damaged lines, and an unfinished last line.

    Returns:
        The steps that have a line, and how many damaged lines there were.
    """
    content = require_file(path).read_bytes()
    lines = list(read_lines(path))
    kept = {line["step"]: text for line, text in lines if line["step"] <= step}
    whole = "".join(kept.values())
    if whole.encode() != content:
        write_whole(path, whole)
    return set(kept), content.count(b"\n") - len(lines)


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the lines of a log that are whole, read and as they are.

    Only the oldest lines have no check; a later line without one has lost it.
    """
    sealed = False
    with require_file(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        for text in file:
            try:
                line = unseal(text)
            except ValueError:
                continue
            whole = text.endswith("\n") and isinstance(line, dict) and isinstance(line.get("step"), int)
            if whole and (is_sealed(text) or not sealed):
                sealed = is_sealed(text)
                yield line, text
