"""The images that an edit starts from: found, named, brought to the model's size and channels, with their labels."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from torch import Tensor

from cm.config.parsing import parse_classes
from cm.config.scripts import EditConfig
from cm.data.decode import EXTENSIONS, Decoder, read_header
from cm.data.images import from_uint8
from cm.data.sources import FolderSource, NpzSource, StoreSource, open_source
from cm.data.transforms import center_crop_arr
from cm.errors import UserError
from cm.storage.filesystem import exists


@dataclass(frozen=True)
class Input:
    """An image to edit: its place in the list, a name for its results, and float (C, H, W) in [-1, 1].

    key: hash of the pixels, which is what makes results depend on the image and not on its neighbours.
    label: class given to a class-conditional model.
    truth: whether the image itself is what the results should look like.
    original: uint8 (H, W, C) as it was before --resize True.
    """

    index: int
    name: str
    image: Tensor
    key: str
    label: int
    truth: bool
    original: np.ndarray | None = None


def result_stems(files: list[str]) -> list[str]:
    """Names of results, one per file: its path without ending; files that differ in their ending only keep it.

    Names that would still be the same, also where case does not count, get a number.
    """
    flat = [file.replace("/", "_") for file in files]
    stems = [str(PurePosixPath(name).with_suffix("")) for name in flat]
    count = Counter(stem.casefold() for stem in stems)
    wanted = [s if count[s.casefold()] == 1 else name.replace(".", "_") for s, name in zip(stems, flat)]
    reserved, names = {name.casefold() for name in wanted}, {}
    for name in wanted:
        unique, number = name, 1
        while unique.casefold() in names or (number > 1 and unique.casefold() in reserved):
            number += 1
            unique = f"{name}_{number}"
        names[unique.casefold()] = unique
    return list(names.values())


class InputFiles:
    """The images of --input, read when they are needed and brought to the model's size and channels."""

    def __init__(self, config: EditConfig):
        self.config = config
        self.skipped: list[str] = []
        if not exists(config.input):
            raise UserError(f"--input {config.input}: no such file or folder")
        folder, name = os.path.split(config.input)
        if PurePosixPath(name).suffix[1:].lower() in EXTENSIONS:
            self._source = FolderSource(folder, [name])
        else:
            self._source = open_source(config.input)
        if isinstance(self._source, FolderSource):
            self.names = result_stems(self._source.names)
        else:
            self.names = [f"{i:06d}" for i in range(len(self._source))]
        self._labels = self._find_labels()

    def _find_labels(self) -> list[int]:
        """Labels that the images take in turn: --classes, else those stored with the input."""
        c, stored = self.config, None
        if not c.class_cond:
            return [0]
        if c.classes:
            return list(parse_classes(c.classes, c.num_classes, c.class_names))
        known = self._source.labels("auto")
        if known.indices is not None and c.class_names and set(known.classes) <= set(c.class_names):
            return [c.class_names.index(known.classes[i]) for i in known.indices]
        if isinstance(self._source, StoreSource | NpzSource):
            stored = known.indices
        if stored is None:
            raise UserError(f"--classes is missing: {c.model_path} is class-conditional")
        if stored.max() >= c.num_classes:
            raise UserError(
                f"--input {c.input} has label {stored.max()}, the model has {c.num_classes} classes"
            )
        return stored.tolist()

    def file(self, index: int) -> str:
        """For messages and metadata: which image this is."""
        return self._source.name(index)

    def load(self, indices: range) -> Iterator[Input]:
        """These images one by one; unreadable ones are reported and left out with --skip_unreadable True."""
        for index in indices:
            try:
                yield self._load(index)
            except UserError as error:
                if not self.config.skip_unreadable:
                    raise
                self.skipped.append(str(error))
                print(f"skipped: {error}", file=sys.stderr)

    def _load(self, index: int) -> Input:
        c, file = self.config, self.file(index)
        data = self._source.read(index)
        decoded = Decoder(channels=c.in_channels or 3)(data, file)
        low = c.task == "superres" and decoded.size == (c.image_size // c.factor,) * 2
        if decoded.size == (c.image_size, c.image_size) or low:
            pixels = np.asarray(decoded)
        elif c.resize:
            pixels = center_crop_arr(decoded, c.image_size)
        else:
            raise UserError(
                f"{file} is {decoded.width} x {decoded.height}, the model makes {c.image_size} x {c.image_size}: "
                "--resize True crops and resizes it as training does"
            )
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        full = np.asarray(decoded).reshape(decoded.height, decoded.width, -1)
        same = low or full.shape == pixels.shape
        if low:
            pixels = pixels.repeat(c.factor, axis=0).repeat(c.factor, axis=1)
        grey = c.task == "colorize" and read_header(data, file).grey
        return Input(
            index,
            self.names[index],
            from_uint8(pixels[None])[0],
            hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
            self._labels[index % len(self._labels)],
            truth=not (low or grey or c.task == "stroke" or getattr(c, "noisy_input", False)),
            original=None if same else full,
        )
