"""From the bytes of an image file (or a uint8 array) to a PIL image of one or three channels.

Policy, equal to the published pipeline unless a field of `Decoder` says otherwise:
alpha is dropped, not composited; the EXIF orientation is ignored; an animation gives its first frame.
16-bit images keep their high byte, so grey and colour ones agree (the published pipeline clips grey ones).
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff")
COMPOSITES = {"": None, "drop": None, "white": (255, 255, 255, 255), "black": (0, 0, 0, 255)}
# Only these decoders of Pillow run, whatever a file calls itself: others start external programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_ADDRESS = re.compile(r" <_io\.BytesIO object at \w+>")  # which Pillow adds, another one each time
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Decoder:
    """How files become pixels.

    channels: 1 (grey) or 3 (RGB). composite: "drop" (or "") drops alpha, "white" or "black" paints it over that colour.
    exif_transpose: turn the image upright first. refuse_colour: with channels 1, a colour image is an error
    (for data taken to be grey from a sample), instead of being converted.
    """

    channels: int = 3
    composite: str = ""
    exif_transpose: bool = False
    refuse_colour: bool = False

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 1 or 3, not {self.channels}")
        if self.composite not in COMPOSITES:
            raise UserError(f"--composite {self.composite}: choose drop, white or black")

    def __call__(self, data: "bytes | np.ndarray", name: str) -> "Image":
        """The image in mode L or RGB; UserError with `name` when it cannot be read."""
        with readable(name):
            image = _open(data)
            if self.channels == 1 and self.refuse_colour and image.mode not in _GREY_MODES:
                raise UserError("a colour image among grey ones; pass --in_channels 3 (or 1 to convert it)")
            if self.exif_transpose:
                image = _upright(image)
            image = _eight_bits(image)
            if COMPOSITES[self.composite] and _has_alpha(image):
                image = _over(image, COMPOSITES[self.composite])
            if self.channels == 3:
                return image.convert("RGB")
            return image.convert("L") if image.mode in _GREY_MODES else image.convert("RGB").convert("L")


@dataclass(frozen=True)
class Header:
    """What a file says of itself without being decoded."""

    width: int
    height: int
    grey: bool


def read_header(data: "bytes | np.ndarray", name: str) -> Header:
    """Size and kind of an image, from its header only."""
    with readable(name):
        image = _open(data)
        return Header(image.width, image.height, image.mode in _GREY_MODES)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into a UserError that names it.

    Pillow and zipfile raise a dozen unrelated types (SyntaxError, struct.error, zlib.error, ...) on bad bytes.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = _ADDRESS.sub("", text)
        raise UserError(
            f"{name}: cannot be read ({' '.join(text.split()) or type(error).__name__})"
        ) from error


def _open(data: "bytes | np.ndarray") -> "Image":
    from PIL import Image

    if isinstance(data, np.ndarray):
        return Image.fromarray(data[:, :, 0] if data.shape[2] == 1 else data)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise UserError(
            f"{image.width}x{image.height} pixels are more than Pillow's limit (decompression bomb?)"
        )
    return image


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _eight_bits(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError("32-bit pixels have no agreed range; save it with 8 or 16 bits")
    return image


def _has_alpha(image: "Image") -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _over(image: "Image", colour: tuple[int, int, int, int]) -> "Image":
    """Alpha-composite over one colour; a grey image stays grey."""
    from PIL import Image

    opaque = Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))
    return opaque.convert("L" if image.mode in _GREY_MODES else "RGB")
