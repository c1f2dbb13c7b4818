"""Readers against files made here byte by byte, and what they say of damaged ones."""

import gzip
import lzma
import struct
import tarfile

import numpy as np
import pytest

from plywise.data.readers import (
    read_cifar10_archive,
    read_cifar100_archive,
    read_colour_images,
    read_idx,
    read_npz,
    read_text,
)
from plywise.data.sets import (
    load_boiling_points,
    load_cifar10,
    load_cifar100,
    load_grey_images,
    load_numeric_table,
    load_tiny_shakespeare,
)
from plywise.data.store import find_file
from plywise.data.tables import read_rows, read_table
from plywise.errors import PlywiseError

GREY = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
IDX = bytes([0, 0, 8, 3]) + struct.pack(">3i", 2, 3, 4) + GREY.tobytes()


def test_idx_plain_and_compressed(tmp_path):
    plain, packed = tmp_path / "a", tmp_path / "a.gz"
    plain.write_bytes(IDX)
    packed.write_bytes(gzip.compress(IDX, mtime=0))
    for path in (plain, packed):
        found = read_idx(path)
        assert found.dtype == np.uint8
        assert np.array_equal(found, GREY)


def test_idx_of_other_types_is_in_this_machines_byte_order(tmp_path):
    path = tmp_path / "floats"
    path.write_bytes(bytes([0, 0, 13, 1]) + struct.pack(">i3f", 3, 1.5, -2, 7))
    found = read_idx(path)
    assert found.dtype == np.float32
    assert found.dtype.isnative
    assert found.tolist() == [1.5, -2, 7]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (IDX[:-1], "39 bytes and its header says 40: it is cut short"),
        (IDX + b"x", "there is more in it"),
        (IDX[:7], "ends inside its header"),
        (b"\x89PNG\r\n", "is not an IDX file: it starts with 89 50 4e 47"),
        (b"\0\0\x07\x01....", "is not an IDX file"),
        (b"", "nothing"),
        (gzip.compress(IDX, mtime=0)[:-10], "is cut short or damaged"),
        (gzip.compress(IDX, mtime=0)[:12] + b"\xff" * 30, "is cut short or damaged"),
    ],
)
def test_what_is_no_idx_file_is_said(tmp_path, content, words):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(PlywiseError, match=words) as raised:
        read_idx(path)
    assert "images.gz" in str(raised.value)


READERS = [
    read_idx,
    read_cifar10_archive,
    read_cifar100_archive,
    read_colour_images,
    read_npz,
    read_table,
    read_text,
]


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_file_is_named(tmp_path, reader):
    with pytest.raises(PlywiseError, match=r"There is no file .*gone"):
        reader(tmp_path / "gone")
    with pytest.raises(PlywiseError, match="is a folder, and plywise needs a file there"):
        reader(tmp_path)


def cifar_rows(count, seed):
    rows = np.random.default_rng(seed).integers(0, 256, (count, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    return rows


def archive(folder, batches, name="cifar-10-binary.tar.gz"):
    """An archive as it is published, of these files: their names and rows."""
    path = folder / name
    with tarfile.open(path, "w:gz") as tar:
        for file, content in batches.items():
            (folder / file).write_bytes(content)
            tar.add(folder / file, f"cifar-batches-bin/{file}")
    return path


CIFAR = ["test_batch.bin", *(f"data_batch_{n}.bin" for n in (3, 1, 2, 5, 4)), "readme.html"]


def cifar_files():
    return {name: cifar_rows(2, number).tobytes() for number, name in enumerate(CIFAR)}


def test_cifar_archive(tmp_path):
    x, y, x_test, y_test = read_cifar10_archive(archive(tmp_path, cifar_files()))
    assert (x.shape, y.shape, x_test.shape) == ((10, 32, 32, 3), (10,), (2, 32, 32, 3))
    rows = cifar_rows(2, 0)
    assert np.array_equal(y_test, rows[:, 0])
    for channel in range(3):  # a plane each of red, green and blue, row after row
        plane = rows[1, 1 + 1024 * channel : 1 + 1024 * (channel + 1)].reshape(32, 32)
        assert np.array_equal(x_test[1, :, :, channel], plane)
    assert np.array_equal(y[:2], cifar_rows(2, 2)[:, 0]), "batches in the order of their numbers"


def test_what_is_no_cifar_archive_is_said(tmp_path):
    some = {name: rows for name, rows in cifar_files().items() if "2" not in name and "5" not in name}
    with pytest.raises(PlywiseError, match=r"has no data_batch_2\.bin, data_batch_5\.bin"):
        read_cifar10_archive(archive(tmp_path, some))
    short = cifar_files()["data_batch_3.bin"][:-5]
    with pytest.raises(PlywiseError, match=r"data_batch_3\.bin .*6,141 bytes, no multiple of the 3073"):
        read_cifar10_archive(archive(tmp_path, {**cifar_files(), "data_batch_3.bin": short}))
    odd = bytes([77]) + cifar_files()["data_batch_3.bin"][1:]
    with pytest.raises(PlywiseError, match="a label of 77"):
        read_cifar10_archive(archive(tmp_path, {**cifar_files(), "data_batch_3.bin": odd}))
    (tmp_path / "other").write_bytes(b"text" * 500)
    with pytest.raises(PlywiseError, match="is not a tar archive"):
        read_cifar10_archive(tmp_path / "other")


def cifar100_files():
    """Three images to train and two to test: a coarse label, a fine one, and the planes."""
    files = {}
    for seed, (name, count) in enumerate({"train.bin": 3, "test.bin": 2, "fine_label_names.txt": 1}.items()):
        rows = np.random.default_rng(seed).integers(0, 256, (count, 3074), dtype=np.uint8)
        rows[:, 0], rows[:, 1] = rows[:, 0] % 20, 99 - np.arange(count)
        files[name] = rows.tobytes()
    return files


def test_cifar100_archive_has_the_fine_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWISE_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(PlywiseError, match=r"'cifar100' is missing.*plywise workloads fetch cifar100"):
        load_cifar100()
    files = cifar100_files()
    archive(tmp_path, cifar_files())  # another set beside it is not mistaken for it
    path = archive(tmp_path, files, "cifar-100-binary.tar.gz")
    x, y, x_test, y_test = read_cifar100_archive(path)
    assert (x.shape, x_test.shape) == ((3, 32, 32, 3), (2, 32, 32, 3))
    assert (y.tolist(), y_test.tolist()) == ([99, 98, 97], [99, 98])
    row = np.frombuffer(files["test.bin"], np.uint8).reshape(2, 3074)[1]
    for channel in range(3):
        plane = row[2 + 1024 * channel : 2 + 1024 * (channel + 1)].reshape(32, 32)
        assert np.array_equal(x_test[1, :, :, channel], plane)
    for found in (load_cifar100(), load_cifar100()):  # decoded, and kept
        assert all(map(np.array_equal, found, (x, y, x_test, y_test)))
    assert load_cifar10()[0].shape == (10, 32, 32, 3)


def test_what_is_no_cifar100_archive_is_said(tmp_path):
    with pytest.raises(PlywiseError, match=r"has no train\.bin, test\.bin: it is not CIFAR-100's"):
        read_cifar100_archive(archive(tmp_path, cifar_files()))
    files = cifar100_files()
    short = {**files, "test.bin": files["test.bin"][1:]}
    with pytest.raises(PlywiseError, match=r"test\.bin .*6,147 bytes, no multiple of the 3074"):
        read_cifar100_archive(archive(tmp_path, short))
    odd = {**files, "train.bin": files["train.bin"][:1] + b"\x64" + files["train.bin"][2:]}
    with pytest.raises(PlywiseError, match="a label of 100: it is not a batch of CIFAR-100"):
        read_cifar100_archive(archive(tmp_path, odd))


def encoded(images, step):
    """The residuals of images (N, H, W, 3), pixel by pixel: the reader's inverse, written for one image."""
    codes = np.empty((3, *images.shape[:3]), np.uint8)
    for n, image in enumerate(images):
        kept = np.zeros((3, *image.shape[:2]), int)
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                green = 0
                for plane, channel in enumerate((1, 0, 2)):
                    values = kept[plane]
                    if x and y:
                        a, b, c = values[y, x - 1], values[y - 1, x], values[y - 1, x - 1]
                        guess = min(a, b) if c >= max(a, b) else max(a, b) if c <= min(a, b) else a + b - c
                    elif x or y:
                        guess = values[y, x - 1] if x else values[y - 1, x]
                    else:
                        guess = 0 if plane else 128
                    if plane:
                        guess = min(max(guess + green, 0), 255)
                    wanted = int(image[y, x, channel]) - guess
                    if step == 1:
                        residual = (wanted + 128) % 256 - 128
                        value = (guess + residual) % 256
                    else:
                        residual = round(wanted / step)
                        value = min(max(guess + residual * step, 0), 255)
                    codes[plane, n, y, x] = 2 * residual if residual >= 0 else -2 * residual - 1
                    kept[plane, y, x] = value - green
                    green = green if plane else value
    return np.frombuffer(lzma.compress(codes.tobytes()), np.uint8)


@pytest.mark.parametrize("step", [1, 9])
def test_colour_images_come_back(tmp_path, step):
    images = np.random.default_rng(step).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "colour.npz"
    parts = {"images_0": encoded(images[:3], step), "images_1": encoded(images[3:], step)}
    more = {"hw": np.array([4, 6]), "step": np.array(step)}
    np.savez(path, **parts, **more, labels=np.arange(5))
    found, labels = read_colour_images(path)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert np.abs(found.astype(int) - images).max() <= (step - 1) // 2
    np.savez(path, **parts, **more, labels=np.arange(4))
    with pytest.raises(PlywiseError, match="5 images and 4 labels"):
        read_colour_images(path)
    np.savez(path, images_0=parts["images_0"][:40], **more, labels=np.arange(3))
    with pytest.raises(PlywiseError, match="is damaged"):
        read_colour_images(path)
    np.savez(path, x=images)
    with pytest.raises(PlywiseError, match="has no hw, step, labels"):
        read_colour_images(path)


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=GREY, y=np.arange(2))
    assert np.array_equal(read_npz(path)["x"], GREY)
    np.savez(path, x=np.array([{"code": 1}], dtype=object))
    with pytest.raises(PlywiseError, match=r"cannot be read as a \.npz file"):
        read_npz(path)
    np.save(tmp_path / "b.npy", GREY)
    with pytest.raises(PlywiseError, match="a single array"):
        read_npz(tmp_path / "b.npy")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PlywiseError, match="cannot be read"):
        read_npz(path)


def test_tables(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b'name,"a, b",c\r\n1,2.5,3\n-1e3,nan,\n', mtime=0))
    table, names, guess, words = read_table(path)
    assert (names, guess, words) == (["name", "a, b", "c"], "", [])
    assert np.array_equal(table, [[1, 2.5, 3], [-1e3, np.nan, np.nan]], equal_nan=True)
    assert read_rows(path)[1]["c"] == ""
    path.write_bytes(b"a,b,a\n1,2,3\n")
    with pytest.raises(PlywiseError, match="has two columns 'a'"):
        read_rows(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3,red\n", "row 2, column 'b': 'red' is not a number"),
        ("a,b\n1\n", "line 2: it has 1 cells, the first line 2"),
        ("a,b\n1,2,3\n", "line 2: it has 3 cells, the first line 2"),
        ("a,b\n1,2\n\n3,4,5\n", "line 4: it has 3 cells, the first line 2"),
        ("a,b\n1,2_0\n", "row 1, column 'b': '2_0' is not a number"),  # Python takes it for 20
        ("a;b\n1;2\n", "has one column, with ';' in it"),
        ("1\t2\n3\t4\n", "has one column, with '.t' in it"),
        ("a,b\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_what_is_no_table_is_said(tmp_path, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(PlywiseError, match=words):
        read_table(path)


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("To be\r\nor – not".encode())
    assert read_text(path) == "To be\r\nor – not"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlywiseError, match="not text in UTF-8"):
        read_text(path)


# ---- the real files, where they are ----------------------------------------------------------------


def needs(*files):
    return pytest.mark.skipif(
        find_file(*files) is None, reason=f"no {files[0]}; PLYWISE_DATA can name its folder"
    )


@needs("cifar10_test.npz", "cifar-10-binary.tar.gz")
@pytest.mark.slow
def test_real_colour_images():
    x, y, x_test, y_test = load_cifar10()
    assert x.shape == (50_000, 32, 32, 3)
    assert np.bincount(y).tolist() == [5000] * 10
    assert np.bincount(y_test).tolist() == [1000] * 10
    means = x.reshape(-1, 3).mean(0) / 255
    assert np.allclose(means, (0.49139968, 0.48215841, 0.44653091), atol=1e-7), "the means of the original"
    assert x_test.shape == (10_000, 32, 32, 3)


@needs("cifar100_test.npz", "cifar-100-binary.tar.gz")
@pytest.mark.slow
def test_real_colour_images_of_a_hundred_classes():
    x, y, x_test, y_test = load_cifar100()
    assert (x.shape, x_test.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert np.bincount(y).tolist() == [500] * 100
    assert np.bincount(y_test).tolist() == [100] * 100
    means = x.reshape(-1, 3).mean(0) / 255
    original = (0.50707516, 0.48654887, 0.44091784)
    assert np.allclose(means, original, atol=1e-4), "the original's, but for rounding"


@needs("mnist.npz", "mnist/train-images-idx3-ubyte.gz")
def test_real_grey_images():
    x, y, x_test, y_test = load_grey_images("mnist")
    assert (x.shape, x_test.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert np.bincount(y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert y_test[:5].tolist() == [7, 2, 1, 0, 4]


@needs("california_housing.csv.gz")
def test_real_tables():
    x, y = load_numeric_table("california_housing")
    assert x.shape == (20_640, 13)
    assert np.isnan(x).sum() == 207
    assert y.max() == 500_001


@needs("compounds.csv.gz")
def test_real_compounds():
    x, y = load_boiling_points()
    assert x.shape == (1496, 20)
    assert 77 < y.min() < y.max() < 1000


@needs("tinyshakespeare.txt", "tinyshakespeare.txt.gz")
def test_real_text():
    text = load_tiny_shakespeare()
    assert len(text) == 1_115_394
    assert text.startswith("First Citizen:\n")


def test_idx_files_and_npz_are_the_same_set(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWISE_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(PlywiseError, match=r"'mnist' is missing.*plywise workloads fetch mnist"):
        load_grey_images("mnist")
    labels = np.array([4, 2], np.uint8)
    for part in ("train", "t10k"):
        folder = tmp_path / "mnist"
        folder.mkdir(exist_ok=True)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(IDX, mtime=0))
        header = bytes([0, 0, 8, 1]) + struct.pack(">i", 2)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(header + labels.tobytes(), mtime=0)
        )
    assert [part.tolist() for part in load_grey_images("mnist")] == [GREY.tolist(), [4, 2]] * 2
    np.savez(tmp_path / "mnist.npz", x_train=GREY, y_train=labels, x_test=GREY)
    with pytest.raises(PlywiseError, match="has no y_test"):
        load_grey_images("mnist")
