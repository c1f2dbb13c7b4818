"""A signal as bytes: one flat buffer of a fixed size, with a header that says what is in it.

One message a batch, so that backends without tags will do; a fixed size, so that it can be awaited before its
sizes are known. Nothing is unpickled: the header is integers, checked before anything is read.
"""

import torch
from torch import Tensor

from plywise.errors import PipelineError
from plywise.local.component import Signal

MAGIC = 0x706C7977697365  # "plywise"
SLOTS = 32  # integers in the header
DIMENSIONS = 6
ALIGNED = 64  # bytes: every tensor starts at a multiple
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)

END = -1
"""In place of the step: no batch follows."""


def size_of(signal: Signal) -> int:
    """Bytes of a signal on the wire."""
    return 8 * SLOTS + sum(_padded(part) for part in _parts(signal) if part is not None)


def packed(signal: Signal | None, step: int, capacity: int) -> Tensor:
    """A signal, or None for the end, in a buffer of ``capacity`` bytes.

    Raises:
        PipelineError: it does not fit, or holds what the wire does not carry.
    """
    buffer = torch.zeros(capacity, dtype=torch.uint8)
    header = [MAGIC, step]
    if signal is not None:
        if size_of(signal) > capacity:
            raise PipelineError(
                f"A batch of {len(signal.y)} takes {size_of(signal)} bytes between stages, and the first one "
                f"took {capacity}: begin with the largest batch."
            )
        start = 8 * SLOTS
        for part in _parts(signal):
            header += _described(part)
            if part is not None:
                data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                buffer[start : start + len(data)] = data
                start += _padded(part)
    header += [0] * (SLOTS - len(header))
    buffer[: 8 * SLOTS] = torch.tensor(header).view(torch.uint8)
    return buffer


def unpacked(buffer: Tensor) -> tuple[int, Signal | None]:
    """The step, and its signal or None at the end. The tensors share the buffer's memory.

    Raises:
        PipelineError: the buffer does not hold a signal.
    """
    header = buffer[: 8 * SLOTS].view(torch.int64).tolist()
    magic, step, *descriptions = header
    if magic != MAGIC:
        raise PipelineError("What came from the stage before is no message of a plywise pipeline.")
    if step == END:
        return END, None
    parts: list[Tensor | None] = []
    start = 8 * SLOTS
    for i in range(3):
        dtype, dimensions, *shape = descriptions[i * (2 + DIMENSIONS) : (i + 1) * (2 + DIMENSIONS)]
        if dtype == -1:
            parts.append(None)
            continue
        if not (0 <= dtype < len(DTYPES) and 0 <= dimensions <= DIMENSIONS and min(shape) >= 0):
            raise PipelineError("The header of a message from the stage before is broken.")
        like = torch.empty(shape[:dimensions], dtype=DTYPES[dtype], device="meta")
        size = like.numel() * like.element_size()
        if start + size > len(buffer):
            raise PipelineError("A message from the stage before is shorter than its header says.")
        parts.append(buffer[start : start + size].view(like.dtype).reshape(like.shape))
        start += _padded(like)
    s, y, codes = parts
    if s is None or y is None:
        raise PipelineError("A message from the stage before lacks activations or targets.")
    return step, Signal(s, y, codes)


def _parts(signal: Signal) -> tuple[Tensor | None, ...]:
    return signal.s, signal.y, signal.codes


def _padded(part: Tensor) -> int:
    return -(-part.numel() * part.element_size() // ALIGNED) * ALIGNED


def _described(part: Tensor | None) -> list[int]:
    if part is None:
        return [-1] + [0] * (1 + DIMENSIONS)
    if part.dtype not in DTYPES or part.dim() > DIMENSIONS:
        raise PipelineError(
            f"A tensor of {part.dtype} with {part.dim()} dimensions does not go between stages."
        )
    return [DTYPES.index(part.dtype), part.dim(), *part.shape] + [0] * (DIMENSIONS - part.dim())
