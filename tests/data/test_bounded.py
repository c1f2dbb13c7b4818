"""Readers take no more memory than what they read is worth, whatever a file says of itself."""

import gzip
import io
import lzma
import struct
import tarfile
import zipfile

import numpy as np
import pytest

import plywise.data.readers
import plywise.data.unpacking
from plywise.data.readers import read_cifar10_archive, read_colour_images, read_idx, read_npz
from plywise.data.unpacking import read_bytes
from plywise.errors import PlywiseError
from processes import ForkedCommand

MEASURE = """
import pathlib, resource, sys
from plywise.data.own_data import cut_parts, read_parts
import torch, torch.optim
small = pathlib.Path(sys.argv[1]).with_name("small.csv")
with open(sys.argv[1]) as file:
    small.write_text("".join(line for line, _ in zip(file, range(3000))))
cut_parts("small", read_parts(str(small)))  # what is loaded at first use
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
path = sys.argv[1]
found = cut_parts(path, read_parts(path))
print(peak() - before)
"""


@pytest.mark.parametrize("form", ["%.6g", "%d"])
def test_a_table_takes_at_most_three_times_its_size(tmp_path, form):
    """Numbers of six digits; and of one digit with a comma, of which four bytes are twice as much already.

    Blocks are repeated, so that each sample has twins, which are looked for before a table is cut.
    """
    path = tmp_path / "a.csv"
    block = np.random.default_rng(0).uniform(0, 10 if form == "%d" else 1, (5_000, 40))
    text = io.BytesIO()
    np.savetxt(text, block, fmt=form, delimiter=",")
    with path.open("wb") as file:
        file.write(b",".join(b"c%d" % number for number in range(40)) + b"\n")
        for _ in range(20 if form == "%d" else 6):
            file.write(text.getvalue())
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    command = ForkedCommand(["python", str(script), str(path)], {}, tmp_path / "out", tmp_path / "err")
    assert command.wait() == 0, command.communicate()
    taken = int(command.communicate()[0]) / path.stat().st_size
    assert taken <= 3, f"{taken:.2f} times its {path.stat().st_size / 2**20:.0f} MiB"


@pytest.fixture
def little_memory(monkeypatch):
    """A machine with a megabyte left."""
    for module in (plywise.data.readers, plywise.data.unpacking):
        monkeypatch.setattr(module, "free_memory", lambda: 1 << 20)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("kind", ["gzip", "npz", "tar"])
def test_what_unpacks_to_more_than_the_memory_is_refused(tmp_path, kind):
    path = tmp_path / "bomb"
    zeros = bytes(64 << 20)
    if kind == "gzip":
        path.write_bytes(gzip.compress(zeros))
        read = read_bytes
    elif kind == "npz":
        np.savez_compressed(path.with_suffix(".npz"), x=np.frombuffer(zeros, np.uint8))
        path, read = path.with_suffix(".npz"), read_npz
    else:
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("data_batch_1.bin")
            member.size = len(zeros)
            archive.addfile(member, io.BytesIO(zeros))
        read = read_cifar10_archive
    assert path.stat().st_size < 1 << 20
    with pytest.raises(PlywiseError, match=rf"{path.name} holds more than 1 MiB once it is unpacked"):
        read(path)


def test_a_zip_that_lies_about_its_size_gives_no_more_than_it_says(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros(1 << 20, np.uint8))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    assert content.count(struct.pack("<Q", size)) + content.count(struct.pack("<I", size)) >= 1
    content = content.replace(struct.pack("<I", size), struct.pack("<I", 200))
    path.write_bytes(content.replace(struct.pack("<Q", size), struct.pack("<Q", 200)))
    with pytest.raises(PlywiseError, match=r"a\.npz cannot be read"):
        read_npz(path)


def test_packed_images_that_are_more_than_their_labels_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    stream = np.frombuffer(lzma.compress(bytes(64 << 20)), np.uint8)
    np.savez(path, images_0=stream, hw=np.array([4, 4]), step=np.array(1), labels=np.zeros(2))
    with pytest.raises(PlywiseError, match="unpacks to more than 96 bytes"):
        read_colour_images(path)


def test_an_array_of_more_dimensions_than_numpy_has_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes([0, 0, 8, 65]) + struct.pack(">65i", *[1] * 65) + b"\0")
    with pytest.raises(PlywiseError, match="says that its array has 65 dimensions"):
        read_idx(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_in_an_archive_are_no_files(tmp_path, kind):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("data_batch_1.bin")
        member.type, member.linkname = kind, "../../etc/passwd"
        archive.addfile(member)
    with pytest.raises(PlywiseError, match=r"a\.tar\.gz has no data_batch_1\.bin"):
        read_cifar10_archive(path)
