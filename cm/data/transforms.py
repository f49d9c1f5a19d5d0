"""Crops: a PIL image of any size to a (size, size, C) uint8 array. Deterministic but for `random_crop_arr`."""

import math
import random
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from cm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def center_crop_arr(pil_image: "Image", image_size: int) -> np.ndarray:
    """Centre crop of ADM (Dhariwal & Nichol 2021), bit-equal to its published pipeline.

    Halves with a box filter while the shorter side is at least twice the target, resizes it to the target with
    a bicubic filter, crops the middle. Smaller images are enlarged by the bicubic step.

    Returns (image_size, image_size, C) uint8, or (image_size, image_size) for a one-channel image.
    """
    pil_image = _resize_shorter_side(pil_image, image_size)
    width, height = pil_image.size
    return _crop(pil_image, (width - image_size) // 2, (height - image_size) // 2, image_size)


def random_crop_arr(
    pil_image: "Image",
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: random.Random | ModuleType = random,
) -> np.ndarray:
    """A random square of the image: its side is `min_crop_frac` to `max_crop_frac` of the shorter side.

    Draws the scale, then y, then x from `rng` (default: Python's global generator).
    """
    smallest = math.ceil(image_size / max_crop_frac)
    largest = math.ceil(image_size / min_crop_frac)
    pil_image = _resize_shorter_side(pil_image, rng.randrange(smallest, largest + 1))
    width, height = pil_image.size
    top = rng.randrange(height - image_size + 1)
    left = rng.randrange(width - image_size + 1)
    return _crop(pil_image, left, top, image_size)


def box_center_crop_arr(pil_image: "Image", image_size: int) -> np.ndarray:
    """The central square of the image, resized once with a box filter: how the published LSUN sets were made."""
    from PIL import Image

    side = min(pil_image.size)
    left, top = (pil_image.width - side) // 2, (pil_image.height - side) // 2
    square = pil_image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((image_size, image_size), resample=Image.Resampling.BOX))


# What a prepared data set can name in its manifest: name -> (function, filters in words).
TRANSFORMS = {
    "adm-center-crop": (center_crop_arr, "box halving, then bicubic"),
    "box-center-crop": (box_center_crop_arr, "box"),
}


def _resize_shorter_side(pil_image: "Image", side: int) -> "Image":
    from PIL import Image

    while min(pil_image.size) >= 2 * side:
        half = (pil_image.width // 2, pil_image.height // 2)
        pil_image = pil_image.resize(half, resample=Image.Resampling.BOX)
    scale = side / min(pil_image.size)
    size = (round(pil_image.width * scale), round(pil_image.height * scale))
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UserError(f"too elongated to resize: {pil_image.width}x{pil_image.height} to a side of {side}")
    return pil_image.resize(size, resample=Image.Resampling.BICUBIC)


def _crop(pil_image: "Image", left: int, top: int, side: int) -> np.ndarray:
    return np.asarray(pil_image)[top : top + side, left : left + side]
