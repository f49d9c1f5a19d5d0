"""Data sets as systems, archives and accidents leave them: what is no data is passed over, what is damaged is named."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm.data import inspect, open_dataset
from cm.data.archives import open_items
from cm.data.prepare import prepare
from cm.data.sources import FolderSource, is_hidden, open_source
from cm.errors import UserError
from cm.runtime.claims import Claim
from tests.data.test_archives import cifar_archive

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(80)
ROOT = Path(__file__).parents[2]


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# What lies in a data set of two classes, and what macOS, Jupyter, Synology and a trash can add to it
DATA = {f"pets/{name}/{i}.png": png(10 * i) for name in ("cat", "dog") for i in range(2)}
REST = {
    "__MACOSX/pets/cat/._0.png": APPLE_DOUBLE,
    "pets/cat/._0.png": APPLE_DOUBLE,
    "pets/.ipynb_checkpoints/0-checkpoint.png": png(),
    "pets/cat/.ipynb_checkpoints/0-checkpoint.png": png(),
    "pets/@eaDir/0.png": png(),
    "pets/@Recycle/0.png": png(),
    "#snapshot/0.png": png(),
    ".Trash-1000/files/0.png": png(),
    "pets/.hidden.png": png(),
}


def as_folder(path):
    for name, content in {**DATA, **REST}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def as_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**DATA, **REST}.items():
            archive.writestr(name, content)


def as_tar(path):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**REST, **DATA}.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(("kind", "write"), [("", as_folder), (".zip", as_zip), (".tar.gz", as_tar)])
def test_what_systems_leave_behind_is_no_data(tmp_path, kind, write):
    path = tmp_path / f"d{kind}"
    write(path)
    manifest = prepare(str(path), str(tmp_path / "out"), image_size=8)
    assert (manifest["classes"], manifest["count"]) == (["cat", "dog"], 4)
    assert (manifest["passed_over"], manifest["skipped"]) == (len(REST), 0)
    if kind != ".tar.gz":
        found = inspect.inspect_data(str(path))
        assert (found["count"], found["passed_over"], list(found["classes"])) == (
            4,
            len(REST),
            ["cat", "dog"],
        )
        assert f"{len(REST)} under hidden or system names passed over" in inspect.as_text(found)
        notes = open_dataset(str(path), image_size=8).notes()
        assert notes[0] == "2 classes (from: folders): cat, dog" and notes[1].startswith(
            f"{len(REST)} images"
        )


def test_names_that_are_data():
    assert not any(map(is_hidden, ("a/b.png", "./a/b.png", "../a.png", "a.b/c.png", "MACOSX/a.png")))
    assert all(map(is_hidden, (".a/b.png", "a/.b/c.png", "a/._b.png", "__MACOSX/b.png")))


def test_a_folder_of_hidden_files_says_so(tmp_path):
    (tmp_path / ".x.png").write_bytes(png())
    with pytest.raises(UserError, match="holds no images but 1 under hidden or system names"):
        open_source(str(tmp_path))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    as_folder(tmp_path / "d")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"pets/cat: cannot be listed \(Permission denied\)"):
        open_source(str(tmp_path / "d"))


def latin(path):
    """Two classes, one of them named in Latin-1."""
    for number, name in enumerate((b"caf\xe9", b"dog")):
        folder = os.path.join(os.fsencode(path), name)
        os.makedirs(folder)
        for i in range(2):
            with open(os.path.join(folder, b"%d.png" % i), "wb") as file:
                file.write(png(100 * number))
    with open(os.path.join(folder, b"bad\xff.png"), "wb") as file:
        file.write(b"no image")


def test_names_that_are_not_utf8_are_stored_escaped(tmp_path, capsys):
    latin(tmp_path / "d")
    manifest = prepare(str(tmp_path / "d"), str(tmp_path / "out"), image_size=8, skip_unreadable=True)
    assert manifest["classes"] == ["caf\\xe9", "dog"] and manifest["skipped_names"] == ["bad\\xff.png"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes()) == manifest
    inspect.as_text(inspect.inspect_data(str(tmp_path / "d"))).encode()
    data = open_dataset(str(tmp_path / "d"), image_size=8, skip_unreadable=True)
    assert len(data.fingerprint) == 64 and "caf\\xe9" in data.notes()[0]


def test_utf8_names_in_a_locale_without_it(tmp_path):
    (tmp_path / "d" / "café").mkdir(parents=True)
    (tmp_path / "d" / "dog").mkdir()
    for name in ("café", "dog"):
        (tmp_path / "d" / name / "0.png").write_bytes(png())
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "d", "out", "--image_size", "8"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["classes"] == ["café", "dog"]


def test_dangling_and_looping_links_are_unreadable_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    os.symlink("nothing", tmp_path / "b.png")
    os.symlink("c.png", tmp_path / "c.png")
    data = open_dataset(str(tmp_path), image_size=8, skip_unreadable=True)
    assert len(data.fingerprint) == 64
    assert len(data.batch([0, 1, 2], [0, 0, 0]).skipped) == 3
    with pytest.raises(UserError, match=r"b\.png: cannot be read \(No such file"):
        open_dataset(str(tmp_path), image_size=8, channels=3).batch([1], [0])


@pytest.mark.parametrize(
    "name", ["x.png", "dataset.json", "manifest.json", "d.zip", "d.npz", "d.tar", "d.tar.gz"]
)
def test_a_pipe_is_no_file(tmp_path, name):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    os.mkfifo(folder / name)
    path = str(folder if name[-3:] in ("png", "son") else folder / name)
    with pytest.raises(UserError, match="is a pipe, not a file"):
        prepare(path, str(tmp_path / "out"), image_size=8)


def test_a_pipe_in_place_of_a_database_or_a_shard(tmp_path):
    pytest.importorskip("lmdb")
    (tmp_path / "lmdb").mkdir()
    os.mkfifo(tmp_path / "lmdb" / "data.mdb")
    with pytest.raises(UserError, match=r"data\.mdb is a pipe, not a file"):
        open_items(str(tmp_path / "lmdb"))
    as_folder(tmp_path / "d")
    prepare(str(tmp_path / "d"), str(tmp_path / "store"), image_size=8)
    for name in ("images-00000.npy", "labels.npy"):
        content = (tmp_path / "store" / name).read_bytes()
        (tmp_path / "store" / name).unlink()
        os.mkfifo(tmp_path / "store" / name)
        with pytest.raises(UserError, match="is a pipe, not a file"):
            open_dataset(str(tmp_path / "store"), image_size=8)
        (tmp_path / "store" / name).unlink()
        (tmp_path / "store" / name).write_bytes(content)


@pytest.mark.parametrize("name", ["x.png", "dataset.json", "manifest.json"])
def test_an_endless_file_is_not_read(tmp_path, name):
    (tmp_path / "a.png").write_bytes(png())
    with open(tmp_path / name, "wb") as file:
        file.truncate(40 << 30)  # which takes no room on the disk
    with pytest.raises(UserError, match=rf"{name} has [\d,]+ bytes; at most"):
        prepare(str(tmp_path), str(tmp_path / "out"), image_size=8)


def test_a_database_that_was_cut_off_is_named(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "lmdb"
    with lmdb.open(str(path), map_size=1 << 24) as database:
        for start in range(0, 300, 100):  # more than one transaction: the later of two roots counts
            with database.begin(write=True) as transaction:
                for i in range(start, start + 100):
                    transaction.put(b"%03d" % i, png() * 10)
    assert open_items(str(path)).total == 300
    os.truncate(path / "data.mdb", os.path.getsize(path / "data.mdb") // 2)
    with pytest.raises(UserError, match=r"lmdb: data\.mdb has [\d,]+ of [\d,]+ bytes: it was cut off"):
        open_items(str(path))


@pytest.mark.parametrize("cut", [1, 8, 200])
def test_an_archive_without_its_end_is_refused(tmp_path, cut):
    path = tmp_path / "cifar-10-python.tar.gz"
    cifar_archive(path)
    assert open_items(str(path)).total == 6
    os.truncate(path, os.path.getsize(path) - cut)
    with pytest.raises(UserError, match=r"tar\.gz: cannot be read"):
        open_items(str(path))
    as_tar(tmp_path / "d.tar.gz")
    os.truncate(tmp_path / "d.tar.gz", os.path.getsize(tmp_path / "d.tar.gz") - cut)
    with pytest.raises(UserError, match=r"tar\.gz: cannot be read"):
        prepare(str(tmp_path / "d.tar.gz"), str(tmp_path / "out"), image_size=8)


def test_a_wrong_checksum_of_an_archive_is_seen(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    cifar_archive(path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum itself
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC check failed"):
        open_items(str(path))


def test_an_entry_without_a_name_is_told_by_its_file(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as transaction,
    ):
        transaction.put(b" ", b"no image")
    with pytest.raises(UserError, match=r"lmdb: entry ' ': cannot be read"):
        prepare(str(tmp_path / "lmdb"), str(tmp_path / "out"), image_size=8)


def test_a_broken_image_is_told_in_the_same_words_each_time(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x\.png: cannot be read \(cannot identify image file\)"):
        prepare(str(tmp_path), str(tmp_path / "out"), image_size=8)


@pytest.mark.parametrize("label", [10**30, -1, 10**6])
def test_a_label_out_of_range_names_the_file(tmp_path, label):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", label]]}))
    with pytest.raises(UserError, match=r": dataset\.json: labels must lie in \[0, 1000000\)") as caught:
        open_dataset(str(tmp_path), image_size=8)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
def test_impossible_paths_are_named(path):
    with pytest.raises(UserError, match=r"^a"):
        open_dataset(path, image_size=8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", [0, 1], "the names of classes must be texts"),
        ("channels", True, "channels is missing or of the wrong type"),
        ("count", True, "count is missing or of the wrong type"),
        ("shards", [[]], "lists a file without a hash"),
    ],
)
def test_types_in_a_manifest(tmp_path, key, value, message):
    as_folder(tmp_path / "d")
    manifest = prepare(str(tmp_path / "d"), str(tmp_path / "store"), image_size=8)
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path / "store"), image_size=8)


def test_leftovers_of_a_killed_prepare_are_removed(tmp_path):
    source, out = str(tmp_path / "d"), str(tmp_path / "out")
    as_folder(tmp_path / "d")
    first = prepare(source, out, image_size=8)
    # Killed while it wrote, and, of another one, between the two renames that replace a store
    (tmp_path / "out.partial-99999").mkdir()
    os.rename(out, tmp_path / "out.old-99998")
    (tmp_path / "out.partial-keep").mkdir()
    with pytest.raises(UserError, match="exists; pass --overwrite True"):
        prepare(source, out, image_size=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "out", "out.partial-keep"]
    assert len(FolderSource(source)) == first["count"] == len(open_source(out))
    prepare(source, out, image_size=8, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "out", "out.partial-keep"]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    """The claim comes before the look at what is there: of two starts at once, one replaced the other's store."""
    as_folder(tmp_path / "d")
    (tmp_path / "out.partial-99999").mkdir()
    with Claim(tmp_path / "out"), pytest.raises(UserError, match=f"written by process {os.getpid()} of this"):
        prepare(str(tmp_path / "d"), str(tmp_path / "out"), image_size=8)
    assert (tmp_path / "out.partial-99999").is_dir()
    prepare(str(tmp_path / "d"), str(tmp_path / "out"), image_size=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "out"]
