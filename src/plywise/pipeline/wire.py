"""A signal as bytes: one flat buffer of a fixed size, with a header that says what is in it.

One message a batch, so that backends without tags will do; a fixed size, so that it can be awaited before its
sizes are known. Nothing is unpickled: the header is integers, checked before anything is read. Strides are in
it: memory in another order (channels last) would be summed in another order, and other bits come of that.
"""

import math

import torch
from torch import Tensor

from plywise.errors import PipelineError
from plywise.local.component import Signal
from plywise.pipeline.carried import flatten_carried, restore_carried

MAGIC = 0x706C7977697365  # "plywise"
PARTS = 16  # tensors in a message: activations, targets, codes, and what is carried
SLOTS = 232  # integers in the header
DIMENSIONS = 6
ALIGNED = 64  # bytes: every tensor starts at a multiple
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)

END = -1
"""In place of the step: no batch follows."""

FIXED = 3  # tensors before those that are carried
_HEADER = 8 * SLOTS
_DESCRIPTION = 2 + 2 * DIMENSIONS  # dtype, dimensions, shape, strides
_BROKEN = "The header of a message from the stage before is broken."


def measure_size(signal: Signal) -> int:
    """Bytes of a signal on the wire."""
    return _HEADER + sum(_pad(part.nbytes) for part in _parts(signal) if part is not None)


def pack(signal: Signal | None, step: int, capacity: int) -> Tensor:
    """Return a signal, or None for the end, in a buffer of ``capacity`` bytes.

    Raises:
        PipelineError: it does not fit, or holds what the wire does not carry.
    """
    buffer = torch.zeros(capacity, dtype=torch.uint8)
    header = [MAGIC, step]
    if signal is not None:
        size = measure_size(signal)
        if size > capacity:
            raise PipelineError(
                f"A batch of {len(signal.y)} takes {size} bytes between stages, and the first one "
                f"took {capacity}: begin with the largest batch.",
                see="pipeline-batch",
            )
        parts, start = _parts(signal), _HEADER
        if len(parts) > PARTS:
            raise PipelineError(
                f"The blocks carry {len(parts) - FIXED - 1} tensors of the model's inputs along, and a "
                f"message between stages has room for {PARTS - FIXED - 1}: join some.",
                see="pipeline-batch",
            )
        for part in parts:
            if part is None:
                header += [-1] + [0] * (_DESCRIPTION - 1)
                continue
            dense = _dense(part)
            header += _describe(dense)
            flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
            buffer[start : start + len(flat)] = flat
            start += _pad(len(flat))
        header += [-1, *[0] * (_DESCRIPTION - 1)] * (PARTS - len(parts))
    header += [0] * (SLOTS - len(header))
    buffer[:_HEADER] = torch.tensor(header).view(torch.uint8)
    return buffer


def unpack(buffer: Tensor) -> tuple[int, Signal | None]:
    """Return the step, and its signal or None at the end. The tensors share the buffer's memory.

    Raises:
        PipelineError: the buffer does not hold a signal.
    """
    header = buffer[:_HEADER].view(torch.int64).tolist() if len(buffer) >= _HEADER else [0, 0]
    magic, step, *descriptions = header
    if magic != MAGIC:
        raise PipelineError(
            "What came from the stage before is not a message of a plywise pipeline.", see="pipeline-batch"
        )
    if step == END:
        return END, None
    parts: list[Tensor | None] = []
    start = _HEADER
    for i in range(PARTS):
        dtype, dimensions, *sizes = descriptions[i * _DESCRIPTION : (i + 1) * _DESCRIPTION]
        if dtype == -1:
            parts.append(None)
            continue
        if step < 0 or not 0 <= dtype < len(DTYPES) or not 0 <= dimensions <= DIMENSIONS or min(sizes) < 0:
            raise PipelineError(_BROKEN, see="pipeline-batch")
        shape, strides = sizes[:dimensions], sizes[DIMENSIONS : DIMENSIONS + dimensions]
        count = math.prod(shape)
        size = count * DTYPES[dtype].itemsize
        last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if start + size > len(buffer) or (count and last >= count):
            raise PipelineError(
                "A message from the stage before is shorter than its header says.", see="pipeline-batch"
            )
        flat = buffer[start : start + size].view(DTYPES[dtype])
        try:
            parts.append(flat.as_strided(shape, strides) if count else flat.reshape(shape))
        except RuntimeError as error:
            raise PipelineError(_BROKEN, see="pipeline-batch") from error
        start += _pad(size)
    s, y, codes, *carried = parts
    if s is None or y is None:
        raise PipelineError(
            "A message from the stage before lacks activations or targets.", see="pipeline-batch"
        )
    return step, Signal(s, y, codes, restore_carried([part for part in carried if part is not None]))


def _parts(signal: Signal) -> list[Tensor | None]:
    return [signal.s, signal.y, signal.codes, *flatten_carried(signal.carried)]


def _pad(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _dense(part: Tensor) -> Tensor:
    """On the CPU and without gaps; dimensions stay in the order in which they lie in memory."""
    part = part.detach().cpu()
    like = torch.empty_like(part, memory_format=torch.preserve_format)
    return part if like.stride() == part.stride() else like.copy_(part)


def _describe(part: Tensor) -> list[int]:
    if part.dtype not in DTYPES or part.dim() > DIMENSIONS:
        raise PipelineError(
            f"A tensor of {part.dtype} with {part.dim()} dimensions does not go between stages.",
            see="pipeline-batch",
        )
    rest = [0] * (DIMENSIONS - part.dim())
    return [DTYPES.index(part.dtype), part.dim(), *part.shape, *rest, *part.stride(), *rest]
