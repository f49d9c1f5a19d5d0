"""Data sets of other libraries by name: `torchvision:FashionMNIST`, `hf:cifar10` (extra `datasets`).

    torchvision:NAME[/SPLIT]    a class of torchvision.datasets, downloaded into the cache folder
    hf:NAME[/CONFIG][@SPLIT]    a data set of the Hugging Face hub, by its package `datasets`

They are read image by image: prepare them once (`cm prepare torchvision:FashionMNIST data/fashion`).
"""

import inspect
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm.data import labels as label_modes
from cm.data.labels import Labels
from cm.data.sources import stored_labels
from cm.errors import UserError, nearest
from cm.runtime.torchvision_operators import declare_missing_operators
from cm.storage.filesystem import cache_folder

EXTRA = "pip install 'consistency-models[datasets]'"


class LibrarySource:
    """What both kinds share: items that are (Pillow image, label or None)."""

    shape, passed_over = None, 0

    def __init__(self, path: str):
        self.path = path

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """For messages: which image this is."""
        return f"{self.path}: image {index}"

    def read(self, index: int) -> np.ndarray:
        """(H, W, C) uint8."""
        image = self._image(index)
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        pixels = np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def labels(self, mode: str) -> Labels:
        """The labels of the library; only auto and none make sense."""
        return stored_labels(self._stored, mode, self.path)

    def identity(self) -> Iterator[str]:
        """The name and the number of images: what lies behind a name does not change."""
        yield f"{self.path}:{self._count}"

    def _named(self, values: Any, names: Any) -> Labels:
        known = label_modes.from_integers(np.asarray(values), f"{self.path}: labels")
        names = tuple(str(name) for name in names or ())
        return Labels(known.indices, names, "the library") if len(names) >= known.num_classes else known


class TorchvisionSource(LibrarySource):
    """A data set of torchvision."""

    def __init__(self, path: str):
        super().__init__(path)
        name, _, split = path.partition(":")[2].partition("/")
        declare_missing_operators()
        try:
            from torchvision import datasets
        except (ImportError, RuntimeError) as error:
            raise UserError(f"{path}: needs torchvision: {EXTRA} ({error})") from None
        if name not in datasets.__all__:
            raise UserError(f"{path}: torchvision has no data set {name}{nearest(name, datasets.__all__)}")
        make = getattr(datasets, name)
        offered = {
            "root": str(Path(cache_folder(), "torchvision")),
            "download": True,
            "train": split != "test",
        }
        offered["split"] = split or "train"
        takes = inspect.signature(make).parameters
        try:
            self._data = make(**{key: value for key, value in offered.items() if key in takes})
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from None
        self._count = len(self._data)

    def _image(self, index: int) -> Any:
        return self._data[index][0]

    @cached_property
    def _stored(self) -> Labels:
        values = getattr(self._data, "targets", getattr(self._data, "labels", None))
        if values is None:
            values = [int(self._data[i][1]) for i in range(len(self))]
        return self._named(values, getattr(self._data, "classes", None))


class HuggingFaceSource(LibrarySource):
    """A data set of the Hugging Face hub: its first feature of images, its first of class labels."""

    def __init__(self, path: str):
        super().__init__(path)
        name, _, split = path.partition(":")[2].partition("@")
        try:
            import datasets
        except ImportError:
            raise UserError(f"{path}: needs the package datasets: {EXTRA}") from None
        try:
            self._data = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # the hub, the network, the script of a data set: a dozen types
            raise UserError(f"{path}: {' '.join(str(error).split())}") from None
        kinds = {key: type(feature).__name__ for key, feature in self._data.features.items()}
        self._key = next((key for key, kind in kinds.items() if kind == "Image"), "")
        self._label = next((key for key, kind in kinds.items() if kind == "ClassLabel"), "")
        if not self._key:
            raise UserError(f"{path}: has no feature of images: {', '.join(map(' '.join, kinds.items()))}")
        self._count = len(self._data)

    def _image(self, index: int) -> Any:
        return self._data[index][self._key]

    @cached_property
    def _stored(self) -> Labels:
        if not self._label:
            return label_modes.UNLABELLED
        return self._named(self._data[self._label], self._data.features[self._label].names)


def is_torchvision(path: str) -> bool:
    """Whether a path is the name of a data set of torchvision."""
    return path.startswith("torchvision:")


def is_hugging_face(path: str) -> bool:
    """Whether a path is the name of a data set of the Hugging Face hub."""
    return path.startswith("hf:")
