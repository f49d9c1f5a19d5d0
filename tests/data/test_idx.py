"""IDX files: images, labels, class names, and what is wrong with them."""

import gzip
import struct

import numpy as np
import pytest

from cm.data.facts import describe
from cm.data.sources import open_source
from cm.errors import UserError


def write(path, array):
    data = (
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6))
    write(tmp_path / "train-images-idx3-ubyte.gz", images)
    write(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(40) % 3)
    write(tmp_path / "t10k-images-idx3-ubyte", images[:4])
    return tmp_path


def test_images_labels_and_names(folder):
    source = open_source(str(folder))
    assert (len(source), source.shape) == (40, (6, 6, 1))
    assert source.gather([3]).tobytes() == source.read(3).tobytes()
    assert source.labels("auto").indices.tolist() == [i % 3 for i in range(40)]
    assert source.labels("auto").classes == ("0", "1", "2") and source.labels("none").num_classes == 0
    (folder / "classes.txt").write_text("shoe\nbag\ncoat\n")
    facts = describe(str(folder))
    assert (facts.count, facts.side, facts.channels, facts.classes) == (40, 6, 1, ("shoe", "bag", "coat"))
    assert facts.labelled and facts.array
    test = open_source(str(folder / "t10k-images-idx3-ubyte"))
    assert len(test) == 4 and test.labels("auto").num_classes == 0
    assert next(iter(test.identity())) != next(iter(source.identity()))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no IDX file"),
        (b"\0\0\x0d\x03" + b"\0" * 12, "no IDX file"),
        (b"\0\0\x08\x03\0\0", "header"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"1234", "holds 4 of 8 bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**15, 2**10), "bomb"),
        (struct.pack(">HBB1I", 0, 8, 1, 2) + b"12", "shape"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "x-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(path))


def test_labels_and_names_must_fit(folder):
    (folder / "classes.txt").write_text("shoe\nbag\n")
    with pytest.raises(UserError, match="names 2 classes, the labels 3"):
        open_source(str(folder))
    write(folder / "train-labels-idx1-ubyte.gz", np.arange(4))
    with pytest.raises(UserError, match="for 40 images"):
        open_source(str(folder))
    write(folder / "training-images-idx3-ubyte", np.zeros((2, 2, 2)))
    with pytest.raises(UserError, match="several"):
        open_source(str(folder))


def test_names_of_classes_are_printable_and_no_endless_file(folder):
    (folder / "classes.txt").write_bytes(b"caf\xe9\nbag\ncoat\n")
    assert open_source(str(folder)).labels("auto").classes == ("caf\\xe9", "bag", "coat")
    with open(folder / "classes.txt", "wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(UserError, match=r"classes\.txt has 42,949,672,960 bytes"):
        open_source(str(folder))
