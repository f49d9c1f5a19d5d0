"""Bytes of samples, grids and sample files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cm.data.images import SampleWriter, from_uint8, make_grid, save_grid, save_json, to_uint8
from cm.errors import UserError


def _samples(n, side=8, channels=3, seed=0):
    shape = (n, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_to_uint8_truncates():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 2.0]).reshape(1, 1, 2, 3).repeat(2, 3, 1, 1)
    out = to_uint8(x)
    assert out.shape == (2, 2, 3, 3)
    assert out[0, :, :, 1].flatten().tolist() == [0, 0, 127, 254, 255, 255]


def test_uint8_round_trip_is_exact():
    images = _samples(4)
    assert np.array_equal(to_uint8(from_uint8(images) + 1e-6), images)
    assert from_uint8(images).shape == (4, 3, 8, 8)


def test_channels_go_last():
    x = torch.zeros(1, 3, 4, 5)
    x[0, 2, 1, 3] = 1
    out = to_uint8(x)
    assert out[0, 1, 3].tolist() == [127, 127, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image_enlarged(channels):
    images = _samples(5, channels=channels)
    grid = np.asarray(make_grid(images, columns=3, gap=2))
    assert grid.shape == (2 + 2 * 66, 2 + 3 * 66, 3)
    for i, image in enumerate(images):
        top, left = 2 + i // 3 * 66, 2 + i % 3 * 66
        cell = grid[top : top + 64, left : left + 64]
        assert np.array_equal(cell[::8, ::8], np.broadcast_to(image, (8, 8, 3)))
        assert np.array_equal(cell[7::8, 7::8], cell[::8, ::8])
    assert (grid[:2] == 255).all()  # separators
    assert (grid[2 + 66 :, 2 + 2 * 66 :] == 255).all()  # the empty sixth cell


def test_grid_text_and_automatic_shape(tmp_path):
    plain = make_grid(_samples(9, side=64))
    assert plain.size == (3 * 66 + 2, 3 * 66 + 2)
    text = make_grid(_samples(2, side=64), columns=2, headings=["left", "right"])
    assert text.size == (2 * 66 + 2, 66 + 2 + 16)
    assert (np.asarray(text)[:16] < 128).any()
    named = np.asarray(make_grid(_samples(3, side=64), columns=2, captions=["cat", "x" * 99, "\u4e2d"]))
    assert named.shape == (2 * 82 + 2, 2 * 66 + 2, 3)
    for top, left in ((66, 2), (66, 68), (148, 2)):
        assert (named[top : top + 16, left : left + 64] < 128).any()
    assert (named[66 : 66 + 16, 66:68] == 255).all()  # cut to the width of its image
    save_grid(tmp_path / "grid.png", torch.from_numpy(_samples(2)))
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    assert Image.open(tmp_path / "grid.png").size == (2 * 66 + 2, 66 + 2)
    with pytest.raises(ValueError, match="at least one"):
        make_grid(_samples(0))
    with pytest.raises(ValueError, match="expected"):
        make_grid(_samples(1).astype(np.float32))


@pytest.mark.parametrize("labels", [False, True])
def test_writer_streams_an_ordinary_npz(tmp_path, labels):
    images, classes = _samples(7), np.arange(7) % 3
    path = tmp_path / "samples.npz"
    with SampleWriter(path, images.shape, labels) as writer:
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            writer.write(torch.from_numpy(images[part]), torch.from_numpy(classes[part]) if labels else None)
            assert not path.exists()
    with np.load(path, allow_pickle=False) as stored:
        assert sorted(stored.files) == ["arr_0", "arr_1"][: 1 + labels]
        assert np.array_equal(stored["arr_0"], images)
        if labels:
            assert stored["arr_1"].dtype == np.int64
            assert np.array_equal(stored["arr_1"], classes)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_writer_bytes_do_not_depend_on_batches_or_time(tmp_path):
    images = _samples(6)
    for name, step in (("a", 6), ("b", 1)):
        with SampleWriter(tmp_path / name, images.shape) as writer:
            for k in range(0, 6, step):
                writer.write(images[k : k + step])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_writer_leaves_nothing_behind_after_an_error(tmp_path):
    (tmp_path / "old.npz").write_bytes(b"precious")
    with pytest.raises(RuntimeError), SampleWriter(tmp_path / "old.npz", (4, 8, 8, 3)) as writer:
        writer.write(_samples(2))
        raise RuntimeError
    assert (tmp_path / "old.npz").read_bytes() == b"precious"
    writer = SampleWriter(tmp_path / "new.npz", (4, 8, 8, 3))
    with pytest.raises(ValueError, match="2 samples were written, 4 announced"), writer:
        writer.write(_samples(2))
    assert [p.name for p in tmp_path.iterdir()] == ["old.npz"]


def test_writer_refuses_what_does_not_fit(tmp_path):
    with SampleWriter(tmp_path / "a.npz", (2, 8, 8, 3)) as writer:
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(_samples(1, side=4))
        with pytest.raises(ValueError, match="more than 2"):
            writer.write(_samples(3))
        with pytest.raises(ValueError, match="labels must"):
            writer.write(_samples(1), np.zeros(1))
        writer.write(_samples(2))
    with pytest.raises(UserError, match="cannot write"):
        SampleWriter(tmp_path / "missing" / "a.npz", (2, 8, 8, 3)).__enter__()


def test_save_json(tmp_path):
    save_json(tmp_path / "m.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": [1, 2]}


def test_a_caption_of_several_lines_is_one():
    image = _samples(1, side=64)
    one, two = (np.asarray(make_grid(image, captions=[text])) for text in ("a b", "a\nb"))
    assert np.array_equal(one, two)
