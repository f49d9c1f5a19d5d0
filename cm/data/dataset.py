"""A data set of images with labels: any source, one resolution, one number of channels.

An item is addressed by its index and an augmentation seed; nothing else decides its pixels.
"""

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from cm.data.decode import Decoder, read_header
from cm.data.labels import Labels
from cm.data.sources import Source, StoreSource, open_source
from cm.data.transforms import center_crop_arr, random_crop_arr
from cm.errors import UserError

_CHANNEL_SAMPLE = 64
_MAX_SKIPS = 100
_SHOWN = 10  # classes in a note


class Batch(NamedTuple):
    """images (B, C, H, W) float32 in [-1, 1]; labels (B,) int64 or None; names of images that were passed over."""

    images: torch.Tensor
    labels: torch.Tensor | None
    skipped: list[str]


class ImageData(torch.utils.data.Dataset):
    """Images of one size from a source, each with its label; see `open_dataset` for the arguments."""

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        labels: Labels,
        decoder: Decoder,
        class_cond: bool = False,
        random_flip: bool = True,
        random_crop: bool = False,
        skip_unreadable: bool = False,
    ):
        super().__init__()
        self.source = source
        self.image_size = image_size
        self.class_cond = class_cond
        self.random_flip = random_flip
        self.random_crop = random_crop
        self.skip_unreadable = skip_unreadable
        self.channels = decoder.channels
        self.classes = labels.classes
        self.label_origin = labels.origin
        self.label_indices = labels.indices
        self._decoder = decoder
        # Arrays that already are what the network wants: gathered without PIL.
        self._ready = source.shape == (image_size, image_size, decoder.channels) and not random_crop

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """How many classes the data name; 0 when they are unlabelled."""
        return len(self.classes)

    def notes(self) -> list[str]:
        """What a reader should see of the data before training: classes and where they come from, what is left out."""
        shown = ", ".join(self.classes[:_SHOWN]) + (", ..." if len(self.classes) > _SHOWN else "")
        notes = [f"{len(self.classes)} classes (from: {self.label_origin}): {shown}"] if self.classes else []
        if hidden := getattr(self.source, "passed_over", 0):
            notes.append(f"{hidden} images under hidden or system names are passed over")
        return notes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the source says of its content, and of the labels."""
        digest = hashlib.sha256()
        for text in self.source.identity():
            digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
        digest.update("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        if self.label_indices is not None:
            digest.update(self.label_indices.astype("<i8").tobytes())
        return digest.hexdigest()

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[np.ndarray, dict[str, np.int64]]:
        """((C, H, W) float32 in [-1, 1], {"y": label} or {}) of an index, or of (index, augmentation seed).

        Without a seed, one is drawn from Python's global generator, as is usual for a data set.
        """
        index, seed = key if isinstance(key, tuple) else (key, random.getrandbits(63))
        pixels, index, _ = self._read(index, seed)
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1
        return image, {"y": self.label_indices[index]} if self.class_cond else {}

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """The items (index, seed), stacked: equal to `__getitem__` one by one, but faster for plain arrays."""
        skipped: list[str] = []
        indices = list(indices)
        pixels = self._gathered(indices) if self._ready else None
        if pixels is not None:
            if self.random_flip:
                flipped = [row for row, seed in enumerate(seeds) if _flips(seed)]
                pixels[flipped] = pixels[flipped, :, ::-1]
        else:
            pixels = np.empty((len(indices), self.image_size, self.image_size, self.channels), dtype=np.uint8)
            for row, seed in enumerate(seeds):
                pixels[row], indices[row], names = self._read(indices[row], seed)
                skipped += names
        images = torch.empty(len(indices), self.channels, self.image_size, self.image_size)
        images.copy_(torch.from_numpy(pixels).permute(0, 3, 1, 2)).div_(127.5).sub_(1)
        labels = torch.from_numpy(self.label_indices[indices]) if self.class_cond else None
        return Batch(images, labels, skipped)

    def _gathered(self, indices: list[int]) -> np.ndarray | None:
        """(B, H, W, C) uint8; None where one of the images is damaged and shall be passed over."""
        try:
            return self.source.gather(indices)
        except UserError:
            if not self.skip_unreadable:
                raise
            return None

    def _read(self, index: int, seed: int) -> tuple[np.ndarray, int, list[str]]:
        """(H, W, C) uint8 pixels, the index they belong to, and what was passed over.

        With skip_unreadable the next readable image stands in: still a function of the index alone.
        """
        skipped: list[str] = []
        while True:
            try:
                return self._pixels(index, seed), index, skipped
            except UserError as error:
                if not self.skip_unreadable:
                    raise
                skipped.append(self.source.name(index))
                if len(skipped) == min(_MAX_SKIPS, len(self)):
                    raise UserError(
                        f"{len(skipped)} unreadable images in a row, the last: {error}"
                    ) from error
                index = (index + 1) % len(self)

    def _pixels(self, index: int, seed: int) -> np.ndarray:
        image = self._decoder(self.source.read(index), self.source.name(index))
        if self.random_crop:
            pixels = random_crop_arr(image, self.image_size, rng=random.Random(seed))
        else:
            pixels = center_crop_arr(image, self.image_size)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return pixels[:, ::-1] if self.random_flip and _flips(seed) else pixels


def open_dataset(
    path: str,
    *,
    image_size: int,
    channels: int = 0,
    labels: str = "auto",
    class_cond: bool = False,
    random_flip: bool = True,
    random_crop: bool = False,
    composite: str = "",
    exif_transpose: bool = False,
    skip_unreadable: bool = False,
) -> ImageData:
    """A data set from a folder, .zip, .npz or prepared store, local or remote.

    Args:
        image_size: side in pixels. Files and npz images are cropped as ADM does; a store must have this size.
        channels: 1 or 3; 0 takes 1 when a sample of the images is all grey, else 3.
        labels: auto, folder, prefix, json or none (see `cm.data.labels.resolve`).
        class_cond: items carry {"y": label}; an error for unlabelled data.
        random_flip, random_crop: augmentations, functions of the item's seed.
        composite: "drop" (or "") drops alpha; "white" or "black" paints the image over that colour.
        exif_transpose: turn images upright by their EXIF orientation (ignored by default).
        skip_unreadable: pass over damaged files instead of stopping at them.
    """
    if image_size < 1:
        raise UserError(f"--image_size must be positive, not {image_size}")
    if channels not in (0, 1, 3):
        raise UserError(f"--in_channels must be 0 (from the data), 1 or 3, not {channels}")
    source = open_source(path)
    if isinstance(source, StoreSource) and source.shape[0] != image_size:
        raise UserError(
            f"{path}: holds {source.shape[0]}-px images, --image_size is {image_size}; prepare it again at that size"
        )
    table = source.labels(labels)
    if class_cond and not table.num_classes:
        raise UserError(f"{path}: --class_cond True, but the images have no labels (--labels {labels})")
    decoder = Decoder(
        channels=channels or sampled_channels(source, skip_unreadable),
        composite=composite,
        exif_transpose=exif_transpose,
        refuse_colour=channels == 0,
    )
    return ImageData(
        source,
        image_size=image_size,
        labels=table,
        decoder=decoder,
        class_cond=class_cond,
        random_flip=random_flip,
        random_crop=random_crop,
        skip_unreadable=skip_unreadable,
    )


def sampled_channels(source: Source, skip_unreadable: bool = False) -> int:
    """1 when up to 64 images, evenly spaced, are all grey by their headers; else 3."""
    if source.shape is not None:
        return source.shape[2]
    grey = []
    for index in sorted({i * len(source) // _CHANNEL_SAMPLE for i in range(_CHANNEL_SAMPLE)}):
        try:
            grey.append(read_header(source.read(index), source.name(index)).grey)
        except UserError:
            if not skip_unreadable:
                raise
    return 1 if grey and all(grey) else 3


def _flips(seed: int) -> bool:
    return bool(seed & 1)
