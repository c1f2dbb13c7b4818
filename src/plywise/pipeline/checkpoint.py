"""Checkpoints of a learner, by any number of processes for any number of processes.

`torch.distributed.checkpoint` writes one entry for each component, whoever holds it. An entry is the bytes of
``torch.save``, read back with ``weights_only=True``. A checkpoint is written beside its place and renamed:
it is there whole or not at all.
"""

import io
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from plywise.errors import StateError

_NAME = re.compile(r"step_(\d+)")


def save(
    folder: Path, step: int, states: Mapping[str, Any], keep: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write the states that this process holds; a collective of ``group``, or of this process alone.

    Args:
        folder: where checkpoints are kept, each in a folder ``step_…`` of its own.
        step: number of steps done.
        states: by name; names differ between processes.
        keep: how many checkpoints stay, the newest.
        group: the processes that save together.
    """
    path = folder / f"step_{step:09d}"
    partial = path.with_suffix(".partial")
    first = group is None or dist.get_rank(group) == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    blobs = {name: _blob(state) for name, state in states.items()}
    with _quietly():
        save_distributed(blobs, checkpoint_id=partial, process_group=group, no_dist=group is None)
    if first:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step_{old:09d}", ignore_errors=True)
    return path


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order; partial ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name)))


def load(folder: Path, step: int | None, names: list[str]) -> dict[str, Any]:
    """The states of these names, from the checkpoint of a step; the last one's if None.

    Raises:
        StateError: there is no such checkpoint, or it holds no such names.
    """
    known = steps(folder)
    if not known or (step is not None and step not in known):
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        found = f"it has those of steps {', '.join(map(str, known))}" if known else "it has none"
        raise StateError(f"{folder} does not hold {wanted}: {found}.")
    path = folder / f"step_{known[-1] if step is None else step:09d}"
    reader = FileSystemReader(path)
    sizes = reader.read_metadata().state_dict_metadata
    if missing := [name for name in names if name not in sizes]:
        raise StateError(
            f"{path} holds {', '.join(sorted(sizes))}, not {', '.join(missing)}: it is another learner's."
        )
    blobs: dict[str, Tensor] = {
        name: torch.zeros(sizes[name].size, dtype=torch.uint8)  # type: ignore[union-attr]
        for name in names
    }
    with _quietly():
        load_distributed(blobs, storage_reader=reader, no_dist=True)
    return {
        name: torch.load(io.BytesIO(blob.numpy().tobytes()), weights_only=True)
        for name, blob in blobs.items()
    }


def _blob(state: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


class _quietly(warnings.catch_warnings):  # noqa: N801  (reads as a statement)
    """Without torch's remarks on its own use of itself."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
