"""What plywise guesses about a user's data: the right thing, said, and overruled by one flag."""

import numpy as np
import pytest
import torch

from plywise.data.own_data import read_parts
from plywise.data.reading import ReadOptions
from plywise.data.sources import Reading
from plywise.errors import PlywiseError
from plywise.registry.resolve import resolve_data


def table(folder, target, header="a,b,y"):
    path = folder / "t.csv"
    lines = [f"{number / 7:.3f},{number % 5},{value}" for number, value in enumerate(target)]
    path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return str(path)


def read(address, options=""):
    parts = read_parts(address, Reading(ReadOptions.parse(options)))
    return parts["train"], " ".join(parts.guesses)


def test_columns_of_one_name_are_all_inputs(tmp_path):
    train, guesses = read(table(tmp_path, [0.5] * 12, "a,a,y"))
    assert train.x.shape == (12, 2)
    assert torch.equal(train.x[:, 1], torch.arange(12) % 5.0)
    assert guesses == ""


def test_a_second_column_of_the_target_s_name_is_said(tmp_path):
    path = table(tmp_path, [0.5] * 12, "a,y,y")
    _, guesses = read(path)
    assert "has 2 columns 'y': the last one was taken as the target, the others as inputs." in guesses
    with pytest.raises(PlywiseError, match="has 2 columns 'y': give the target a name of its own"):
        read(path, "target=y")


def test_a_number_of_a_table_that_float32_does_not_hold_is_told_from_nan(tmp_path):
    with pytest.raises(PlywiseError, match=r"above 3\.4e38"):
        read(table(tmp_path, [1e39, 0.5] * 6, "a,b,y"))
    with pytest.raises(PlywiseError) as caught:
        read(table(tmp_path, [float("nan"), 0.5] * 6, "a,b,y"))
    assert "3.4e38" not in str(caught.value)


def test_a_table_without_names_keeps_its_first_sample(tmp_path):
    path = table(tmp_path, [2.5, 1.5, 0.5], header="")
    train, guesses = read(path)
    assert train.y.tolist() == [2.5, 1.5, 0.5]
    assert f"The first line of {path} holds numbers and was taken as a sample; --read header=yes" in guesses
    train, guesses = read(path, "header=yes")
    assert (train.y.tolist(), guesses) == ([1.5, 0.5], "")


def test_names_that_count_are_those_of_pandas(tmp_path):
    path = table(tmp_path, [2.5, 1.5], header="0,1,2")
    train, guesses = read(path)
    assert train.y.tolist() == [2.5, 1.5]
    assert "counts 0, 1, 2, ... and was taken as the names of the columns; --read header=no" in guesses
    assert len(read(path, "header=no")[0].y) == 3


@pytest.mark.parametrize("first", ["5.1,,1", "5.1,nan,1", " 5.1, ,1", "5.1,NA,1"])
def test_a_first_sample_that_lacks_a_number_is_no_line_of_names(tmp_path, first):
    path = tmp_path / "t.csv"
    path.write_text(f"{first}\n1,2,0\n")
    with pytest.raises(PlywiseError, match=r"NaN or infinity in 1 of 2 samples|'NA' is not a number"):
        read(str(path))
    train, guesses = read(str(path), "header=yes")
    assert len(train.y) == 1
    assert "first line" not in guesses


def test_names_beside_an_index_without_a_name_are_those_of_pandas(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",0,1\n0,0.5,2.5\n1,0.25,1.5\n")
    train, guesses = read(str(path))
    assert train.y.tolist() == [2.5, 1.5]
    assert "counts 0, 1, 2, ..." in guesses


def test_words_as_targets_are_classes_in_the_order_of_the_alphabet(tmp_path):
    path = table(tmp_path, ["dog", "cat", " dog", "1", "ant"] * 3)
    train, guesses = read(path)
    assert train.y.tolist() == [3, 2, 3, 0, 1] * 3
    assert train.y.dtype == torch.int64
    assert (
        "column 'y') are words and were taken as 4 classes, in the order of the alphabet: 1, ant, cat, dog"
        in (guesses)
    )
    train, _ = read(path, "target=y,targets=classes")
    assert train.y.tolist() == [3, 2, 3, 0, 1] * 3
    with pytest.raises(PlywiseError, match="row 1, column 'y': 'dog' is not a number"):
        read(path, "targets=numbers")


def test_many_words_are_classes_all_the_same(tmp_path):
    words = [f"w{number:03d}" for number in range(50)]
    assert read(table(tmp_path, words[::-1]))[0].y.tolist() == list(range(50))[::-1]


@pytest.mark.parametrize("target", [["cat", "", "dog"], ["1", "cat", "1"], ["", "cat", "dog"]])
def test_words_beside_numbers_or_nothing_are_refused(tmp_path, target):
    with pytest.raises(PlywiseError, match=r"NaN or infinity in 1 of 3|'cat' is not a number"):
        read(table(tmp_path, target))


def test_words_among_the_inputs_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("city,y\nRome,0\nOslo,1\n")
    with pytest.raises(PlywiseError, match="column 'city': 'Rome' is not a number"):
        read(str(tmp_path / "t.csv"))
    assert read(str(tmp_path / "t.csv"), "target=city")[0].y.tolist() == [1, 0]


@pytest.mark.parametrize(("index", "is_said"), [(range(4), True), (range(1, 5), True), ((0, 1, 2, 4), False)])
def test_an_index_among_the_inputs_is_said(tmp_path, index, is_said):
    rows = [f"{number},{number * 0.7},{number % 2}" for number in index]
    (tmp_path / "t.csv").write_text("\n".join([",a,y", *rows]) + "\n")
    train, guesses = read(str(tmp_path / "t.csv"))
    assert train.x.shape == (4, 2)
    assert ("('') counts the rows and was taken as an input" in guesses) == is_said


def test_numbers_that_float32_rounds_are_said(tmp_path):
    rows = [f"{number * 0.7},{1.7e9 + number},{1e9 * number},{number % 2}" for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["a,time,large,y", *rows]) + "\n")
    _, guesses = read(str(tmp_path / "t.csv"))
    assert "the numbers in 'time' are large and differ by little" in guesses


def test_a_first_line_of_text_and_numbers_is_said(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("2019,2020,price\n1,2,0.5\n3,4,1.5\n")
    train, guesses = read(str(path))
    assert train.y.tolist() == [0.5, 1.5]
    assert "holds text and numbers and was taken as the names of the columns; --read header=no" in guesses


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf1,2\n3,4.5\n")
    assert len(read(str(path))[0].y) == 2, "else the first line would not be numbers"


@pytest.mark.parametrize(
    ("target", "classes", "words"),
    [
        ([0, 1, 2, 1, 0, 2], [0, 1, 2, 1, 0, 2], "whole numbers 0 to 2 and were taken as 3 classes;"),
        ([1, 2, 3, 1, 3, 2], [0, 1, 2, 0, 2, 1], "1 to 3 and were taken as 3 classes, numbered from 0;"),
        ([-1, 1, 1, -1], [0, 1, 1, 0], "-1 to 1 and were taken as 2 classes, numbered from 0;"),
        (list(range(40)), None, "0 to 39 and were taken as numbers to predict; --read targets=classes"),
        ([0, 2, 5, 2], None, "0 to 5 and were taken as numbers to predict;"),
    ],
)
def test_what_a_column_of_whole_numbers_is_taken_for_is_said(tmp_path, target, classes, words):
    path = table(tmp_path, target)
    train, guesses = read(path)
    assert words in guesses
    assert "(column 'y')" in guesses
    if classes is None:
        assert train.y.dtype == torch.float32
        assert train.y.tolist() == target
    else:
        assert train.y.dtype == torch.int64
        assert train.y.tolist() == classes
    numbers, guesses = read(path, "targets=numbers")
    assert (numbers.y.dtype, numbers.y.tolist(), guesses) == (torch.float32, target, "")
    ranked, guesses = read(path, "targets=classes")
    order = sorted(set(target))
    assert (ranked.y.tolist(), guesses) == ([order.index(value) for value in target], "")


def test_fractions_leave_nothing_to_guess(tmp_path):
    train, guesses = read(table(tmp_path, [0.5, 1, 2]))
    assert (train.y.dtype, guesses) == (torch.float32, "")
    with pytest.raises(PlywiseError, match="column 'y' holds other than whole numbers"):
        read(table(tmp_path, [0.5, 1, 2]), "targets=classes")


def test_any_column_may_be_the_target(tmp_path):
    path = table(tmp_path, [7.5, 8.5, 9.5, 7.5, 8.5, 9.5])
    train, _ = read(path, "target=b")
    assert train.y.tolist() == [0, 1, 2, 3, 4, 0]
    assert train.x[:, 1].tolist() == [7.5, 8.5, 9.5, 7.5, 8.5, 9.5]
    with pytest.raises(PlywiseError, match=r"has no column 'bb'\. Did you mean b"):
        read(path, "target=bb")
    with pytest.raises(PlywiseError, match="has 2 columns 'a'"):
        read(table(tmp_path, [1, 2], "a,a,y"), "target=a")


def arrays(folder, x, y):
    np.savez(folder / "a.npz", x_train=x, y_train=y)
    return str(folder / "a.npz")


def test_bytes_are_images_unless_they_are_numbers(tmp_path):
    path = arrays(tmp_path, np.full((12, 2), 51, np.uint8), np.zeros(12))
    train, guesses = read(path)
    assert float(train.x[0, 0]) == pytest.approx(0.2)
    assert "bytes and were taken as images, divided by 255; --read inputs=numbers" in guesses
    train, guesses = read(path, "inputs=numbers,targets=numbers")
    assert (train.x.dtype, float(train.x[0, 0]), guesses) == (torch.float32, 51, "")


def test_whole_numbers_are_tokens_unless_they_are_numbers(tmp_path):
    path = arrays(tmp_path, np.full((12, 2), 5), np.zeros(12))
    train, guesses = read(path)
    assert train.x.dtype == torch.int64
    assert "as tokens for embeddings; --read inputs=numbers" in guesses
    assert read(path, "inputs=numbers")[0].x.dtype == torch.float32


@pytest.mark.parametrize(
    ("y", "dtype", "words", "flag", "other"),
    [
        (
            [1, 2, 3],
            int,
            "from 1 to 3, taken as classes, so that class 0 has",
            "numbers",
            "float32",
        ),
        ([0, 1, 2], float, "just whole numbers from 0 to 2, and were taken as numbers", "classes", "int64"),
    ],
)
def test_targets_whose_type_may_not_be_meant_are_said(tmp_path, y, dtype, words, flag, other):
    path = arrays(tmp_path, np.zeros((12, 2)), np.array(y * 4, dtype))
    train, guesses = read(path)
    assert words in guesses
    assert f"--read targets={flag}" in guesses
    assert str(train.y.dtype) != f"torch.{other}"
    train, guesses = read(path, f"targets={flag}")
    assert (str(train.y.dtype), train.y.tolist(), guesses) == (f"torch.{other}", y * 4, "")


@pytest.mark.parametrize("text", ["header", "heder=no", "header=maybe", "targets=", "=no"])
def test_an_option_that_there_is_none_of_is_refused(text):
    with pytest.raises(PlywiseError, match="--read"):
        ReadOptions.parse(text)


def test_guesses_come_along_with_data_that_are_cut(tmp_path):
    found = resolve_data(table(tmp_path, list(range(3)) * 10))
    assert "taken as 3 classes" in " ".join(found.guesses)


@pytest.mark.parametrize("what", ["inputs", "targets"])
def test_numbers_that_float32_does_not_hold_are_refused(tmp_path, what):
    x, y = np.ones((3, 2)), np.array([0.5, 1.5, 2.5])
    (x if what == "inputs" else y)[1] = 1e300
    with pytest.raises(
        PlywiseError, match=rf"{what} hold NaN or infinity in 1 of 3.*number 1, counted from 0.*float32"
    ):
        read(arrays(tmp_path, x, y))


def test_classes_that_float32_does_not_tell_apart_are_refused(tmp_path):
    path = table(tmp_path, [100000001, 100000002] * 3)
    with pytest.raises(PlywiseError, match=r"above 16,777,216.*Number the classes from 0"):
        read(path, "targets=classes")


def test_inputs_without_a_number_are_refused(tmp_path):
    with pytest.raises(PlywiseError, match=r"hold no number: their shape is \(3, 0\)"):
        read(arrays(tmp_path, np.ones((3, 0)), np.arange(3)))


def test_arrays_of_another_byte_order(tmp_path):
    train, _ = read(arrays(tmp_path, np.arange(6.0).reshape(3, 2).astype(">f4"), np.arange(3).astype(">i8")))
    assert train.x.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert train.y.tolist() == [0, 1, 2]
