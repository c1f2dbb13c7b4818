"""Checkpoints of a learner, by any number of processes for any number of processes.

Every state is a `torch.distributed.checkpoint` of its own, whoever holds it: the bytes of ``torch.save``,
read back with ``weights_only=True``. The states of a step are written beside their place, and their folder is
renamed: it is there whole or not at all. Processes write alone and only agree on when: torch's own way of
saving together would unpickle what they send to each other. (Its index, ``.metadata``, is a pickle in any
case: restore checkpoints that you trust.)
"""

import io
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from plywise.errors import StateError

_NAME = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"

Agree = Callable[[bool], bool]
"""Waits until every process has called it, and tells each whether all of them said yes."""


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
                shutil.rmtree(left)
            partial.mkdir()

    def write() -> None:
        for name, state in states.items():
            with _quietly():
                save_distributed({name: _blob(state)}, checkpoint_id=partial / name, no_dist=True)

    def move() -> None:
        if first:
            _put_in_place(partial, path, keep)

    for work in (prepare, write, move):
        error = None
        try:
            work()
        except (Exception, CheckpointException) as found:
            error = _cause(found)
        if not agree(error is None):
            why = error or "another process says why"
            raise StateError(
                f"The checkpoint {path} could not be written: {why}.", see="state-run"
            ) from error
    return path


def _put_in_place(partial: Path, path: Path, keep: int) -> None:
    known, step = steps(path.parent), int(path.name.removeprefix("step_"))
    if later := [other for other in known if other > step]:
        warnings.warn(
            f"{path.parent} holds checkpoints of later steps ({', '.join(map(str, later))}), and restore "
            "takes the last one. Give each run a folder of its own.",
            stacklevel=2,
        )
    going = [_aside(path)] if path.exists() else []
    partial.rename(path)
    before = [path.with_name(f"step_{other:09d}") for other in known if other < step]
    going += [_aside(old) for old in before[: -(keep - 1) or None]]
    for old in going:
        shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Rename a checkpoint that goes: it is never there in part."""
    return path.rename(path.with_suffix(f".old{_PARTIAL}"))


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order; partial ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name)))


def load(
    folder: Path, step: int | None, names: Sequence[str], every: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read states.

    Args:
        folder: where checkpoints are kept.
        step: which one; the last if None.
        names: the states to read.
        every: the names of all states that it must hold; just these if None.

    Raises:
        StateError: there is no such checkpoint, it holds states of other names, or it cannot be read.
    """
    known = steps(folder)
    if not known or (step is not None and step not in known):
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        found = f"it has those of steps {', '.join(map(str, known))}" if known else "it has none"
        raise StateError(f"{folder} does not hold {which}: {found}.", see="state-run")
    path = folder / f"step_{known[-1] if step is None else step:09d}"
    held, wanted = {part.name for part in path.iterdir()}, set(every or names)
    if held != wanted:
        raise StateError(
            f"{path} is another learner's: it holds {', '.join(sorted(held))}, not "
            f"{', '.join(sorted(wanted))}.",
            see="state-run",
        )
    try:
        return {name: _read(path, name) for name in names}
    except (Exception, CheckpointException) as error:
        raise StateError(f"{path} cannot be read: {_cause(error)}", see="state-run") from error


def _read(path: Path, name: str) -> Any:
    reader = FileSystemReader(path / name)
    size = reader.read_metadata().state_dict_metadata[name].size  # type: ignore[union-attr]
    blob = torch.zeros(size, dtype=torch.uint8)
    with _quietly():
        load_distributed({name: blob}, storage_reader=reader, no_dist=True)
    return torch.load(io.BytesIO(blob.numpy().tobytes()), weights_only=True)


def _cause(error: BaseException) -> BaseException:
    """What torch wraps in an exception that is no `Exception`."""
    if not isinstance(error, CheckpointException):
        return error
    return next((cause for cause, _ in error.failures.values()), error)


def _blob(state: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


class _quietly(warnings.catch_warnings):  # noqa: N801  (reads as a statement)
    """Without torch's remarks on its own use of itself."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
