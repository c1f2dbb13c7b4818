"""A user's table with rows that repeat: the same inputs are never in two parts that plywise cuts."""

import itertools
import resource

import numpy as np
import pytest
import torch

from plywise._util.files import write_whole
from plywise.data.own_data import cut_parts
from plywise.data.parts import Data
from plywise.data.training_data import take_training_data
from plywise.errors import PlywiseError
from plywise.registry.resolve import resolve_data, resolve_parts

MODULE = """
import numpy as np
import torch

generator = torch.Generator().manual_seed(3)
rows = torch.randint(0, 3, (60, 4), generator=generator).float()
x = rows.repeat(5, 1)
y = torch.arange(300) % 3

def all_twins(): return x, y
def tested(): return x, y, rows[:5], y[:5]
def whole_numbers(): return x.long(), y
def images(): return x.view(300, 2, 2), y
def signs():
    zero = torch.zeros(300)
    return torch.stack([torch.cat([zero, -zero]), torch.arange(600.0) % 300], 1), y.repeat(2)
def few(): return (torch.arange(300) % 9).float().view(-1, 1), y
def drawn(): return torch.randn(40, 3), torch.randint(0, 3, (40,))
def drawn_by_numpy(): return np.random.randn(40, 3), np.random.randint(0, 3, 40)
def empty(): return torch.zeros(20, 0), torch.zeros(20)
"""


@pytest.fixture(autouse=True)
def _user(user_module):
    user_module("twins", MODULE)


def collect_rows(part):
    return {row.tobytes() for row in part.x.flatten(1).numpy()}


def share_rows(data, *names):
    """Say whether two parts have a row in common."""
    pairs = itertools.combinations([collect_rows(getattr(data, name)) for name in names], 2)
    return any(one & other for one, other in pairs)


def collect_samples(data: Data, *names):
    """Return all samples of some parts, in an order that does not depend on the split."""
    both = [
        torch.cat([getattr(data, n).x.flatten(1).float(), getattr(data, n).y[:, None].float()], 1)
        for n in names
    ]
    return sorted(map(tuple, torch.cat(both).tolist()))


ALL = ("train", "validation", "test")


@pytest.mark.parametrize("name", ["all_twins", "whole_numbers"])
def test_rows_that_repeat_stay_in_one_part(name):
    found = resolve_data(f"twins:{name}")
    whole = collect_samples(found.data, *ALL)
    assert len(whole) == 300, "each once, and none lost"
    images = resolve_data("twins:images").data
    assert whole == collect_samples(images, *ALL)
    assert share_rows(images, *ALL), "so it is without care, as with what is no table"
    assert not share_rows(found.data, *ALL)
    twins = 300 - len({row[:4] for row in whole})
    assert f"by a fixed seed, {twins} with the inputs of another kept beside it: " in found.cut
    sizes = [len(getattr(found.data, part).y) for part in ALL]
    assert min(sizes) > 0
    assert f": {sizes[0]} to train, {sizes[1]} to validate, {sizes[2]} to test" in found.cut
    again = resolve_data(f"twins:{name}").data
    assert again.fingerprint() == found.data.fingerprint()


def test_parts_drawn_from_training_samples_share_none_with_them():
    found = resolve_data("twins:tested")
    assert not share_rows(found.data, "train", "validation")
    assert collect_samples(found.data, "train", "validation") == collect_samples(
        resolve_data("twins:all_twins").data, *ALL
    )
    assert len(found.data.test.y) == 5, "the user's own part is as it was"
    assert "with the inputs of another kept beside it" in found.cut


@pytest.mark.parametrize("name", ["all_twins", "whole_numbers", "tested", "images", "signs", "few"])
def test_samples_that_the_training_part_has_too_are_counted(name):
    data = resolve_data(f"twins:{name}").data
    known = data.train.x.flatten(1)
    slow = {
        part: sum(bool((known == row).all(1).any()) for row in getattr(data, part).x.flatten(1))
        for part in ("validation", "test")
    }
    assert data.count_repeated() == slow
    assert (slow["test"] > 0) == (name in ("tested", "images", "few"))


def test_training_samples_are_not_in_the_order_of_the_table(tmp_path):
    """The training loss is measured on the first samples, which in a sorted table would have one class."""
    table = np.repeat(np.arange(400) / 400, 2)
    path = tmp_path / "sorted.csv"
    path.write_text("x,y\n" + "".join(f"{value},{int(2 * value)}\n" for value in table))
    found = resolve_data(str(path))
    assert "400 with the inputs of another kept beside it" in found.cut
    assert 20 < int(found.data.train.y[:100].sum()) < 80


def test_without_repeated_rows_the_split_is_unchanged(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y\n" + "".join(f"{number},{number % 7}.5\n" for number in range(50)))
    found = resolve_data(str(path))
    assert found.cut == "50 samples cut at random, by a fixed seed: 40 to train, 5 to validate, 5 to test"
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.data.train.x[:, 0], order[:40].float())


@pytest.mark.parametrize("name", ["all_twins", "signs"])
def test_a_file_is_cut_as_arrays_are_which_stay_as_they_were(tmp_path, name):
    """The table of a file is reordered in place; the arrays of a function belong to the user."""
    parts = resolve_parts(f"twins:{name}")
    x, y = parts["train"].x.clone(), parts["train"].y.clone()
    ours = cut_parts(name, parts).data
    assert torch.equal(parts["train"].x, x)
    assert torch.equal(parts["train"].x.signbit(), x.signbit())
    np.savez(tmp_path / "a.npz", x_train=x.numpy(), y_train=y.numpy())
    lines = [",".join(map(str, row)) for row in torch.cat([x, y[:, None]], 1).tolist()]
    (tmp_path / "a.csv").write_text("a,b,c,d,e\n"[-2 * len(x[0]) - 2 :] + "\n".join(lines))
    for file in ("a.npz", "a.csv"):
        data = resolve_data(str(tmp_path / file)).data
        for part, same in zip(data.parts, vars(ours).values(), strict=True):
            assert torch.equal(part.x, same.x)
            assert torch.equal(part.y, same.y)


def test_a_zero_has_no_sign():
    found = resolve_data("twins:signs")
    assert "300 with the inputs of another" in found.cut
    assert not share_rows(Data(*(type(p)(p.x + 0, p.y) for p in found.data.parts)), *ALL)


def test_too_few_distinct_inputs_are_reported():
    found = resolve_data("twins:few")
    assert "with only 9 different inputs, the same ones in several parts: 240 to train" in found.cut


def test_inputs_without_a_number_are_refused():
    with pytest.raises(PlywiseError, match="hold no number"):
        resolve_data("twins:empty")


@pytest.mark.parametrize("name", ["drawn", "drawn_by_numpy"])
def test_random_data_are_the_same_each_time(name):
    """Then a bench on them can resume; the random states of others do not change."""
    torch.manual_seed(5)
    once = resolve_data(f"twins:{name}").data.fingerprint()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert resolve_data(f"twins:{name}").data.fingerprint() == once
    first, second = (take_training_data("twins", resolve_parts(f"twins:{name}")) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def test_data_that_do_not_fit_into_memory_are_named(tmp_path):
    """A limit on the size of files simulates a full disk, for which torch has its own message."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = resolve_data("twins:all_twins").data
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            PlywiseError, match=r"could not be written to .*a\.pt: .* They take 1 MiB: .*another --out"
        ):
            data.save(tmp_path / "a.pt")
        with pytest.raises(OSError, match=r"File too large: '.*b\.txt'"):
            write_whole(tmp_path / "b.txt", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [tmp_path / "twins.py"]
