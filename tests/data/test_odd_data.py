"""Odd files of users: read rightly and cut, or refused in a sentence that names the place and the remedy."""

import numpy as np
import pytest
import torch

from plywise.data.arrays import make_tensor
from plywise.data.own_data import cut_parts, read_parts
from plywise.data.training_data import take_training_data
from plywise.errors import PlywiseError

X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
Y = np.arange(60) % 3


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_table(rows, names="a,b,y", name="t.csv"):
    with open(name, "w", encoding="utf-8") as file:
        file.write("\n".join([names, *rows]) + "\n")
    return name


def write_images(folder, count=6, classes=("cat", "dog"), shape=(4, 6, 3), dtype=np.uint8, ending="png"):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads images")
    generator = np.random.default_rng(1)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, shape).astype(dtype)
            image.fromarray(pixels).save(folder / name / f"{number}.{ending}")
    return folder


def read_and_cut(address):
    parts = read_parts(str(address))
    return cut_parts(str(address), parts)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("größe", "日本", "a b")])
def test_colour_images_are_cut_into_parts(tmp_path, classes):
    write_images(tmp_path / "pets", classes=classes)
    (tmp_path / "pets" / classes[0] / "again").symlink_to(tmp_path / "pets")  # no endless walk
    whole = read_parts("pets")["train"]
    data = read_and_cut("pets").data
    found = torch.cat([part.x.flatten(1) for part in (data.train, data.validation, data.test)])
    assert sorted(found.tolist()) == sorted(whole.x.flatten(1).tolist())
    rows = {tuple(x): y for x, y in zip(whole.x.flatten(1).tolist(), whole.y.tolist(), strict=True)}
    assert [rows[tuple(x)] for x in data.train.x.flatten(1).tolist()] == data.train.y.tolist()


def test_arrays_in_the_order_of_columns_are_cut_into_parts():
    x = np.random.default_rng(0).normal(size=(60, 3, 4)).astype(np.float32)
    np.savez("f.npz", x_train=np.asfortranarray(x), y_train=Y)
    train = read_and_cut("f.npz").data.train
    rows = {tuple(row): y for row, y in zip(x.reshape(60, -1).tolist(), Y.tolist(), strict=True)}
    assert [rows[tuple(row)] for row in train.x.flatten(1).tolist()] == train.y.tolist()


def cut_short(folder):
    path = write_images(folder) / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])


def link_to_nothing(folder):
    (write_images(folder) / "cat" / "x.png").symlink_to("/nowhere.png")


def write_a_bomb(folder):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads images")
    image.new("1", (20000, 20000)).save(write_images(folder) / "cat" / "x.png")


@pytest.mark.parametrize("spoil", [cut_short, link_to_nothing, write_a_bomb])
def test_an_image_that_cannot_be_read_is_named(tmp_path, spoil):
    spoil(tmp_path / "pets")
    with pytest.raises(PlywiseError, match=r"cat/[0x].png is not an image that can be .*[^.]\. Repair it"):
        read_parts("pets")


@pytest.mark.parametrize(("dtype", "ending"), [(np.uint16, "png"), (np.float32, "tif")])
def test_pixels_of_more_than_8_bits_are_not_clipped(tmp_path, dtype, ending):
    write_images(tmp_path / "pets", shape=(4, 6), dtype=dtype, ending=ending)
    with pytest.raises(PlywiseError, match="more than 8 bits"):
        read_parts("pets")


def test_what_is_left_out_or_guessed_of_a_folder_is_said(tmp_path):
    write_images(tmp_path / "clear", shape=(4, 6, 4))
    assert "alpha channel" in " ".join(read_parts("clear").guesses)
    write_images(tmp_path / "more", classes=("train", "car"))
    (tmp_path / "more" / "bus").mkdir()
    guesses = " ".join(read_parts("more").guesses)
    assert "were taken as classes, though one is called train" in guesses
    assert "no image of class bus" in guesses
    for part in ("train", "val", "validation"):
        write_images(tmp_path / "parts" / part)
    with pytest.raises(PlywiseError, match="train, val, validation, of which two stand for one part"):
        read_parts("parts")


def test_arrays_go_by_the_names_of_parts_and_others_are_said():
    np.savez("v.npz", x_train=X, y_train=Y, x_val=X[:9], y_val=Y[:9], weights=Y)
    parts = read_parts("v.npz")
    assert {name: len(part) for name, part in parts.items()} == {"train": 60, "validation": 9}
    assert parts.guesses == ("v.npz: the arrays weights were left out.",)
    np.savez("v.npz", x_train=X, y_train=Y, x_val=X, y_val=Y, x_valid=X, y_valid=Y)
    with pytest.raises(PlywiseError, match="two stand for one part"):
        read_parts("v.npz")


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X, np.array(["a", "b", "c"])[Y], r"targets are of type <U1, .* numpy.unique"),
        (X, np.arange("2024-01", "2024-03", dtype="M8[D]"), r"targets are of type datetime64"),
        (np.zeros(60, [("a", "f4")]), Y, "inputs are of type .* which is not a number"),
        (X, np.array([{}] * 60), "pickled objects, and reading them would run code. Save arrays of numbers"),
    ],
)
def test_arrays_that_hold_no_numbers_are_refused(x, y, words):
    np.savez("n.npz", x_train=x, y_train=y)
    with pytest.raises(PlywiseError, match=words):
        read_parts("n.npz")


def test_a_list_of_words_is_no_list_of_numbers():
    with pytest.raises(PlywiseError, match=r"targets are words, and no numbers\. .* numpy\.unique"):
        make_tensor(["a", "b", "c"] * 20, "targets")


def test_long_floats_are_read():
    np.savez("n.npz", x_train=X.astype(np.longdouble), y_train=Y)
    assert torch.equal(read_parts("n.npz")["train"].x, torch.from_numpy(X))


@pytest.mark.parametrize(
    ("values", "gap"), [([0, 1, 2], None), ([1, 2, 3], 0), ([0, 5, 1000], 1), ([0, 1, 10**12], 2)]
)
def test_classes_without_a_sample_are_said(values, gap):
    np.savez("n.npz", x_train=X, y_train=np.array(values)[Y], x_test=X[:1], y_test=Y[2:3])
    guesses = " ".join(read_parts("n.npz").guesses)
    assert (f"class {gap} has no sample" in guesses) == (gap is not None)


@pytest.mark.parametrize("target", ["1,000", "12%", "$5", "1.000,5", "3,5"])
def test_numbers_as_people_write_them_are_no_words(target):
    with pytest.raises(PlywiseError, match=r"column 'y': .* is not a number. Write numbers without"):
        read_parts(write_table([f'{n},{n * 2},"{target}"' for n in range(30)]))


@pytest.mark.parametrize("word", ["1.2.3", "2024-01-01", "4x4", "cat"])
def test_words_with_digits_are_words(word):
    write_table([f"{n * 0.7},{n * 2},{word if n % 2 else 'other'}" for n in range(30)])
    assert read_parts("t.csv")["train"].y.unique().tolist() == [0, 1]


@pytest.mark.parametrize("bad", ["nan", "inf", "1e39", ""])
def test_the_column_that_lacks_a_number_is_named(bad):
    rows = [f"{n * 0.7},{n * 2},{n % 2}" for n in range(30)]
    with pytest.raises(PlywiseError, match="column 'b': the inputs hold NaN or infinity in 1 of 31"):
        read_parts(write_table([*rows, f"1,{bad},0"]))
    with pytest.raises(PlywiseError, match="column '': the targets hold NaN or infinity in 30 of 30"):
        read_parts(write_table([f"{row}," for row in rows], "a,b,y,"))


@pytest.mark.parametrize(
    ("row", "words"),
    [("1,2", "has 2 cells, the first line 3. A cell with a comma"), ('1,"2,0', "has 2 cells, the first")],
)
def test_rows_of_another_length_are_named(row, words):
    with pytest.raises(PlywiseError, match=rf"line 32: it {words}"):
        read_parts(write_table([*(f"{n},{n},0" for n in range(30)), row]))


@pytest.mark.parametrize("address", ["", "images.zip", "images.tar.gz", "data.json"])
def test_what_is_no_data_is_refused(address):
    with pytest.raises(PlywiseError, match=f"Data are module:name.* not {address!r}"):
        read_parts(address)
    if "images" in address:
        with pytest.raises(PlywiseError, match="Unpack the archive, and give the folder"):
            read_parts(address)


def test_the_ending_may_be_in_capitals():
    assert len(read_parts(write_table([f"{n},{n},0" for n in range(30)], name="T.CSV"))["train"]) == 30


def test_one_class_is_nothing_to_learn():
    np.savez("n.npz", x_train=X, y_train=np.zeros(60, np.int64))
    with pytest.raises(PlywiseError, match="all targets are class 0, so there is nothing to tell apart"):
        take_training_data("n.npz", read_parts("n.npz"))
