"""scripts/prepare_data.py: each source, made here in miniature, becomes the store that its images demand."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm.data import open_dataset, store
from cm.data.inspect import as_text, inspect_data
from cm.data.inspect import main as inspect_main
from cm.data.prepare import prepare
from cm.data.transforms import center_crop_arr
from cm.errors import UserError
from tests.data.test_sources import encoded, one_line, picture

ROOT = Path(__file__).parents[2]


class RunsCode:
    def __reduce__(self):
        return (open, ("executed", "w"))


def stored(out):
    """All images of a store, (N, R, R, C)."""
    manifest = store.read_manifest(str(out))
    return np.concatenate(store.open_shards(str(out), manifest))


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """Five pictures in two class folders."""
    for number in range(5):
        path = tmp_path / "images" / ("b" if number < 3 else "a") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, (20 + number, 30, 3))))
    return tmp_path / "images"


# ---- folders and zips


def test_folder_becomes_a_store_with_equal_items(folder, tmp_path):
    manifest = prepare(str(folder), str(tmp_path / "out"), image_size=8)
    assert (manifest["count"], manifest["resolution"], manifest["channels"]) == (5, 8, 3)
    assert manifest["classes"] == ["a", "b"] and manifest["class_counts"] == [2, 3]
    assert manifest["transform"] == "adm-center-crop" and manifest["filter"] == "box halving, then bicubic"
    assert manifest == store.read_manifest(str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]

    direct = open_dataset(str(folder), image_size=8, class_cond=True)
    fast = open_dataset(str(tmp_path / "out"), image_size=8, class_cond=True)
    assert fast.classes == direct.classes and fast.channels == 3
    for key in ((0, 2), (3, 1), (4, 6)):
        assert np.array_equal(fast[key][0], direct[key][0]) and fast[key][1] == direct[key][1]
    assert fast.fingerprint == open_dataset(str(tmp_path / "out"), image_size=8).fingerprint


def test_result_does_not_depend_on_workers_or_shard_size(folder, tmp_path, monkeypatch):
    first = prepare(str(folder), str(tmp_path / "a"), image_size=8)
    second = prepare(str(folder), str(tmp_path / "b"), image_size=8, num_workers=2)
    assert first == second
    monkeypatch.setattr(store, "SHARD_BYTES", 2 * 8 * 8 * 3)
    sharded = prepare(str(folder), str(tmp_path / "c"), image_size=8)
    assert [shard["count"] for shard in sharded["shards"]] == [2, 2, 1]
    assert np.array_equal(stored(tmp_path / "a"), stored(tmp_path / "c"))
    dataset = open_dataset(str(tmp_path / "c"), image_size=8, random_flip=False)
    expected = stored(tmp_path / "a")[[4, 1, 2, 2]].transpose(0, 3, 1, 2)
    assert np.array_equal(
        ((dataset.batch([4, 1, 2, 2], [0] * 4).images + 1) * 127.5).round().byte(), expected
    )
    copied = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copied[4][0], dataset[4][0])


def test_zip_with_dataset_json_grey_and_box_transform(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("x/0.png", encoded(np.full((8, 8), 3, dtype=np.uint8)))
        archive.writestr("x/1.png", encoded(np.full((8, 8), 7, dtype=np.uint8)))
        archive.writestr("dataset.json", json.dumps({"labels": [["x/1.png", 0], ["x/0.png", 2]]}))
    manifest = prepare(
        str(tmp_path / "d.zip"), str(tmp_path / "out"), image_size=4, transform="box-center-crop"
    )
    assert (
        manifest["channels"] == 1
        and manifest["num_classes"] == 3
        and manifest["transform"] == "box-center-crop"
    )
    assert stored(tmp_path / "out")[:, 0, 0, 0].tolist() == [3, 7]
    assert open_dataset(str(tmp_path / "out"), image_size=4).label_indices.tolist() == [2, 0]


def test_limit_takes_evenly_spaced_images(folder, tmp_path):
    manifest = prepare(str(folder), str(tmp_path / "out"), image_size=8, limit=2)
    assert manifest["class_counts"] == [1, 1]  # the first two would both be of class a
    assert prepare(str(folder), str(tmp_path / "all"), image_size=8, limit=99)["count"] == 5


def test_unreadable_images(folder, tmp_path):
    bad = folder / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    one_line(lambda: prepare(str(folder), str(tmp_path / "out"), image_size=8), "3.png", "cannot be read")
    assert os.listdir(tmp_path) == ["images"]  # nothing half-made is left
    manifest = prepare(str(folder), str(tmp_path / "out"), image_size=8, skip_unreadable=True)
    assert manifest["count"] == 4 and manifest["class_counts"] == [1, 3]
    assert manifest["skipped"] == 1 and manifest["skipped_names"] == ["3.png"]


# ---- ImageNet, LSUN, CIFAR-10, digits


def test_digits(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    manifest = prepare("digits", str(tmp_path / "d"), image_size=8)
    assert (
        manifest["count"] == 1797 and manifest["channels"] == 1 and manifest["classes"] == list("0123456789")
    )
    pixels = stored(tmp_path / "d")
    assert np.array_equal(pixels[..., 0], np.round(bunch.images * 255 / 16)) and pixels.max() == 255
    assert np.array_equal(open_dataset(str(tmp_path / "d"), image_size=8).label_indices, bunch.target)
    larger = prepare("digits", str(tmp_path / "l"), image_size=16, limit=5)
    assert larger["resolution"] == 16 and larger["count"] == 5
    assert np.array_equal(
        stored(tmp_path / "l")[3, ..., 0], center_crop_arr(Image.fromarray(pixels[3, ..., 0]), 16)
    )


@pytest.mark.parametrize("name", ["digits", "digits_rgb"])
def test_splits_of_the_digits(tmp_path, name):
    """Train and test are the whole, in order, labels and inks included."""
    pytest.importorskip("sklearn")
    sets = {}
    for split in ("all", "train", "test"):
        manifest = prepare(name, str(tmp_path / split), image_size=8, split=split)
        labels = open_dataset(str(tmp_path / split), image_size=8).label_indices
        sets[split] = (stored(tmp_path / split), labels, manifest)
    assert [len(s[0]) for s in sets.values()] == [1797, 1500, 297]
    for i in (0, 1):
        assert np.array_equal(np.concatenate([sets["train"][i], sets["test"][i]]), sets["all"][i])
    assert sets["test"][2]["source"].endswith(f"{name} (test)")
    one_line(lambda: prepare(name, str(tmp_path / "x"), image_size=8, split="val"), "--split val", "train")
    folder = str(tmp_path / "all")
    one_line(lambda: prepare(folder, str(tmp_path / "x"), image_size=8, split="test"), "--split test", "all")


def test_digits_in_coloured_ink(tmp_path):
    pytest.importorskip("sklearn")
    grey = (prepare("digits", str(tmp_path / "g"), image_size=8, limit=50), stored(tmp_path / "g"))[1]
    manifest = prepare("digits_rgb", str(tmp_path / "c"), image_size=8, limit=50)
    colour = stored(tmp_path / "c")
    assert manifest["channels"] == 3 and np.array_equal(colour.max(axis=-1), grey[..., 0])  # full brightness
    full = grey[..., 0] == 255
    tints = [np.unique(colour[i][full[i]], axis=0) for i in range(50) if full[i].any()]
    assert all(len(tint) == 1 for tint in tints)  # one ink per image ...
    assert len({tuple(tint[0]) for tint in tints}) == len(tints)  # ... and another for each
    assert all(tint.min() < 0.45 * 255 for tint in tints)  # saturated
    again = prepare("digits_rgb", str(tmp_path / "again"), image_size=8, limit=20)
    assert np.array_equal(stored(tmp_path / "again"), colour[:20]) and again["sha256"] != manifest["sha256"]
    prepare("digits_rgb", str(tmp_path / "seed"), image_size=8, limit=20, seed=1)
    assert not np.array_equal(stored(tmp_path / "seed"), colour[:20])


# ---- what may go wrong


def test_nothing_is_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    first = prepare(str(folder), str(out), image_size=8)
    one_line(lambda: prepare(str(folder), str(out), image_size=16), "out: exists", "--overwrite True")
    assert store.read_manifest(str(out)) == first
    (folder / "a" / "3.png").write_bytes(b"damaged")
    one_line(lambda: prepare(str(folder), str(out), image_size=16, overwrite=True), "3.png")
    assert store.read_manifest(str(out)) == first  # replaced only by a complete one
    prepare(str(folder), str(out), image_size=16, overwrite=True, skip_unreadable=True)
    assert store.read_manifest(str(out))["resolution"] == 16 and sorted(os.listdir(tmp_path)) == [
        "images",
        "out",
    ]
    one_line(lambda: prepare(str(out), str(folder), image_size=16, overwrite=True), "not a prepared data set")
    (tmp_path / "empty").mkdir()
    assert prepare(str(out), str(tmp_path / "empty"), image_size=16)["count"] == 4


def test_bad_arguments(folder, tmp_path):
    for options, part in (
        ({"image_size": 0}, "--image_size"),
        ({"in_channels": 2}, "--in_channels"),
        ({"transform": "none"}, "--transform none"),
        ({"limit": -1}, "--limit"),
        ({"composite": "red"}, "--composite red"),
        ({"labels": "x"}, "--labels x"),
    ):
        one_line(
            lambda options=options: prepare(str(folder), str(tmp_path / "o"), **{"image_size": 8, **options}),
            part,
        )
    one_line(lambda: prepare("nowhere", str(tmp_path / "o"), image_size=8), "nowhere: no such")
    one_line(lambda: prepare("", str(tmp_path / "o"), image_size=8), "no such")
    one_line(lambda: prepare(str(folder), "gs://bucket/x", image_size=8), "gs://bucket/x", "local disk")
    (tmp_path / "file").write_text("")
    one_line(lambda: prepare(str(folder), str(tmp_path / "file" / "o"), image_size=8), "cannot be written")
    assert sorted(os.listdir(tmp_path)) == ["file", "images"]


def test_damaged_stores(folder, tmp_path):
    out = tmp_path / "out"
    good = prepare(str(folder), str(out), image_size=8)
    one_line(lambda: open_dataset(str(out), image_size=16), "holds 8-px images", "--image_size is 16")
    one_line(lambda: open_dataset(str(out), image_size=8, labels="folder"), "--labels folder")

    def damaged(name, content, *parts):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(content)
        one_line(lambda: open_dataset(str(out), image_size=8), *parts)
        (out / name).write_bytes(whole)

    damaged(
        "images-00000.npy",
        (out / "images-00000.npy").read_bytes()[:-1],
        "images-00000.npy",
        "missing or damaged",
    )
    damaged("images-00000.npy", pickle.dumps(RunsCode()), "images-00000.npy", "missing or damaged")
    damaged("labels.npy", encoded(picture()), "labels.npy", "missing or damaged")
    damaged("manifest.json", b"{", "manifest.json", "not valid JSON")
    for change, part in (
        ({"version": 2}, "version 2"),
        ({"count": 6}, "do not add up"),
        ({"classes": None}, "classes is missing"),
        ({"classes": ["a"]}, "outside the 1 classes"),
        ({"channels": 2}, "impossible"),
        ({"resolution": 7}, "not the uint8 array"),
        ({"shards": [{**good["shards"][0], "file": "../images/x.npy"}]}, "outside its folder"),
        ({"shards": []}, "do not add up"),
        ({"shards": [7]}, "without a hash"),
        ({"labels": {"file": "gone.npy", "sha256": ""}}, "gone.npy"),
    ):
        damaged("manifest.json", json.dumps({**good, **change}).encode(), part)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_seen_when_its_image_is_read(folder, tmp_path):
    out = tmp_path / "out"
    count = prepare(str(folder), str(out), image_size=8)["count"]
    whole = open_dataset(str(out), image_size=8)
    before = whole.batch(range(count), [0] * count)
    flip(out / "images-00000.npy", -1)  # of the last image
    dataset = open_dataset(str(out), image_size=8)
    assert torch.equal(dataset.batch([0, 1], [0, 0]).images, before.images[:2])
    message = rf"image {count - 1} is damaged \(cm inspect {out} finds all that are\)"
    for read in (lambda: dataset.batch([0, count - 1], [0, 0]), lambda: dataset[count - 1, 0]):
        with pytest.raises(UserError, match=message):
            read()
    passing = open_dataset(str(out), image_size=8, skip_unreadable=True)
    images, _, skipped = passing.batch([1, count - 1], [0, 0])
    assert torch.equal(images, before.images[[1, 0]]) and skipped == [f"{out}: image {count - 1}"]
    found = inspect_data(str(out))
    assert len(found["unreadable"]) == 1 and found["damaged"] == ["images-00000.npy"]


@pytest.mark.parametrize("name", ["labels.npy", "checks.npy"])
def test_a_flipped_bit_in_labels_or_checks_is_seen_at_the_start(folder, tmp_path, name):
    prepare(str(folder), str(tmp_path / "out"), image_size=8)
    flip(tmp_path / "out" / name, -1 if name == "checks.npy" else -8)
    with pytest.raises(UserError, match=f"{name}: (differs from its hash|a label is outside)"):
        open_dataset(str(tmp_path / "out"), image_size=8)


def test_a_store_of_a_version_without_checks_is_read(folder, tmp_path):
    out = tmp_path / "out"
    prepare(str(folder), str(out), image_size=8)
    manifest = json.loads((out / "manifest.json").read_text())
    fingerprint = open_dataset(str(out), image_size=8).fingerprint
    (out / "checks.npy").unlink()
    (out / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "checks"}))
    dataset = open_dataset(str(out), image_size=8)
    assert dataset.fingerprint == fingerprint and len(dataset.batch([0], [0]).images) == 1


# ---- inspect and the command line


def test_inspect(folder, tmp_path):
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "3.png").read_bytes())
    (folder / "a" / "grey.png").write_bytes(encoded(picture(0, (5, 4))))
    (folder / "b" / "bad.png").write_bytes(encoded(picture(0, (9, 9, 3)))[:150])
    found = inspect_data(str(folder))
    assert found["count"] == 8 and found["channels"] == 3 and found["grey"] == 1 and found["colour"] == 6
    assert found["min_size"] == [4, 5] and found["max_size"] == [30, 24]
    assert (
        found["classes"] == {"a": 4, "b": 4}
        and found["num_classes"] == 2
        and found["label_origin"] == "folders"
    )
    assert found["duplicates"] == 1 and len(found["unreadable"]) == 1 and "bad.png" in found["unreadable"][0]
    text = as_text(found)
    assert "8 images" in text and "bad.png" in text and "a: 4" in text

    prepare(str(folder), str(tmp_path / "out"), image_size=8, skip_unreadable=True)
    assert inspect_data(str(tmp_path / "out"))["damaged"] == []
    content = bytearray((tmp_path / "out" / "images-00000.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / "images-00000.npy").write_bytes(content)
    assert inspect_data(str(tmp_path / "out"))["damaged"] == ["images-00000.npy"]


def test_command_lines(folder, tmp_path, monkeypatch, capsys):
    def run(*flags):
        command = [sys.executable, ROOT / "scripts" / "prepare_data.py", folder, tmp_path / "out", *flags]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, cwd=tmp_path)

    made = run("--image_size", 8, "--num_workers", 0)
    assert made.returncode == 0 and '"count": 5' in made.stdout and "prepare" in made.stderr, made
    again = run("--image_size", 8)
    assert (
        again.returncode == 2
        and again.stderr == f"error: {tmp_path}/out: exists; pass --overwrite True to replace it\n"
    )
    wrong = run("--image_size", "x")
    assert wrong.returncode == 2 and wrong.stderr == "error: argument --image_size: invalid int value: 'x'\n"

    monkeypatch.setattr(sys, "argv", ["inspect", str(tmp_path / "out"), "--json"])
    inspect_main()
    assert json.loads(capsys.readouterr().out)["num_classes"] == 2
    (folder / "a" / "3.png").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["inspect", str(folder)])
    with pytest.raises(SystemExit) as info:
        inspect_main()
    assert info.value.code == 1 and "3.png" in capsys.readouterr().out


def test_help_is_fast_and_complete():
    code = (
        "import runpy, sys\nsys.path.insert(0, 'scripts')\n"
        "sys.argv = ['prepare_data.py', '--help']\n"
        "try: runpy.run_path('scripts/prepare_data.py', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(flag in shown.stdout for flag in ("--image_size", "--labels", "--overwrite", "digits_rgb"))
