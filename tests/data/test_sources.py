"""Sources, labels, image modes, and every kind of bad data: one clear line that names the file."""

import io
import json
import pickle
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from cm.data import labels as label_modes
from cm.data import open_dataset, sources
from cm.data.decode import Decoder, read_header
from cm.errors import UserError
from tests.storage.test_filesystem import FakeBlobfile


def encoded(pixels, kind="PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(seed=0, shape=(8, 8, 3)):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two class folders and six colour pictures."""
    for number in range(6):
        path = tmp_path / "data" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    return tmp_path / "data"


def opened(path, **options):
    return open_dataset(str(path), **{"image_size": 8, "random_flip": False, **options})


def pixels_of(dataset):
    return [
        np.rint((dataset[i][0] + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0) for i in range(len(dataset))
    ]


# ---- the same images from every kind of source


def test_folder_zip_npz_and_remote_copies_agree(folder, tmp_path, monkeypatch):
    reference = opened(folder, class_cond=True)
    assert reference.classes == ("cat", "dog") and reference.num_classes == 2 and reference.channels == 3
    labels = [int(reference[i][1]["y"]) for i in range(6)]
    assert labels == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(pixels_of(reference)[0], picture(1))  # cat/1.png comes first

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in reversed(reference.source.names):
            archive.write(folder / name, name)
    np.savez_compressed(tmp_path / "data.npz", arr_0=np.stack(pixels_of(reference)), arr_1=np.array(labels))
    remote = FakeBlobfile()
    monkeypatch.setitem(sys.modules, "blobfile", remote)
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))
    for name in reference.source.names:
        remote.files[f"gs://bucket/data/{name}"] = (folder / name).read_bytes()
    remote.files["gs://bucket/data.zip"] = (tmp_path / "data.zip").read_bytes()
    remote.files["gs://bucket/data.npz"] = (tmp_path / "data.npz").read_bytes()
    for path in (
        tmp_path / "data.zip",
        tmp_path / "data.npz",
        *(f"gs://bucket/data{e}" for e in ("", ".zip", ".npz")),
    ):
        other = opened(path, class_cond=True)
        assert np.array_equal(pixels_of(other), pixels_of(reference)), path
        assert [int(other[i][1]["y"]) for i in range(6)] == labels, path


def test_batch_equals_items_on_the_array_path_and_on_the_pillow_path(tmp_path):
    images = picture(3, (10, 8, 8, 3))
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(10))
    seeds = [7, 8, 9, 10, 12]
    plain = opened(tmp_path / "a.npz", random_flip=True, class_cond=True)
    for dataset in (plain, opened(tmp_path / "a.npz", random_flip=True, random_crop=True, class_cond=True)):
        batch = dataset.batch([9, 0, 3, 3, 1], seeds)
        for row, key in enumerate(zip([9, 0, 3, 3, 1], seeds)):
            image, cond = dataset[key]
            assert np.array_equal(batch.images[row], image) and batch.labels[row] == cond["y"]
    assert np.array_equal(plain[0, 8][0], plain[0, 7][0][:, :, ::-1])  # odd seeds flip
    assert np.array_equal(np.rint((plain[0, 8][0] + 1) * 127.5), images[0].transpose(2, 0, 1))


def test_arrays_of_another_size_are_cropped_and_grey_ones_gain_an_axis(tmp_path):
    images = picture(4, (3, 20, 16))
    np.savez(tmp_path / "g.npz", arr_0=images)
    grey = opened(tmp_path / "g.npz")
    assert grey.channels == 1 and grey.num_classes == 0 and grey[0][0].shape == (1, 8, 8)
    forced = opened(tmp_path / "g.npz", channels=3)
    assert np.array_equal(forced[2][0], np.repeat(grey[2][0], 3, axis=0))
    with pytest.raises(UserError, match=r"g\.npz.*no labels"):
        opened(tmp_path / "g.npz", class_cond=True)


def test_fingerprint_follows_content_and_labels(folder, tmp_path):
    first = opened(folder).fingerprint
    assert first == opened(folder).fingerprint
    assert first != opened(folder, labels="none").fingerprint
    (folder / "cat" / "9.png").write_bytes(encoded(picture(9)))
    assert first != opened(folder).fingerprint
    prints = set()
    for seed in (0, 1):
        np.savez(tmp_path / "a.npz", arr_0=picture(seed, (2, 8, 8, 3)))
        prints.add(opened(tmp_path / "a.npz").fingerprint)
    assert len(prints) == 2


def test_sources_survive_pickling_and_other_processes(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a.png", encoded(picture()))
    source = sources.ZipSource(str(tmp_path / "d.zip"))
    source.read(0)
    assert pickle.loads(pickle.dumps(source)).read(0) == source.read(0)
    source._opened = (-1, None)  # as after a fork: another process' handle must not be used
    assert source.read(0) == encoded(picture())


# ---- labels


@pytest.mark.parametrize(
    ("names", "mode", "content", "classes", "indices"),
    [
        (["b/1.png", "a/2.png", "b/x/3.png"], "auto", None, ("a", "b"), [1, 0, 1]),
        (["train/b/1.png", "train/a/2.png"], "auto", None, ("a", "b"), [1, 0]),  # wrapped in one more folder
        (["one/1_x.png", "one/2_x.png"], "auto", None, ("1", "2"), [0, 1]),  # one folder says nothing
        (["a/1.png", "2.png"], "auto", None, (), None),
        (["n2_1.png", "n10_2.png", "n2_3.png"], "auto", None, ("n10", "n2"), [1, 0, 1]),
        (["one/1_x.png", "one/2_x.png"], "folder", None, ("one",), [0, 0]),
        (["a/1.png", "a/b/2.png"], "folder", None, ("a",), [0, 0]),
        (["b/1_x.png", "a/0_x.png"], "prefix", None, ("0", "1"), [1, 0]),
        (["b/1_x.png", "a/0_x.png"], "none", None, (), None),
        (["a.png", "b.png"], "auto", {"labels": [["b.png", 0], ["a.png", 3]]}, ("0", "1", "2", "3"), [3, 0]),
        (["a.png", "b.png"], "json", {"a.png": "zebra", "b.png": "ape"}, ("ape", "zebra"), [1, 0]),
        (["a/a.png", "b/b.png"], "json", {"labels": None}, (), None),
    ],
)
def test_label_modes(names, mode, content, classes, indices):
    found = label_modes.resolve(names, mode, content, "data")
    assert found.classes == classes
    assert indices is None if found.indices is None else found.indices.tolist() == indices


@pytest.mark.parametrize(
    ("names", "mode", "content", "message"),
    [
        (["a.png"], "colour", None, "--labels colour"),
        (["a.png"], "json", None, "needs a dataset.json"),
        (["a/1.png", "2.png"], "folder", None, "2.png lies in no class folder"),
        (["a_1.png", "2.png"], "prefix", None, "2.png has no underscore"),
        (["a.png"], "json", {"labels": [["b.png", 1]]}, "no label for a.png"),
        (["a.png"], "json", {"a.png": 1.5}, "all integers or all strings"),
        (["a.png"], "json", {"a.png": True}, "all integers or all strings"),
        (["a.png"], "json", {"a.png": -1}, "labels must lie in"),
        (["a.png"], "json", {"a.png": 10**9}, "labels must lie in"),
        (["a.png"], "json", [1, 2], "expected"),
        (["a.png"], "json", "text", "expected"),
    ],
)
def test_bad_labels(names, mode, content, message):
    with pytest.raises(UserError) as info:
        label_modes.resolve(names, mode, content, "data")
    assert message in str(info.value) and "\n" not in str(info.value)


def test_dataset_json_in_folder_and_zip(folder, tmp_path):
    content = json.dumps({"labels": [[name, i] for i, name in enumerate(opened(folder).source.names)]})
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("dataset.json", content)
        for name in opened(folder).source.names:
            archive.write(folder / name, name)
    (folder / "dataset.json").write_text(content)
    for path in (folder, tmp_path / "d.zip"):
        assert opened(path).label_indices.tolist() == [0, 1, 2, 3, 4, 5]
        assert opened(path, labels="folder").num_classes == 2
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: not valid JSON"):
        opened(folder)


# ---- image modes


def test_channels_come_from_the_data(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(picture(0, (8, 8))))
    (tmp_path / "1.png").write_bytes(encoded(Image.fromarray(picture(1, (8, 8, 2)), "LA")))
    grey = opened(tmp_path)
    assert grey.channels == 1 and np.array_equal(pixels_of(grey)[0][..., 0], picture(0, (8, 8)))
    assert opened(tmp_path, channels=3)[0][0].shape == (3, 8, 8)
    (tmp_path / "2.png").write_bytes(encoded(picture(2)))
    assert opened(tmp_path).channels == 3
    with pytest.raises(UserError, match=r"2\.png: a colour image among grey ones"):
        grey.source.names.append("2.png")  # as if the sample had missed it
        grey[2]
    as_grey = opened(tmp_path, channels=1)
    assert np.array_equal(pixels_of(as_grey)[2][..., 0], np.asarray(Image.fromarray(picture(2)).convert("L")))


def test_alpha_is_dropped_or_composited():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = 200, 100, 0, 255
    rgba[0, 1] = 200, 100, 0, 0
    data = encoded(rgba)
    drop, white, black = (np.asarray(Decoder(3, how)(data, "x")) for how in ("drop", "white", "black"))
    assert drop[0].tolist() == [[200, 100, 0], [200, 100, 0]]
    assert white[0].tolist() == [[200, 100, 0], [255, 255, 255]]
    assert black[0].tolist() == [[200, 100, 0], [0, 0, 0]]
    half = encoded(Image.fromarray(np.array([[[100, 0], [100, 255]]], dtype=np.uint8), "LA"))
    assert np.asarray(Decoder(1, "white")(half, "x")).tolist() == [[255, 100]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    clear = encoded(palette, transparency=0)
    assert np.asarray(Decoder(3)(clear, "x")).tolist() == [[[10, 20, 30]]]
    assert np.asarray(Decoder(3, "white")(clear, "x")).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_keep_the_high_byte():
    deep = np.array([[0, 255, 256, 65535, 32768]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        data = encoded(deep, kind)
        assert read_header(data, "x").grey
        assert np.asarray(Decoder(1)(data, "x")).tolist() == [[0, 0, 1, 255, 128]]
    with pytest.raises(UserError, match=r"x\.tiff: 32-bit"):
        Decoder(1)(encoded(np.zeros((2, 2), dtype=np.float32), "TIFF"), "x.tiff")


def test_exif_orientation_is_ignored_unless_asked_for():
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = encoded(wide, "JPEG", exif=exif)
    assert Decoder(3)(data, "x").size == (16, 8)
    assert Decoder(3, exif_transpose=True)(data, "x").size == (8, 16)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(Decoder(3)(data, "x"))[0, 0].tolist() == [255, 0, 0]


# ---- bad input


def one_line(action, *parts):
    with pytest.raises(UserError) as info:
        action()
    message = str(info.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_missing_empty_and_unknown_paths(tmp_path):
    one_line(lambda: opened(""), "--data_dir")
    one_line(lambda: opened(tmp_path / "none"), "none: no such folder or file")
    one_line(lambda: opened(tmp_path), str(tmp_path), "holds no images")
    (tmp_path / "x.tar").write_bytes(b"")
    one_line(lambda: opened(tmp_path / "x.tar"), "x.tar", "cm prepare")
    one_line(lambda: opened("s3://bucket/x"), "s3://bucket/x")


def test_bad_arguments(folder):
    one_line(lambda: opened(folder, image_size=0), "--image_size")
    one_line(lambda: opened(folder, channels=2), "--in_channels")
    one_line(lambda: opened(folder, composite="red"), "--composite red")
    one_line(lambda: opened(folder, class_cond=True, labels="none"), "--class_cond", "no labels")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_images_are_named_whatever_is_wrong(tmp_path, kind):
    whole = encoded(picture(0, (32, 32, 3)), kind)
    path = tmp_path / f"bad.{kind.lower()}"
    for damage in (whole[: len(whole) // 2], whole[:10], b"", b"not an image", whole[:4] + bytes(60)):
        path.write_bytes(damage)
        one_line(lambda: opened(tmp_path, channels=3)[0], str(path), "cannot be read")


def test_other_file_types_do_not_run_other_decoders(tmp_path):
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    one_line(lambda: opened(tmp_path), "page.png", "cannot be read")


def test_decompression_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    (tmp_path / "big.png").write_bytes(encoded(picture(0, (16, 16, 3))))  # above twice the limit
    one_line(lambda: opened(tmp_path), "big.png", "decompression bomb")
    (tmp_path / "big.png").write_bytes(encoded(picture(0, (8, 8, 3))))  # between: Pillow only warns
    with pytest.warns(Image.DecompressionBombWarning):
        one_line(lambda: opened(tmp_path), "big.png", "decompression bomb")


def test_unsafe_and_oversized_zip_members(tmp_path, monkeypatch):
    path = tmp_path / "d.zip"
    for name in ("../a.png", "/a.png", "x/../../a.png", "..\\a.png"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, encoded(picture()))
        one_line(lambda: opened(path), "d.zip", "unsafe member name")
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 1000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1001))
    one_line(lambda: opened(path), "d.zip", "a.png unpacks to 1001 bytes")


def test_damaged_zips(tmp_path):
    path = tmp_path / "d.zip"
    path.write_bytes(b"PK\x03\x04 no zip at all")
    one_line(lambda: opened(path), "d.zip", "cannot be read")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", encoded(picture()))
    content = bytearray(path.read_bytes())
    content[60] ^= 255  # inside the member: its checksum no longer fits
    path.write_bytes(content)
    one_line(lambda: opened(path, channels=3)[0], "d.zip: a.png", "cannot be read")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    one_line(lambda: opened(path), "d.zip", "holds no images")


class RunsCode:
    """An object whose pickle writes a file when loaded."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_bad_npz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "d.npz"
    good = picture(0, (4, 8, 8, 3))

    def saved(*parts, **arrays):
        np.savez_compressed(path, **arrays)
        one_line(lambda: opened(path), "d.npz", *parts)

    saved("arr_0 is object", arr_0=np.array([RunsCode()], dtype=object))
    saved("arr_1 is object", arr_0=good, arr_1=np.array([RunsCode()] * 4, dtype=object))
    assert not (tmp_path / "executed").exists()
    saved("arr_0 is float32", arr_0=good.astype(np.float32))
    saved("no array of images", "pixels", "arr_0, images", pixels=good)
    saved("shape (4, 8, 8, 2)", arr_0=good[..., :2])
    saved("shape (8, 8)", arr_0=good[0, :, :, 0])
    saved("shape (0, 8, 8, 3)", arr_0=good[:0])
    saved("3 labels for 4 images", arr_0=good, arr_1=np.arange(3))
    saved("one integer per image", arr_0=good, arr_1=np.ones(4))
    saved("labels must lie in", arr_0=good, arr_1=-np.arange(4))
    np.savez(path, arr_0=good)
    path.write_bytes(path.read_bytes()[:-100])
    one_line(lambda: opened(path), "d.npz", "cannot be read")
    path.write_bytes(pickle.dumps(RunsCode()))
    one_line(lambda: opened(path), "d.npz", "cannot be read")
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 1000)
    saved("decompression bomb", arr_0=np.zeros((100, 64, 64, 3), dtype=np.uint8))
