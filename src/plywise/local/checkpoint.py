"""Checkpoints of a learner, which any number of processes can write and any other number can read.

Every state has its own file, ``NAME.pt``, in the format of ``torch.save``. It is read with
``weights_only=True``, so that no code in it is run. ``SHA256SUMS`` lists the digests of all files
(``sha256sum -c SHA256SUMS`` checks them, too), and every file's digest is checked before it is read. The
files of a step are written to a temporary folder and flushed to the disk. Then the folder is renamed, so that
a checkpoint is complete or absent. Each process writes its own files; processes only agree on the time.
"""

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from plywise._util.file_errors import describe_failure, require_file
from plywise._util.files import remove, sync_folder, written_whole
from plywise.errors import StateError

SUMS = "SHA256SUMS"
_NAME = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_SUM = ".sha256"

Agree = Callable[[bool], bool]
"""A function that waits until every process has called it, and returns whether all of them passed True."""


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


def save(
    folder: Path,
    step: int,
    states: Mapping[str, Any],
    keep: int = 3,
    *,
    first: bool = True,
    agree: Agree = lambda ok: ok,
) -> Path:
    """Write the states that this process holds; all processes that train together call this alike.

    Args:
        folder: where checkpoints are kept, each in a folder ``step_…`` of its own; all processes see it.
        step: number of steps done.
        states: by name; names differ between processes.
        keep: how many checkpoints stay, the newest.
        first: whether this process moves the folder; one of them does.
        agree: how the processes wait for each other.

    Raises:
        StateError: a process could not write. The checkpoints from before are as they were.
    """
    if keep < 1:
        raise StateError(
            f"keep is the number of checkpoints that stay, 1 or more, not {keep}.", see="state-run"
        )
    path = folder / f"step_{step:09d}"
    partial = path.with_suffix(_PARTIAL)

    def prepare() -> None:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"step_*{_PARTIAL}"):
                remove(left)
            partial.mkdir()

    def write() -> None:
        for name, state in states.items():
            _write(partial / f"{name}.pt", state)

    def move() -> None:
        if first:
            _write_sums(partial)
            _put_in_place(partial, path, keep)

    for work in (prepare, write, move):
        _run_together(work, agree, path)
    return path


def _run_together(work: Callable[[], None], agree: Agree, path: Path) -> None:
    """Do a part of the writing; fail in every process if it fails in one."""
    error = None
    try:
        work()
    except Exception as found:
        error = found
    if not agree(error is None):
        why = describe_failure(error) if error else "another process says why"
        raise StateError(f"The checkpoint {path} could not be written: {why}.", see="state-run") from error


def _write(path: Path, state: Any) -> None:
    """A state, and its digest beside it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with written_whole(path) as file:
        file.write(content)
    line = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    path.with_name(path.name + _SUM).write_text(line, encoding="ascii")


def _write_sums(partial: Path) -> None:
    """The digests of all states in one file, in place of one beside each."""
    parts = sorted(partial.glob(f"*{_SUM}"))
    with written_whole(partial / SUMS) as file:
        file.write(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    sync_folder(partial)


def _put_in_place(partial: Path, path: Path, keep: int) -> None:
    known, step = steps(path.parent), int(path.name.removeprefix("step_"))
    if later := [other for other in known if other > step]:
        warnings.warn(
            f"{path.parent} holds checkpoints of later steps ({', '.join(map(str, later))}), and restore "
            "takes the last one. Give each run a folder of its own.",
            stacklevel=2,
        )
    going = [_move_aside(path)] if path.exists() else []
    partial.rename(path)
    before = [_path(path.parent, other) for other in known if other < step]
    sync_folder(path.parent)  # before others go: one is always there
    going += [_move_aside(old) for old in before[: -(keep - 1) or None]]
    with suppress(OSError):  # the next one removes what is left
        for old in going:
            remove(old)


def _move_aside(path: Path) -> Path:
    """Rename a checkpoint that goes: it is never there in part."""
    return path.rename(path.with_suffix(f".old{_PARTIAL}"))


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order; partial ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name)))


def find_whole(folder: Path) -> tuple[int | None, dict[int, str]]:
    """Return the step of the last checkpoint that is as it was written; None if there is none.

    Every file of it is read and compared with its digest.

    Returns:
        The step; and for each later one, what is wrong with it.
    """
    damaged: dict[int, str] = {}
    for step in reversed(steps(folder)):
        try:
            for name in _names(path := _path(folder, step)):
                _content(path, name)
        except (_DamagedError, OSError) as error:
            damaged[step] = describe_failure(error)
        else:
            return step, damaged
    return None, damaged


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint to ``step_….damaged``, so that no run goes on from it; returns its path."""
    path = _path(folder, step)
    aside = path.with_suffix(".damaged")
    remove(aside)
    return path.rename(aside)


def load(
    folder: Path, step: int | None, names: Sequence[str], every: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read states.

    Args:
        folder: where checkpoints are kept.
        step: which one. None: the last that is not damaged; a warning says which ones are.
        names: the states to read.
        every: the names of all states that it must hold; just these if None.

    Raises:
        StateError: there is no such checkpoint, it holds states of other names, or it is damaged.
    """
    known = steps(folder)
    if not known or (step is not None and step not in known):
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        found = f"it has those of steps {', '.join(map(str, known))}" if known else "it has none"
        raise StateError(f"{folder} does not hold {which}: {found}.", see="state-run")
    path = _path(folder, _last_whole(folder) if step is None else step)
    try:
        held, wanted = _names(path), set(every or names)
        if held != wanted:
            raise StateError(
                f"{path} is another learner's: it holds {', '.join(sorted(held))}, not "
                f"{', '.join(sorted(wanted))}.",
                see="state-run",
            )
        states = {name: _read(path, name) for name in names}
        _check_steps(path, states)
        return states
    except (_DamagedError, OSError) as error:
        raise StateError(
            f"{path} cannot be read: it is damaged: {describe_failure(error)}.", see="state-run"
        ) from error


def _check_steps(path: Path, states: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that stands under the name of another step."""
    steps = [state["steps"] for state in states.values() if isinstance(state, dict) and "steps" in state]
    if any(_path(path.parent, step) != path for step in steps):
        raise _DamagedError(f"it holds the state after {steps[0]} steps, under the name of others")


def _last_whole(folder: Path) -> int:
    """Return the step of the last checkpoint that is not damaged; says which ones are."""
    step, damaged = find_whole(folder)
    if step is None:
        raise StateError(f"{format_damaged(folder, damaged)} There is no other.", see="state-run")
    if damaged:
        warnings.warn(
            f"{format_damaged(folder, damaged)} That of step {step} is taken.", RuntimeWarning, stacklevel=4
        )
    return step


def format_damaged(folder: Path, damaged: Mapping[int, str]) -> str:
    """Return what is wrong with which checkpoints, as a sentence.

    Example:
        >>> format_damaged(Path("runs"), {7: "learner.pt is missing"})
        'Of the checkpoints in runs, that of step 7 is damaged (learner.pt is missing).'
    """
    which = ", ".join(f"that of step {step} is damaged ({why})" for step, why in damaged.items())
    return f"Of the checkpoints in {folder}, {which}."


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}"


def _read(path: Path, name: str) -> Any:
    try:
        return torch.load(io.BytesIO(_content(path, name)), weights_only=True)
    except _DamagedError:
        raise
    except Exception as error:  # it is as it was written: then it holds what must not be run
        raise StateError(f"{path / name}.pt cannot be read: {error}", see="state-run") from error


def _sums(path: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's files, by their names."""
    try:
        lines = require_file(path / SUMS).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise _DamagedError(f"{SUMS} is missing") from None
    except ValueError:
        raise _DamagedError(f"{SUMS} is not text") from None
    parts = [line.split("  ", 1) for line in lines]
    if not parts or any(len(part) != 2 for part in parts):
        raise _DamagedError(f"{SUMS} is not a list of digests")
    return {name: digest for digest, name in parts}


def _names(path: Path) -> set[str]:
    """Return the states in a checkpoint: what is listed is there, and what is there is listed."""
    if _is_old(path):
        return {part.name for part in path.iterdir()}
    listed, there = set(_sums(path)), {part.name for part in path.iterdir()} - {SUMS}
    if listed != there:
        raise _DamagedError(f"{SUMS} and the files differ in {', '.join(sorted(listed ^ there))}")
    return {name.removesuffix(".pt") for name in listed}


def _content(path: Path, name: str) -> bytes:
    """Return the bytes of a state, as they were written."""
    if _is_old(path):
        return _old_content(path, name)
    content = require_file(path / f"{name}.pt").read_bytes()
    if hashlib.sha256(content).hexdigest() != _sums(path)[f"{name}.pt"]:
        raise _DamagedError(f"{name}.pt does not fit its digest")
    return content


# ---- checkpoints of plywise 0.1 ------------------------------------------------------------------------


def _is_old(path: Path) -> bool:
    """Return whether a checkpoint holds a folder of `torch.distributed.checkpoint` for each state."""
    return not (path / SUMS).exists() and (path / "learner").is_dir()


def _old_content(path: Path, name: str) -> bytes:
    """Return the bytes of a state of plywise 0.1, a tensor of bytes in the one file of its folder.

    The index beside it, ``.metadata``, is a pickle, which could run anything: it is not read. The file is a
    zip archive, whose own checksums are compared.
    """
    file = path / name / "__0_0.distcp"
    try:
        with zipfile.ZipFile(require_file(file)) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise _DamagedError(f"{name}/{file.name} does not fit its checksum")
        return torch.load(file, weights_only=True).numpy().tobytes()
    except _DamagedError:
        raise
    except Exception as error:  # zipfile's, pickle's, and torch's, which differ from release to release
        raise _DamagedError(f"{name}/{file.name}: {error}") from error
