"""Signals as bytes: what goes in comes out, in the same order of memory, and nothing else gets through."""

import pickle
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plywise.data.batches import list_tensors, map_tensors
from plywise.errors import PipelineError
from plywise.local.component import Signal
from plywise.pipeline.carried import restore_carried
from plywise.pipeline.wire import ALIGNED, DIMENSIONS, DTYPES, END, MAGIC, SLOTS, measure_size, pack, unpack

HEADER = 8 * SLOTS
SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=DIMENSIONS)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype and shape that the wire carries: dense, permuted, sliced, repeated, within a storage."""
    shape = draw(SHAPES)
    order = draw(st.permutations(range(len(shape))))
    way = draw(st.sampled_from(["dense", "permuted", "sliced", "expanded", "offset"]))
    if way == "sliced":
        base = torch.randn([2 * size + 1 for size in shape])
        made = base[tuple(slice(1, None, 2) for _ in shape)]
    elif way == "expanded":
        made = torch.randn([1 if number % 2 else size for number, size in enumerate(shape)]).expand(shape)
    elif way == "offset":
        made = torch.randn([3, *shape])[1]
    else:
        made = torch.randn(shape)
    if way == "permuted":
        made = made.permute(order)
    return (made * 100).to(draw(st.sampled_from(DTYPES)))  # keeps strides that leave no gaps


NESTED = st.recursive(
    tensors(),
    lambda inner: (
        st.dictionaries(st.text(), inner, min_size=1, max_size=2)
        | st.lists(inner | st.integers() | st.none() | st.text(), min_size=1, max_size=2)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and torch.equal(*(part.contiguous().view(-1).view(torch.uint8) for part in (found, wanted)))


@settings(max_examples=300, deadline=None)
@given(tensors(), tensors(), st.none() | tensors(), st.integers(0, 2**62), st.integers(0, 300), NESTED)
def test_round_trip(s: Tensor, y: Tensor, codes: Tensor | None, step: int, spare: int, carried: Any) -> None:
    """Bit for bit, with a model's inputs in any nesting; in a message that has room for more."""
    s, y = (part if part.dim() else part.reshape(1) for part in (s, y))
    signal = Signal(s, y, codes, carried)
    message = pack(signal, step, measure_size(signal) + spare)
    assert len(message) == measure_size(signal) + spare
    number, found = unpack(message.clone())
    assert number == step
    assert found is not None
    assert same(found.s, s)
    assert same(found.y, y)
    assert same(found.codes, codes)
    assert str(map_tensors(lambda t: None, found.carried)) == str(map_tensors(lambda t: None, carried))
    both = zip(list_tensors(found.carried), list_tensors(carried), strict=True)
    assert all(same(part, wanted) for part, wanted in both)


@dataclass
class Inputs:
    ids: Tensor


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (Inputs(torch.zeros(2)), "a Inputs among them does not go between stages"),
        ({1: torch.zeros(2)}, "a dict among them"),
        ([torch.zeros(2)] * 13, "carry 13 tensors .* has room for 12"),
    ],
)
def test_inputs_that_are_not_carried(odd: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        pack(Signal(torch.zeros(2), torch.zeros(2), carried=odd), 0, 10_000)


@pytest.mark.parametrize(
    "text", ["", "3", "[]", '["tensor", 1]', '["tensor", -1]', '["tensor", "0"]', '["x", 0]']
)
def test_a_broken_form_of_inputs(text: str) -> None:
    form = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    with pytest.raises(PipelineError, match="the model's inputs is broken"):
        restore_carried([form, torch.zeros(2)])


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_the_order_of_memory_is_kept(order: tuple[int, ...]) -> None:
    """Channels last, a transposed matrix ...: another order would be summed in another order."""
    dense = torch.randn(2, 3, 4, 5).permute(order)
    _, found = unpack(pack(Signal(dense, torch.zeros(2)), 0, 10_000))
    assert found is not None
    assert found.s.stride() == dense.stride()
    assert torch.equal(found.s, dense)


def test_gaps_do_not_travel() -> None:
    wide = torch.randn(10, 1000)[:, ::100]
    assert measure_size(Signal(wide, torch.zeros(10))) == HEADER + 448 + ALIGNED  # 400 and 40 bytes
    _, found = unpack(pack(Signal(wide, torch.zeros(10)), 0, 4000))
    assert found is not None
    assert torch.equal(found.s, wide)


def test_gradients_stay_behind() -> None:
    s = torch.randn(3, 2, requires_grad=True) * 2
    _, found = unpack(pack(Signal(s, torch.zeros(3)), 0, 4000))
    assert found is not None
    assert not found.s.requires_grad
    assert torch.equal(found.s, s)


def test_a_message_is_a_copy() -> None:
    """The next layer may write into what it gets, and the stage before into what it has sent."""
    s = torch.ones(4, 4)
    message = pack(Signal(s, torch.zeros(4)), 0, 4000)
    s.zero_()
    _, found = unpack(message)
    assert found is not None
    assert found.s.sum() == 16


def test_tensors_are_aligned() -> None:
    signal = Signal(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), torch.randn(5))
    _, found = unpack(pack(signal, 0, measure_size(signal)))
    assert found is not None
    assert found.codes is not None
    assert all(part.data_ptr() % ALIGNED == 0 for part in (found.s, found.y, found.codes))


def test_the_end() -> None:
    assert unpack(pack(None, END, HEADER)) == (END, None)
    assert unpack(pack(None, END, 5000)) == (END, None)


def test_a_batch_that_is_too_large() -> None:
    small = Signal(torch.zeros(4, 100), torch.zeros(4))
    with pytest.raises(PipelineError, match=r"A batch of 5 takes \d+ bytes.*begin with the largest batch"):
        pack(Signal(torch.zeros(5, 100), torch.zeros(5)), 0, measure_size(small))
    pack(small, 0, measure_size(small))


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 1, 1, 1, 1, 1, 1)],
    ids=["complex", "7 dims"],
)
def test_what_the_wire_does_not_carry(odd: Tensor) -> None:
    with pytest.raises(PipelineError, match="does not go between stages"):
        pack(Signal(odd, torch.zeros(2)), 0, 4000)


# ---- broken messages -----------------------------------------------------------------------------


def message_with(changes: dict[int, int], rows: int = 4) -> Tensor:
    """A good message with some integers of its header changed."""
    signal = Signal(torch.ones(rows, 3), torch.ones(rows, dtype=torch.int64), torch.ones(2, 2))
    message = pack(signal, 7, measure_size(signal))
    header = message[:HEADER].view(torch.int64)
    for slot, value in changes.items():
        header[slot] = value
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: MAGIC + 1}, "is not a message"),
        ({1: -2}, "header .* is broken"),
        ({2: len(DTYPES)}, "header .* is broken"),
        ({2: -2}, "header .* is broken"),
        ({3: DIMENSIONS + 1}, "header .* is broken"),
        ({3: -1}, "header .* is broken"),
        ({4: -1}, "header .* is broken"),
        ({4: 2**40}, "shorter than its header says"),
        ({4: 2**62, 5: 2**62}, "shorter than its header says"),
        ({10: 2**40}, "shorter than its header says"),
        ({10: 4}, "shorter than its header says"),
        ({11: -1}, "header .* is broken"),
        ({2: -1}, "lacks activations or targets"),
        ({16: -1}, "lacks activations or targets"),
        ({3: 3, 4: 2**62, 5: 2**62, 6: 0}, "header .* is broken"),
    ],
    ids=str,
)
def test_broken_headers(changes: dict[int, int], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        unpack(message_with(changes))


def test_the_header_is_where_these_tests_think() -> None:
    header = message_with({})[:HEADER].view(torch.int64).tolist()
    assert header[:6] == [MAGIC, 7, DTYPES.index(torch.float32), 2, 4, 3]
    assert header[10:12] == [3, 1]
    assert header[16:19] == [DTYPES.index(torch.int64), 1, 4]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.integers(1, SLOTS - 1), st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 9)),
    st.integers(0, 2600),
)
def test_no_header_reads_beyond_its_message(changes: dict[int, int], length: int) -> None:
    """Whatever integers come, the answer is an error, or tensors within the message."""
    message = message_with(changes)[:length].clone()
    try:
        _, found = unpack(message)
    except PipelineError:
        return
    if found is None:
        return
    start, end = message.data_ptr(), message.data_ptr() + len(message)
    for part in (found.s, found.y, found.codes):
        if part is not None and part.numel():
            reach = sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
            assert start <= part.data_ptr()
            assert part.data_ptr() + (reach + 1) * part.element_size() <= end


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=1000))
def test_other_bytes_are_no_message(noise: bytes) -> None:
    with pytest.raises(PipelineError, match="is not a message"):
        unpack(torch.frombuffer(bytearray(b"\0" + noise), dtype=torch.uint8))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "unpickled")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "trap"
    trap = pickle.dumps(Trap(path))
    with pytest.raises(PipelineError):
        unpack(torch.frombuffer(bytearray(trap.ljust(HEADER, b"\0")), dtype=torch.uint8))
    body = message_with({})
    body[HEADER : HEADER + len(trap)] = torch.frombuffer(bytearray(trap), dtype=torch.uint8)[
        : len(body) - HEADER
    ]
    unpack(body)
    assert not path.exists()
    pickle.loads(trap)
    assert path.exists()
