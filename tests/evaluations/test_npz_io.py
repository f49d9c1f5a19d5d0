"""Image sets and references on disk: streaming, equality of formats, and every bad file in one line."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from cm.errors import UserError
from evaluations.npz_io import default_json, open_images, open_reference, write_reference
from tests.helpers.eval_files import stripes, write_npz


def read_all(images, batch_size=4):
    return np.concatenate(list(images.batches(range(images.shape[0]), batch_size)))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_streamed_in_order(tmp_path, compressed, channels):
    path = write_npz(tmp_path / "a.npz", 11, compressed=compressed, channels=channels)
    pixels, labels = stripes(11, channels=channels)
    images = open_images(str(path))
    assert images.shape == pixels.shape and np.array_equal(images.labels, labels)
    assert np.array_equal(read_all(images), pixels)
    sizes = [len(batch) for batch in images.batches(range(3, 10), 4)]
    assert sizes == [4, 3]
    assert np.array_equal(np.concatenate(list(images.batches(range(3, 10), 4))), pixels[3:10])


def test_grey_images_without_a_channel_axis(tmp_path):
    pixels, _ = stripes(5)
    np.savez(tmp_path / "a.npz", pixels[..., 0])
    images = open_images(str(tmp_path / "a.npz"))
    assert images.shape == (5, 8, 8, 1) and images.labels is None
    assert np.array_equal(read_all(images), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_zip_equal_the_npz(tmp_path, channels):
    pixels, _ = stripes(6, channels=channels)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0] if channels == 1 else image).save(folder / f"{i:02d}.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    for path in (folder, tmp_path / "images.zip"):
        images = open_images(str(path))
        assert images.shape == pixels.shape
        assert np.array_equal(read_all(images), pixels)
        assert len(images.sha256()) == 64


def test_image_size_crops_as_training_does(tmp_path):
    path = write_npz(tmp_path / "a.npz", 3, size=16)
    assert open_images(str(path), 8).shape == (3, 8, 8, 1)


def test_the_json_beside_samples_travels_along(tmp_path):
    path = write_npz(tmp_path / "samples.npz", 3)
    assert open_images(str(path)).meta is None
    path.with_suffix(".json").write_text(json.dumps({"nfe": 2}))
    assert open_images(str(path)).meta == {"nfe": 2}
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=r"samples\.json: not valid JSON"):
        open_images(str(path))


def test_reference_round_trip(tmp_path):
    pixels, _ = stripes(4)
    statistics = {"pool": (np.arange(3.0), np.eye(3)), "spatial": (np.zeros(2), 2 * np.eye(2))}
    write_reference(str(tmp_path / "r.npz"), statistics, {"protocol": "adm"}, pixels)
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "arr_0", "meta"}
    reference = open_reference(str(tmp_path / "r.npz"))
    assert reference.meta == {"protocol": "adm"} and np.array_equal(read_all(reference.images), pixels)
    for kind, (mu, sigma) in statistics.items():
        assert np.array_equal(reference.statistics[kind][0], mu)
        assert np.array_equal(reference.statistics[kind][1], sigma)


def test_published_statistics_without_images_or_meta(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    reference = open_reference(str(tmp_path / "stats.npz"))
    assert reference.images is None and reference.meta is None and list(reference.statistics) == ["pool"]
    assert reference.statistics["pool"][0].dtype == np.float64


def test_images_alone_are_a_reference(tmp_path):
    reference = open_reference(str(write_npz(tmp_path / "a.npz", 4)))
    assert reference.statistics == {} and reference.images.shape[0] == 4


def test_where_the_result_goes():
    assert (
        str(default_json("runs/a/samples_10x8x8x1.npz", "refs/r.npz")) == "runs/a/samples_10x8x8x1_vs_r.json"
    )
    assert str(default_json("runs/images/", "r.npz")) == "runs/images_vs_r.json"


# --- bad input -----------------------------------------------------------------------------------

PIXELS = np.zeros((4, 8, 8, 3), np.uint8)
BAD_IMAGES = {
    "no array of images.*holds pixels": {"pixels": PIXELS},
    "at least 2": {"arr_0": PIXELS[:1]},
    r"holds 0 image": {"arr_0": PIXELS[:0]},
    r"transpose it to channels last": {"arr_0": np.zeros((4, 3, 8, 8), np.uint8)},
    r"expected \(N, H, W, 3\)": {"arr_0": np.zeros((4, 8, 8, 4), np.uint8)},
    r"\(x \* 255\)\.clip\(0, 255\)\.astype\(np\.uint8\)": {
        "arr_0": np.linspace(0, 1, 768).reshape(4, 8, 8, 3)
    },
    r"\(\(x \+ 1\) \* 127\.5\)": {"arr_0": np.linspace(-1, 1, 768, dtype=np.float32).reshape(4, 8, 8, 3)},
    "int64 with values from 7 to 7.*uint8": {"arr_0": np.full((4, 8, 8, 3), 7)},
    "Fortran order": {"arr_0": np.asfortranarray(PIXELS)},
    "expected integer labels": {"arr_0": PIXELS, "arr_1": np.zeros(3, np.int64)},
}


def bomb(path, name, shape, **others):
    """An npz with an array of zeros whose header announces `shape` and whose content is short and compressed."""
    np.savez(path, **others)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as member,
    ):
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(100):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 200_000
    return str(path)


@pytest.mark.parametrize(
    ("name", "shape", "others"),
    [
        ("mu", (1 << 30,), {"sigma": np.eye(2)}),
        ("sigma", (1 << 15, 1 << 15), {"mu": np.zeros(2)}),
        ("mu_s", (1 << 30,), {"mu": np.zeros(2), "sigma": np.eye(2), "sigma_s": np.eye(2)}),
        ("arr_1", (1 << 30,), {"arr_0": PIXELS}),
    ],
)
def test_arrays_that_would_unpack_to_gigabytes_are_refused(tmp_path, name, shape, others):
    path = bomb(tmp_path / "bomb.npz", name, shape, **others)
    words = rf"bomb\.npz: {name} unpacks to 8,589,934,592 bytes; at most [\d,]+ are read"
    with pytest.raises(UserError, match=words):
        (open_images if name == "arr_1" else open_reference)(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_no_npz(tmp_path, kind):
    path = tmp_path / "x.npz"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for opened in (open_images, open_reference):
        with pytest.raises(UserError, match=rf"x\.npz is a {kind}, not a file"):
            opened(str(path))


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_bad_images(tmp_path, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **BAD_IMAGES[message])
    with pytest.raises(UserError, match=message) as error:
        open_images(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


BAD_REFERENCES = {
    "neither mu and sigma nor arr_0": {"a": np.zeros(2)},
    r"mu \(3,\) and sigma \(2, 2\)": {"mu": np.zeros(3), "sigma": np.eye(2)},
    "mu is complex128; expected real numbers": {"mu": np.zeros(2, complex), "sigma": np.eye(2)},
    "sigma holds values that are not finite": {"mu": np.zeros(2), "sigma": np.diag([1.0, np.inf])},
    "sigma is no covariance: it has the eigenvalue -1": {"mu": np.zeros(64), "sigma": -np.eye(64)},
    "sigma is no covariance: it has the eigenvalue -0.1": {"mu": np.zeros(2), "sigma": np.diag([1.0, -0.1])},
    "sigma is no covariance: it differs from its transpose by 1": {
        "mu": np.zeros(64),
        "sigma": np.triu(np.ones((64, 64))),
    },
    "mu_s holds values that are not finite": {
        "mu": np.zeros(2),
        "sigma": np.eye(2),
        "mu_s": np.full(2, np.nan),
        "sigma_s": np.eye(2),
    },
}


def test_covariances_with_rounding_and_without_full_rank_are_taken(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)  # rank 19
    covariance = np.cov(features, rowvar=False).astype(np.float32)
    covariance[0, 1] *= 1 + 1e-6
    for sigma in (covariance, np.zeros((64, 64)), np.eye(64, dtype=np.int64)):
        np.savez(tmp_path / "good.npz", mu=np.zeros(64, sigma.dtype), sigma=sigma)
        mu, found = open_reference(str(tmp_path / "good.npz")).statistics["pool"]
        np.testing.assert_array_equal(found, sigma)
        assert mu.dtype == found.dtype == np.float64


@pytest.mark.parametrize("message", BAD_REFERENCES)
def test_bad_references(tmp_path, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **BAD_REFERENCES[message])
    with pytest.raises(UserError, match=message) as error:
        open_reference(str(path))
    assert str(path) in str(error.value)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"bad\.npz"):
        open_reference(str(tmp_path / "bad.npz"))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_images(str(tmp_path / "nowhere.npz"))
    with pytest.raises(UserError, match="nowhere"):
        open_images(str(tmp_path / "nowhere"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match=r"text\.npz"):
        open_images(str(tmp_path / "text.npz"))
    path = write_npz(tmp_path / "cut.npz", 200, compressed=True)
    data = bytearray(path.read_bytes())
    data[2000:2100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cut\.npz: arr_0\.npy: cannot be read"):
        read_all(open_images(str(path)))


def test_files_of_several_sizes_name_both(tmp_path):
    for name, size in (("a.png", 8), ("b.png", 8), ("c.png", 9)):
        Image.new("RGB", (size, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"c\.png is 9x8, .*a\.png is 8x8"):
        read_all(open_images(str(tmp_path)))


def test_an_unreadable_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, b"not a picture")
    with pytest.raises(UserError, match=r"a\.zip: a\.png"):
        open_images(str(tmp_path / "a.zip"))


@pytest.mark.parametrize("ending", ["npy", "pkl", "pt"])
def test_statistics_in_other_files_are_named(tmp_path, ending):
    (tmp_path / f"r.{ending}").write_bytes(b"x")
    with pytest.raises(UserError, match=rf"from an .npz with the arrays mu and sigma, not from .{ending}"):
        open_reference(str(tmp_path / f"r.{ending}"))
