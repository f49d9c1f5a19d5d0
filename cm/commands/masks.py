"""Masks for in-painting, from a picture or from a few words: white = generate in pictures, 1 = known in the library."""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.errors import UserError
from cm.seeding import derive_seed


def box_mask(height: int, width: int, text: str, seed: int) -> Tensor:
    """`x,y,w,h`: a rectangle is generated; (x, y) is its upper left corner, in pixels."""
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--mask box:{text} must be box:x,y,w,h in pixels") from None
    if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
        raise UserError(f"--mask box:{text} leaves the image of {width} x {height} pixels")
    generate = torch.zeros(height, width)
    generate[y : y + h, x : x + w] = 1
    return generate


def center_mask(height: int, width: int, text: str, seed: int) -> Tensor:
    """`F`: the central rectangle with this fraction of each side is generated."""
    fraction = _fraction("center", text)
    h, w = max(1, round(fraction * height)), max(1, round(fraction * width))
    return box_mask(height, width, f"{(width - w) // 2},{(height - h) // 2},{w},{h}", seed)


def random_mask(height: int, width: int, text: str, seed: int) -> Tensor:
    """`F`: this fraction of all pixels, chosen by the seed, is generated."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "mask"))
    order = torch.randperm(height * width, generator=generator)
    return (order < round(_fraction("random", text) * height * width)).float().reshape(height, width)


def left_mask(height: int, width: int, text: str, seed: int) -> Tensor:
    """The left half is generated."""
    return box_mask(height, width, f"0,0,{width // 2},{height}", seed)


def text_mask(height: int, width: int, text: str, seed: int) -> Tensor:
    """`S`: the strokes of a text, as large as fits, are generated. Pillow's own font, no system font."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    if not text:
        raise UserError("--mask text: needs a text, such as text:S")
    font = ImageFont.load_default(size=256)
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        raise UserError(f"--mask text:{text} draws nothing")
    large = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(large).text((-left, -top), text, fill=255, font=font)
    scale = 0.8 * min(width / large.width, height / large.height)
    size = max(1, round(large.width * scale)), max(1, round(large.height * scale))
    picture = Image.new("L", (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    picture.paste(large.resize(size, Image.Resampling.BOX), corner)
    coverage = np.asarray(picture)  # strokes thinner than a pixel never cover one
    return torch.from_numpy(coverage >= max(1, coverage.max() // 2)).float()


# --mask NAME:REST -> function(height, width, REST, seed), 1 where pixels are to be generated
MASKS: dict[str, Callable[[int, int, str, int], Tensor]] = {
    "box": box_mask,
    "center": center_mask,
    "random": random_mask,
    "left": left_mask,
    "text": text_mask,
}


def known_mask(text: str, height: int, width: int, seed: int = 0, resize: bool = False) -> Tensor:
    """(height, width) float, 1 = known: from `--mask`, a name with its argument or the path of a picture.

    resize: crop and shrink a picture of another size as the images are.
    """
    name, _, rest = text.partition(":")
    if name in MASKS:
        return 1 - MASKS[name](height, width, rest, seed)
    return 1 - _picture(text, height, width, resize)


def _picture(path: str, height: int, width: int, resize: bool) -> Tensor:
    import numpy as np

    from cm.data.decode import Decoder
    from cm.data.sources import MAX_MEMBER_BYTES
    from cm.data.transforms import center_crop_arr
    from cm.storage.filesystem import exists, read_file

    if not exists(path):
        raise UserError(f"--mask {path}: no such file, and none of {', '.join(MASKS)}")
    image = Decoder(channels=1)(read_file(path, MAX_MEMBER_BYTES), f"--mask {path}")
    if image.size != (width, height) and resize:
        # Generated from a quarter on: a pixel that is known in part would show what is to go.
        return torch.from_numpy(center_crop_arr(image, height) >= 64).float()
    if image.size != (width, height):
        size = f"{image.width} x {image.height}"
        raise UserError(f"--mask {path} is {size}, the images are {width} x {height}: --resize True")
    return torch.from_numpy(np.asarray(image) >= 128).float()


def _fraction(name: str, text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise UserError(f"--mask {name}:{text} needs a fraction between 0 and 1")
    return fraction
