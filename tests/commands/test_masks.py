"""Masks: 1 = known in the library, white = generate in pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from cm.commands.masks import known_mask
from cm.errors import UserError


def test_box_center_left():
    mask = known_mask("box:1,2,3,4", 8, 10)
    assert mask.shape == (8, 10)
    assert (mask == 0).sum() == 12
    assert (mask[2:6, 1:4] == 0).all()
    assert known_mask("center:0.5", 8, 8)[2:6, 2:6].sum() == 0
    assert known_mask("center:0.5", 8, 8).sum() == 64 - 16
    left = known_mask("left", 8, 8)
    assert left[:, :4].sum() == 0
    assert left[:, 4:].all()


def test_random_is_a_function_of_the_seed():
    mask = known_mask("random:0.25", 16, 16, seed=1)
    assert (mask == 0).sum() == 64
    assert torch.equal(mask, known_mask("random:0.25", 16, 16, seed=1))
    assert not torch.equal(mask, known_mask("random:0.25", 16, 16, seed=2))


@pytest.mark.parametrize("side", [8, 64])
def test_text_draws_strokes_in_the_middle(side):
    generated = 1 - known_mask("text:I", side, side)
    assert 0.02 < generated.mean() < 0.5
    assert abs((generated.sum(0) @ torch.arange(side).float()) / generated.sum() - (side - 1) / 2) <= 1
    assert generated.sum(1).count_nonzero() > 0.6 * side  # upright


def test_picture_is_inverted_once(tmp_path):
    picture = np.zeros((6, 8), dtype=np.uint8)
    picture[:2] = 255
    Image.fromarray(picture).save(tmp_path / "m.png")
    mask = known_mask(str(tmp_path / "m.png"), 6, 8)
    assert mask[:2].sum() == 0
    assert mask[2:].all()
    with pytest.raises(UserError, match=r"is 8 x 6, the images are 8 x 8"):
        known_mask(str(tmp_path / "m.png"), 8, 8)
    large = np.zeros((32, 48), dtype=np.uint8)
    large[:, 8:18] = 255  # the crop begins at 8; ten pixels are two and a half of the small image's
    Image.fromarray(large).save(tmp_path / "m.png")
    assert known_mask(str(tmp_path / "m.png"), 8, 8, resize=True).sum(0).tolist() == [0, 0, 0] + [8] * 5
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(UserError, match=r"broken\.png: cannot be read"):
        known_mask(str(tmp_path / "broken.png"), 8, 8)


@pytest.mark.parametrize(
    "text",
    [
        "box:1,2,3",
        "box:1,2,9,3",
        "box:a,b,c,d",
        "center:0",
        "center:x",
        "random:1.5",
        "text:",
        "text: ",
        "nope",
    ],
)
def test_bad_masks_name_the_flag(text):
    with pytest.raises(UserError, match="--mask"):
        known_mask(text, 8, 8)


def test_a_picture_of_40_gb_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "m.png", "wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(UserError, match=r"m\.png has 42,949,672,960 bytes"):
        known_mask(str(tmp_path / "m.png"), 8, 8)
