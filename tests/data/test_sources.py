"""Every form of data that a user's function may return is read into parts of the same samples."""

import gc
import shutil
import sys
from pathlib import Path

import numpy as np
import own_sources as mine
import pytest
import torch

from plywise.data.batches import Split, StoredBatches, list_tensors
from plywise.data.own_data import cut_parts, read_parts
from plywise.data.sources import Reading
from plywise.errors import PlywiseError


@pytest.fixture(autouse=True)
def _user(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).with_name("own_sources.py"), tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield
    sys.modules.pop("mine", None)


def read(name, **how):
    return read_parts(f"mine:{name}", Reading(**how))


def gather(part, which):
    """All samples of a part, one tensor of the input, positions padded to 6."""
    found = []
    for x, y in part.chunks(7):
        ids = x["ids"] if isinstance(x, dict) else list_tensors(x)[0]
        padded = torch.nn.functional.pad(ids, (0, 6 - ids.shape[1]))
        found.append(padded if which == "ids" else y)
    return torch.cat(found)


@pytest.mark.parametrize("name", ["mapping", "nested", "samples", "stream", "batches"])
def test_forms_without_padding(name):
    train = read(name)["train"]
    assert len(train) == 60
    assert torch.equal(gather(train, "ids"), mine.IDS)
    assert torch.equal(gather(train, "y"), mine.LABELS)
    assert isinstance(train, StoredBatches) == (name in ("stream", "batches"))


@pytest.mark.parametrize("name", ["loader", "loaders", "named"])
def test_loaders_give_their_batches(name):
    parts = read(name)
    assert list(parts) == (["train"] if name == "loader" else ["train", "validation", "test"])
    train = parts["train"]
    assert (train.count_places(), len(train)) == (12, 60)
    assert torch.equal(gather(train, "ids"), mine.IDS * mine.MASK)
    widths = {x["ids"].shape[1] for x, _ in train.chunks(1)}
    assert len(widths) == 1 or max(widths) <= 6
    x, y = next(train.chunks(1))
    assert set(x) == {"ids", "attention_mask", "labels"}, "words are not numbers"
    assert torch.equal(x["labels"], y)
    assert f"mine:{name}, train: text: no numbers, and left out." in parts.guesses


def test_an_endless_stream_is_kept_as_far_as_it_is_said():
    parts = read("endless", most=20)
    assert (parts["train"].count_places(), len(parts["train"])) == (20, 100)
    data, cut, guesses = cut_parts("mine:endless", parts)
    assert [part.count_places() for part in vars(data).values()] == [16, 2, 2]
    firsts = [int(x[0, 0]) for part in vars(data).values() for x, _ in part.chunks(1)]
    assert sorted(firsts) == sorted(int(mine.IDS[5 * i % 60, 0]) for i in range(20))
    kept = "the first 20 batches of a longer stream were kept; --keep-batches says how many."
    assert f"mine:endless, train: {kept}" in guesses
    assert "20 batches cut at random, by a fixed seed: 80 to train, 10 to validate, 10 to test" in cut
    assert not any("longer" in guess for guess in read("batches", most=12).guesses)


def test_a_stream_of_samples_is_read_in_batches_of_the_size_that_is_asked_for():
    assert list(read("stream", batch_size=25)["train"].sizes) == [25, 25, 10]
    assert list(read("stream")["train"].sizes) == [60]


def test_files_of_a_stream_go_with_the_last_who_has_them():
    train = read("batches")["train"]
    some, folder = train.pick([0]), Path(train.files[0]).parent
    del train
    gc.collect()
    assert torch.equal(next(some.chunks(1))[0][0], mine.IDS[:5])
    del some
    gc.collect()
    assert not folder.exists()


def test_a_step_function_gets_batches_as_they_came():
    for name, kind in (
        ("classes_of_batches", "Batch"),
        ("batches", "tuple"),
        ("loader", "dict"),
        ("nested", "tuple"),
    ):
        x, _ = next(iter(read(name, whole=True)["train"].chunks(5)))
        assert type(x).__name__ == kind
        assert [t.shape[0] for t in list_tensors(x)] == [5, 5, 5], "the target is in it"
    assert next(read("loader", whole=True)["train"].chunks(1))[0]["text"] == ["a"] * 5
    assert torch.equal(next(read("inputs_only", whole=True)["train"].chunks(1))[0], mine.IDS[:5])
    x, _ = next(iter(read_parts("digits", Reading(whole=True))["train"].chunks(4)))
    assert [tuple(t.shape) for t in x] == [(4, 64), (4,)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ragged_samples", "cannot be stacked .* give a DataLoader with a collate_fn"),
        ("inputs_only", "train, batch 1: there is no target. .* give --step"),
        ("holes", "batch 2: the inputs hold NaN or infinity in 5 of 5 samples"),
        ("other_length", "batch 1: there are 5 inputs and 4 targets"),
        ("no_training", "has no part called train"),
        ("other_names", "there is no target"),
    ],
)
def test_what_does_not_fit_is_said(name, words):
    with pytest.raises(PlywiseError, match=words):
        read(name)


def test_tokens_may_be_ignored_and_classes_may_not():
    y = read("token_targets")["train"].y
    assert int(y.min()) == -100
    with pytest.raises(PlywiseError, match="hold -100; classes and tokens count from 0"):
        read_parts("mine:first_tokens")


def save_images(folder, sizes=((6, 4),), mode="RGB", count=6):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads images")
    pixels = np.random.default_rng(0).integers(0, 256, (2 * count, 4, 6, 3), dtype=np.uint8)
    for number in range(2 * count):
        path = folder / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        made = image.fromarray(pixels[number]).convert(mode).resize(sizes[number % len(sizes)])
        made.save(path)
    return pixels


def test_a_folder_of_images(tmp_path):
    pixels = save_images(tmp_path / "pets")
    train = read_parts("pets")["train"]
    wanted = torch.from_numpy(np.concatenate([pixels[::2], pixels[1::2]])).permute(0, 3, 1, 2) / 255
    assert torch.allclose(train.x, wanted)
    assert train.y.tolist() == [0] * 6 + [1] * 6
    save_images(tmp_path / "parts" / "train", mode="L")
    save_images(tmp_path / "parts" / "val", mode="L", count=2)
    parts = read_parts("parts")
    assert {name: tuple(part.x.shape) for name, part in parts.items()} == {
        "train": (12, 1, 4, 6),
        "validation": (4, 1, 4, 6),
    }


def test_images_that_cannot_be_read(tmp_path):
    save_images(tmp_path / "mixed", sizes=((6, 4), (5, 4)))
    with pytest.raises(PlywiseError, match=r"is 6 x 4 pixels and .* 5 x 4. Resize them"):
        read_parts("mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlywiseError, match="holds no images in folders, one for each class"):
        read_parts("empty")
    save_images(tmp_path / "more" / "train")
    save_images(tmp_path / "more" / "test")
    (tmp_path / "more" / "test" / "bird").mkdir()
    with pytest.raises(PlywiseError, match="has a class 'bird' that training has not"):
        read_parts("more")
    (tmp_path / "mixed" / "cat" / "00.png").write_text("no image")
    with pytest.raises(PlywiseError, match=r"00.png is not an image that can be read"):
        read_parts("mixed")


def test_a_parquet_file(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet files")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads Parquet files")
    table = {"a": [0.5, 1.5, 2.5], "b": [1, 2, 3], "target": [0, 1, 0]}
    parquet.write_table(arrow.table(table), tmp_path / "table.parquet")
    train = read_parts("table.parquet")["train"]
    assert train.x.tolist() == [[0.5, 1], [1.5, 2], [2.5, 3]]
    assert (train.y.tolist(), train.y.dtype) == ([0, 1, 0], torch.long)
    words = arrow.array(["dog", "cat", None, "dog"])
    for column in (words, words.dictionary_encode()):
        parquet.write_table(arrow.table({"a": [1.0, 2.0, 3.0], "y": column[:2].take([0, 1, 0])}), "w.parquet")
        assert read_parts("w.parquet")["train"].y.tolist() == [1, 0, 1]
    parquet.write_table(arrow.table({"a": range(4), "y": words}), "w.parquet")
    with pytest.raises(PlywiseError, match="column 'y': the targets hold NaN or infinity in 1 of 4"):
        read_parts("w.parquet")
    day = arrow.array([0], arrow.timestamp("us"))
    for column in (arrow.array(["x"]), arrow.array([[1.0]]), arrow.array([b"1"]), day):
        parquet.write_table(arrow.table({"a": column, "y": [1]}), "w.parquet")
        with pytest.raises(PlywiseError, match="column 'a' holds no numbers, but"):
            read_parts("w.parquet")
    parquet.write_table(arrow.table({"a": [1.0], "y": [1]})[:0], "w.parquet")
    with pytest.raises(PlywiseError, match="has no rows"):
        read_parts("w.parquet")


def test_a_parquet_file_that_is_damaged_or_too_large_is_refused(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet files")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads Parquet files")
    path = tmp_path / "t.parquet"
    table = arrow.table({"a": torch.randn(300).numpy(), "y": [n % 3 for n in range(300)]})
    parquet.write_table(table, path, compression="none", write_page_checksum=True)
    content = path.read_bytes()
    middle = content.index(b"".join(table["a"].to_numpy()[:1])) + 400  # within the numbers of a
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    with pytest.raises(PlywiseError, match=r"t.parquet cannot be read as Parquet, it may be damaged: .*CRC"):
        read_parts("t.parquet")
    path.write_bytes(content)
    assert len(read_parts("t.parquet")["train"]) == 300
    monkeypatch.setattr("plywise.data.parquet.free_memory", lambda: 1000)
    with pytest.raises(PlywiseError, match=r"t.parquet holds more than 0 MiB"):
        read_parts("t.parquet")


@pytest.mark.filterwarnings("ignore")  # of what datasets is made of
def test_hugging_face_datasets(user_module):
    pytest.importorskip("datasets", reason="Hugging Face's datasets are read by their own package")
    user_module(
        "hub",
        """
import datasets
from own_samples import IDS, MASK, LABELS
columns = {"ids": IDS.tolist(), "attention_mask": MASK.tolist(), "labels": LABELS.tolist()}
columns["text"] = ["a"] * 60
def whole(): return datasets.Dataset.from_dict(columns)
def named(): return datasets.DatasetDict({"train": whole(), "test": whole()})
def stream(): return whole().remove_columns("text").to_iterable_dataset()
def ragged():
    rows = [row[: 3 + i % 2] for i, row in enumerate(IDS.tolist())]
    return datasets.Dataset.from_dict({"ids": rows, "labels": LABELS.tolist()})
""",
    )
    shutil.copy("mine.py", "own_samples.py")
    for name, parts in (("whole", ["train"]), ("named", ["train", "test"]), ("stream", ["train"])):
        found = read_parts(f"hub:{name}")
        assert list(found) == parts
        for part in found.values():
            assert torch.equal(gather(part, "ids"), mine.IDS)
            assert torch.equal(gather(part, "y"), mine.LABELS)
        assert isinstance(found["train"], Split) == (name != "stream")
    with pytest.raises(PlywiseError, match=r"column 'ids' have different lengths. Pad them"):
        read_parts("hub:ragged")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "breaking",
            r"train: batch 2 could not be read: OSError: the disk is gone \(line \d+ of mine",
        ),
        ("breaking_samples", r"train: sample 3 could not be read: ValueError: no such picture \(line \d+ of"),
    ],
)
def test_data_that_break_off_are_named_with_their_place(name, said):
    with pytest.raises(PlywiseError, match=said):
        read(name)
