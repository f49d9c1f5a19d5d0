"""Images on the way out: uint8, PNG grids made to be looked at, and sample files written while they are drawn.

Shapes: images in the library are (N, C, H, W) in [-1, 1]; in files (N, H, W, C) uint8 with C = 1 or 3.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm.errors import UserError, one_line
from cm.runtime.files import whole_file, writing
from cm.storage.filesystem import write_atomic

SMALLEST_CELL = 64  # pixels: smaller images are enlarged in a grid
BACKGROUND = (255, 255, 255)
TEXT_HEIGHT = 16


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8 on the same device.

    floor((x + 1) 127.5), not rounded: published numbers were made so. UserError for values that are not finite.
    """
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero()
        raise UserError(f"image {bad[0].item()} of {len(images)} has values that are not finite")
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(images: np.ndarray | Tensor) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [-1, 1]."""
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(image: np.ndarray | Tensor):
    """One (H, W, C) uint8 image as a Pillow image, grey for C = 1."""
    from PIL import Image

    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"expected (H, W, 1 or 3) uint8, got {array.shape} {array.dtype}")
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def make_grid(
    images: np.ndarray | Tensor,
    columns: int = 0,
    *,
    headings: Sequence[str] = (),
    captions: Sequence[str] = (),
    gap: int = 2,
):
    """A Pillow image that shows (N, H, W, C) uint8 images row by row, separated by lines.

    columns 0: about as many as rows. headings: a text above each column; captions: one below each image, cut to its
    width. Images are enlarged to 64 pixels at least.
    """
    from PIL import Image, ImageDraw

    array = np.asarray(images)
    count, height, width, _ = array.shape
    if count == 0:
        raise ValueError("a grid needs at least one image")
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    scale = max(1, -(-SMALLEST_CELL // min(height, width)))
    cell = (width * scale + gap, height * scale + gap + (TEXT_HEIGHT if captions else 0))
    top = gap + (TEXT_HEIGHT if headings else 0)
    grid = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + top), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(array):
        left, upper = gap + i % columns * cell[0], top + i // columns * cell[1]
        tile = to_pil(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(tile, (left, upper))
        if captions:
            _write(draw, (left + 2, upper + height * scale + 1), captions[i], tile.width - 2)
    for j, heading in enumerate(headings[:columns]):
        draw.text((gap + j * cell[0] + 2, 2), heading, fill=(0, 0, 0))
    return grid


def _write(draw: Any, place: tuple[int, int], text: str, width: int) -> None:
    """A text in one line cut to a width in pixels; letters that the built-in font lacks become question marks."""
    text = one_line(text).encode("latin-1", "replace").decode("latin-1")
    while text and draw.textlength(text) > width:
        text = text[:-1]
    draw.text(place, text, fill=(0, 0, 0))


def save_grid(path: str | os.PathLike, images: np.ndarray | Tensor, columns: int = 0, **options: Any):
    """Write `make_grid` of (N, H, W, C) uint8 images as PNG; options as there. The grid, which a notebook shows."""
    grid = make_grid(images, columns, **options)
    save_png(path, grid)
    return grid


def save_png(path: str | os.PathLike, image) -> None:
    """Write a Pillow image as PNG, all of it or nothing."""
    write_atomic(path, lambda file: image.save(file, format="PNG"))


def save_json(path: str | os.PathLike, content: dict) -> None:
    """Write a dict as indented JSON, all of it or nothing."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


class SampleWriter:
    """An .npz of samples that grows batch by batch: arr_0 (N, H, W, C) uint8, arr_1 (N,) int64 if there are labels.

    A context manager. The file has its final name only when it is complete; after an exception nothing is left.
    Memory does not depend on N (labels apart). Equal bytes for equal samples.
    """

    def __init__(self, path: str | os.PathLike, shape: tuple[int, int, int, int], labels: bool = False):
        self.path, self.shape = Path(path), tuple(shape)
        self.written = 0
        self._labels: list[np.ndarray] | None = [] if labels else None
        self._block = self._open()

    def __enter__(self) -> "SampleWriter":
        with writing(self.path):
            self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self.path):
            self._block.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with whole_file(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as self._zip:
            with self._member("arr_0.npy", np.dtype(np.uint8), self.shape) as self._images:
                yield
            if self.written != self.shape[0]:
                raise ValueError(f"{self.written} samples were written, {self.shape[0]} announced")
            if self._labels is not None:
                with self._member("arr_1.npy", np.dtype(np.int64), (self.written,)) as member:
                    for values in self._labels:
                        member.write(values.tobytes())

    def _member(self, name: str, dtype: np.dtype, shape: tuple[int, ...]):
        """An open zip member that begins with the header of an array file."""
        info = zipfile.ZipInfo(name)  # with a fixed date
        member = self._zip.open(info, "w", force_zip64=True)
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
        return member

    def write(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor | None = None) -> None:
        """Append (n, H, W, C) uint8 images and their (n,) labels."""
        array = np.ascontiguousarray(images)
        if array.dtype != np.uint8 or array.shape[1:] != self.shape[1:]:
            raise ValueError(f"batch {array.shape} {array.dtype} does not fit samples {self.shape} uint8")
        if self.written + len(array) > self.shape[0]:
            raise ValueError(f"more than {self.shape[0]} samples")
        if (labels is not None) != (self._labels is not None):
            raise ValueError("labels must be given for all samples or for none, as the writer was opened")
        if labels is not None:
            values = np.asarray(labels, dtype=np.int64)
            if values.shape != array.shape[:1]:
                raise ValueError(f"labels {values.shape} for images {array.shape}")
            self._labels.append(values)
        with writing(self.path):
            self._images.write(memoryview(array).cast("B"))
        self.written += len(array)
