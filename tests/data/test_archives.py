"""Archives as sources: ImageNet tars, LSUN lmdb, CIFAR-10."""

import io
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm.data import open_dataset
from cm.data.cifar import load_restricted
from cm.data.prepare import prepare
from cm.data.transforms import center_crop_arr
from cm.errors import UserError
from tests.data.test_prepare import RunsCode, add, stored
from tests.data.test_sources import encoded, one_line, picture


def test_imagenet_tar_of_tars(tmp_path):
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid, count in (("n02", 2), ("n01", 1)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(count):
                    add(archive, f"{wnid}_{number}.JPEG", encoded(picture(number, (40, 30, 3)), "JPEG"))
            add(outer, f"{wnid}.tar", inner.getvalue())
    source = str(tmp_path / "ILSVRC2012_img_train.tar")
    manifest = prepare(source, str(tmp_path / "out"), image_size=8)
    assert manifest["classes"] == ["n01", "n02"] and manifest["class_counts"] == [1, 2]
    assert open_dataset(str(tmp_path / "out"), image_size=8).label_indices.tolist() == [1, 1, 0]
    expected = center_crop_arr(Image.open(io.BytesIO(encoded(picture(1, (40, 30, 3)), "JPEG"))), 8)
    assert np.array_equal(stored(tmp_path / "out")[1], expected)

    content = Path(source).read_bytes()
    Path(source).write_bytes(content[: len(content) // 2])
    one_line(
        lambda: prepare(source, str(tmp_path / "x"), image_size=8),
        "ILSVRC2012_img_train.tar",
        "cannot be read",
    )


def test_plain_tar_by_folder_and_unsafe_names(tmp_path):
    path = tmp_path / "d.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "./b/0.png", encoded(picture(0)))
        add(archive, "./a/1.png", encoded(picture(1)))
        add(archive, "notes.txt", b"hello")
    manifest = prepare(str(path), str(tmp_path / "out"), image_size=8)
    assert manifest["classes"] == ["a", "b"] and manifest["count"] == 2
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "../0.png", encoded(picture(0)))
    one_line(lambda: prepare(str(path), str(tmp_path / "x"), image_size=8), "d.tar.gz", "unsafe member name")
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "a.txt", b"")
    one_line(lambda: prepare(str(path), str(tmp_path / "x"), image_size=8), "d.tar.gz", "no readable images")


def fake_lmdb(entries):
    """The few calls of lmdb that reading needs, over a list of (key, value)."""

    class Environment:
        def stat(self):
            return {"entries": len(entries)}

        def begin(self):
            return self

        def cursor(self):
            return iter(entries)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    module = types.ModuleType("lmdb")
    module.open = lambda path, **options: Environment()
    return module


@pytest.mark.parametrize("real", [False, True])
def test_lsun_lmdb(tmp_path, monkeypatch, real):
    entries = [(f"k{i}".encode(), encoded(picture(i, (12, 10, 3)), "WEBP", lossless=True)) for i in range(3)]
    path = tmp_path / "bedroom_train_lmdb"
    if real:
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
            for key, value in entries:
                transaction.put(key, value)
    else:
        path.mkdir()
        (path / "data.mdb").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "lmdb", fake_lmdb(entries))
    manifest = prepare(str(path), str(tmp_path / "out"), image_size=10)
    assert manifest["count"] == 3 and manifest["num_classes"] == 0 and manifest["labels"] is None
    assert np.array_equal(stored(tmp_path / "out")[2], picture(2, (12, 10, 3))[1:11])
    one_line(
        lambda: prepare(str(path), str(tmp_path / "x"), image_size=8, labels="folder"), "--labels folder"
    )
    monkeypatch.setitem(sys.modules, "lmdb", None)
    one_line(lambda: prepare(str(path), str(tmp_path / "x"), image_size=8), "package lmdb", "lsun")


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_archive(path, *, binary=False, protocol=2, extra=None):
    """Two batches of three images in the layout of the published archives."""
    images = picture(5, (6, 32, 32, 3))
    labels = [3, 0, 9, 1, 1, 8]
    planes = images.transpose(0, 3, 1, 2).reshape(6, -1)
    with tarfile.open(path, "w:gz") as archive:
        for batch in (2, 1):  # out of order, as they may come
            rows = slice(3 * batch - 3, 3 * batch)
            if binary:
                records = np.concatenate(
                    [np.array(labels[rows], dtype=np.uint8)[:, None], planes[rows]], axis=1
                )
                add(archive, f"cifar-10-batches-bin/data_batch_{batch}.bin", records.tobytes())
            else:
                content = {
                    b"data": planes[rows],
                    b"labels": labels[rows],
                    b"batch_label": b"x",
                    **(extra or {}),
                }
                add(archive, f"cifar-10-batches-py/data_batch_{batch}", pickle.dumps(content, protocol))
        if binary:
            add(archive, "cifar-10-batches-bin/batches.meta.txt", "\n".join([*CIFAR_CLASSES, ""]).encode())
            add(archive, "cifar-10-batches-bin/test_batch.bin", bytes(3073))
        else:
            meta = {b"label_names": [name.encode() for name in CIFAR_CLASSES], b"num_vis": 3072}
            add(archive, "cifar-10-batches-py/batches.meta", pickle.dumps(meta, protocol))
            add(archive, "cifar-10-batches-py/test_batch", b"unused")
    return images, labels


@pytest.mark.parametrize(("binary", "protocol"), [(True, 2), (False, 2), (False, 4)])
def test_cifar10(tmp_path, binary, protocol):
    path = tmp_path / "cifar.tar.gz"
    images, labels = cifar_archive(path, binary=binary, protocol=protocol)
    manifest = prepare(str(path), str(tmp_path / "out"), image_size=32)
    assert manifest["classes"] == CIFAR_CLASSES and manifest["count"] == 6
    assert np.array_equal(stored(tmp_path / "out"), images)
    assert open_dataset(str(tmp_path / "out"), image_size=32).label_indices.tolist() == labels


def test_cifar_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar_archive(tmp_path / "c.tar.gz", extra={b"filenames": RunsCode()})
    one_line(lambda: prepare("c.tar.gz", "out", image_size=32), "c.tar.gz", "refused", "io.open")
    assert os.listdir() == ["c.tar.gz"]
    ok = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (0, 1, 2, 3, 4):
        for array in (ok, np.asfortranarray(ok)):
            assert np.array_equal(load_restricted(pickle.dumps(array, protocol)).pixels, ok)
    for bad in (
        np.array([1.5]),
        np.array([RunsCode()], dtype=object),
        np.dtype("O"),
        Path("x"),
        eval,
        np.random.RandomState(0),
        np.ndarray,
        {1: np.ndarray.__reduce__},
    ):
        try:
            loaded = load_restricted(pickle.dumps(bad, 2))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(loaded, str)  # the name that stands for numpy.ndarray: inert
    for damaged in (b"", b"\x80\x02", pickle.dumps(ok, 2)[:-20], b"cos\nsystem\n(S'true'\ntR."):
        with pytest.raises(UserError):
            load_restricted(damaged)
    assert os.listdir() == ["c.tar.gz"]


def test_odd_cifar_batches(tmp_path):
    path = tmp_path / "c.tar.gz"
    for extra, message in (
        ({b"labels": [1, 2]}, "not 2 rows of 3072"),
        ({b"labels": "abc"}, "labels are no list"),
        ({b"labels": [1, 2, 77]}, "a label is outside the 10 classes"),
        ({b"data": [1]}, "its data are not"),
    ):
        cifar_archive(path, extra=extra)
        one_line(lambda: prepare(str(path), str(tmp_path / "out"), image_size=32), "c.tar.gz", message)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "cifar-10-batches-bin/data_batch_1.bin", bytes(3072))
    one_line(
        lambda: prepare(str(path), str(tmp_path / "out"), image_size=32), "c.tar.gz", "incomplete record"
    )
