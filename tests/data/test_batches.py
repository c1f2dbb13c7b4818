"""Batches of any nesting, and the parts that they are drawn from."""

import dataclasses
from collections import namedtuple
from itertools import islice

import pytest
import torch

from plywise.data.batches import (
    BatchWriter,
    Split,
    StoredBatches,
    clone_batch,
    count_samples,
    endless_batches,
    join_target,
    list_tensors,
    map_tensors,
    pack,
    split_target,
    take_samples,
    unpack,
    unpack_part,
)
from plywise.data.parts import Data, cut_tenths

Pair = namedtuple("Pair", "ids mask")


@dataclasses.dataclass
class Sample:
    ids: torch.Tensor
    more: dict
    name: str = "kept"


def make_nested(count=6):
    ids = torch.arange(count * 3).view(count, 3)
    return {
        "pair": Pair(ids, ids > 4),
        "sample": Sample(ids + 1, {"list": [ids * 2.5, (ids[:, 0],)]}),
        "shared": torch.arange(5.0),
        "note": "words stay",
    }


def is_equal(one, other):
    first, second = list_tensors(one), list_tensors(other)
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_batch_is_taken_apart_and_put_together():
    batch = make_nested()
    assert count_samples(batch) == 6
    assert [tuple(t.shape) for t in list_tensors(batch)] == [(6, 3), (6, 3), (6, 3), (6, 3), (6,), (5,)]
    rows = torch.tensor([4, 0])
    part = take_samples(batch, rows)
    assert torch.equal(part["pair"].ids, batch["pair"].ids[rows])
    assert torch.equal(part["sample"].more["list"][1][0], torch.tensor([12, 0]))
    assert isinstance(part["pair"], Pair)
    assert isinstance(part["sample"], Sample)
    assert torch.equal(part["shared"], batch["shared"]), "it has no row for each sample"
    assert (part["note"], part["sample"].name) == ("words stay", "kept")
    copied = clone_batch(batch)
    copied["pair"].ids.zero_()
    assert batch["pair"].ids.any()
    assert map_tensors(lambda t: None, batch)["sample"].more == {"list": [None, (None,)]}


def test_a_packed_batch_is_read_without_running_code(tmp_path):
    batch = make_nested()
    torch.save(pack(batch), tmp_path / "batch.pt")
    again = unpack(torch.load(tmp_path / "batch.pt", weights_only=True))
    assert is_equal(batch, again)
    assert (type(again["pair"]), type(again["sample"]), again["note"]) == (Pair, Sample, "words stay")


@pytest.mark.parametrize(
    "batch",
    [
        (1, 2),
        (1, 2, 3),
        {"ids": 1, "labels": 2},
        {"ids": 1, "y": 2},
        Sample(1, {}),
        Pair(1, 2),
    ],
)
def test_a_batch_that_was_split_can_be_joined_again(batch):
    x, y = split_target(batch)
    assert (y is None) == isinstance(batch, Sample | Pair), "those have no target by name"
    assert join_target(x, y) == batch


def store(folder, count=7, size=4):
    writer, batches = BatchWriter(folder), []
    for number in range(count):
        x = {"ids": torch.arange(size * 2).view(size, 2) + 100 * number, "name": "text"}
        batches.append((x, torch.arange(size) + number))
        writer.write(*batches[-1])
    return writer.finish(), batches


def test_stored_batches_come_back_as_they_were(tmp_path):
    part, batches = store(tmp_path)
    assert (len(part), part.count_places(), part.count_batches(99)) == (28, 7, 7)
    assert is_equal(list(part.chunks(1)), batches)
    order = torch.tensor([3, 0])
    assert is_equal(list(part.epoch(1, order)), [batches[3], batches[0]])
    assert [len(part.head(count)) for count in (1, 4, 5, 99)] == [4, 4, 8, 28]
    part, again = (unpack_part(torch_round(one.pack(), tmp_path)) for one in (part, part.pick([2])))
    assert is_equal(list(part.chunks(1)), batches)
    assert is_equal(list(again.chunks(1)), [batches[2]])


def torch_round(value, folder):
    torch.save(value, folder / "part.pt")
    return torch.load(folder / "part.pt", weights_only=True)


def test_a_stored_batch_takes_no_more_room_than_its_own_rows(tmp_path):
    whole = torch.zeros(100_000, 4)
    writer = BatchWriter(tmp_path)
    writer.write(whole[:2], whole[:2, 0])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000


def test_batches_never_end_and_depend_on_the_seed(tmp_path):
    part, _ = store(tmp_path)
    first = list(islice(endless_batches(part, 4, seed=1), 14))
    assert is_equal(first, list(islice(endless_batches(part, 4, seed=1), 14)))
    assert not is_equal(first, list(islice(endless_batches(part, 4, seed=2), 14)))
    for epoch in (first[:7], first[7:]):
        assert sorted(int(x["ids"][0, 0]) for x, _ in epoch) == [100 * number for number in range(7)]
    assert not is_equal(first[:7], first[7:]), "each epoch has an order of its own"


def test_an_epoch_of_samples_has_each_once_but_for_an_incomplete_batch():
    part = Split({"a": torch.arange(11), "b": (torch.arange(11.0),)}, torch.arange(11))
    drawn = list(islice(endless_batches(part, 4, seed=0), 2))
    places = torch.cat([y for _, y in drawn])
    assert len(places.unique()) == 8
    for x, y in drawn:
        assert torch.equal(x["a"], y)
        assert torch.equal(x["b"][0], y.float())
    assert [len(y) for _, y in part.chunks(4)] == [4, 4, 3]
    assert [len(y) for _, y in islice(endless_batches(part, 99, seed=0), 2)] == [11, 11]


def test_data_are_saved_and_told_apart_by_any_value(tmp_path):
    nested = Split(make_nested(20), torch.arange(20))
    stored, _ = store(tmp_path)
    data = Data(nested, stored, stored.pick([1, 2]))
    data.save(tmp_path / "data.pt")
    again = Data.load(tmp_path / "data.pt")
    assert is_equal(list(again.train.chunks(6)), list(nested.chunks(6)))
    assert is_equal(list(again.validation.chunks(6)), list(stored.chunks(6)))
    assert again.fingerprint() == data.fingerprint()
    changed = Data(nested, stored, stored.pick([2, 1]))
    assert changed.fingerprint() != data.fingerprint()
    nested.x["sample"].more["list"][0][3, 1] += 1
    assert Data(nested, stored, stored.pick([1, 2])).fingerprint() != again.fingerprint()


def test_nested_samples_are_cut_into_parts_and_repeated_ones_counted():
    x = {"a": torch.arange(50.0).repeat(2).unsqueeze(1), "b": torch.arange(50).repeat(2)}
    data = cut_tenths(x, torch.arange(100))
    ys = torch.cat([part.y for part in vars(data).values()])
    assert torch.equal(ys.sort().values, torch.arange(100))
    for part in vars(data).values():
        assert torch.equal(part.x["a"].squeeze(1), part.y.float() % 50)
    seen = set(data.train.x["b"].tolist())
    slow = {
        name: sum(value in seen for value in getattr(data, name).x["b"].tolist())
        for name in ("validation", "test")
    }
    assert data.count_repeated() == slow
    assert sum(slow.values()) > 5


def test_nodes_of_graphs_are_no_samples(tmp_path):
    """Pixels of two graphs are alike, but a batch of graphs is the same only as a whole."""
    nodes, edges = torch.zeros(6, 3), torch.arange(8).view(2, 4)
    parts = []
    for name, more in (("train", 0), ("validation", 1), ("test", 0)):
        (tmp_path / name).mkdir()
        writer = BatchWriter(tmp_path / name)
        writer.write({"x": nodes, "edges": edges + more}, torch.zeros(2))
        parts.append(writer.finish())
    assert Data(*parts).count_repeated() == {"validation": 0, "test": 6}


def test_a_part_moves_to_a_device(tmp_path):
    stored, _ = store(tmp_path)
    for part in (Split(make_nested(4), torch.arange(4)), stored):
        batch = next(iter(part.to("meta").chunks(2)))
        assert {tensor.device.type for tensor in list_tensors(batch)} == {"meta"}
    assert isinstance(stored.to("meta"), StoredBatches)
