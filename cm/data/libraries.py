"""Data sets in torch's form, and of other libraries by name (extra `datasets`).

    torchvision:NAME[/SPLIT]          a class of torchvision.datasets, downloaded into the cache folder
    hf:OWNER/NAME[/CONFIG][@SPLIT]    a data set of the Hugging Face hub, by its package `datasets`
    hf:FOLDER[@SPLIT]                 what `save_to_disk` wrote, or parquet files whose names say their split
    FILE.parquet                      one such file

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
from cm.data.npz_names import LABELS, first_of
from cm.data.sources import stored_labels
from cm.errors import UserError, extra, nearest
from cm.runtime.torchvision_operators import declare_missing_operators
from cm.storage.filesystem import cache_folder

HUB, PARQUET = "hf:", ".parquet"


class LibrarySource:
    """What all kinds share: items that are (image, label or None)."""

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
        return as_pixels(self._image(index), self.name(index))

    def labels(self, mode: str) -> Labels:
        """The labels of the library; only auto and none make sense."""
        return stored_labels(self._stored, mode, self.path)

    def identity(self) -> Iterator[str]:
        """The name and the number of images: what lies behind a name does not change."""
        yield f"{self.path}:{self._count}"

    def _named(self, values: Any, names: Any) -> Labels:
        known = label_modes.from_values(np.asarray(values), f"{self.path}: labels")
        names = tuple(str(name) for name in names or ())
        return Labels(known.indices, names, "the library") if len(names) >= known.num_classes else known


class DatasetSource(LibrarySource):
    """A map-style data set in torch's form: a length, and items that are images or (image, label, ...).

    Labels are its `targets` or `labels`, else those of the items; the names of the classes its `classes`.
    """

    def __init__(self, path: str, data: Any):
        super().__init__(path)
        self._data, self._count = data, len(data)

    def _image(self, index: int) -> Any:
        item = self._data[index]
        return item[0] if isinstance(item, tuple | list) else item

    @cached_property
    def _stored(self) -> Labels:
        values = getattr(self._data, "targets", getattr(self._data, "labels", None))
        if values is None:
            if not isinstance(self._data[0], tuple | list):
                return label_modes.UNLABELLED
            values = [self._label(i) for i in range(len(self))]
        return self._named(values, getattr(self._data, "classes", None))

    def _label(self, index: int) -> int:
        try:
            return int(self._data[index][1])
        except (IndexError, TypeError, ValueError):
            raise UserError(f"{self.name(index)}: has no whole number as its label (--labels none)") from None


def as_source(made: Any, path: str) -> Any:
    """What a plug-in's data source returned: a source of ours, or a data set in torch's form as one.

    A source may leave out `shape` and `gather`; UserError for what neither form can do without.
    """
    ours = hasattr(made, "read")
    needed = ("path", "__len__", "name", "labels", "identity") if ours else ("__len__", "__getitem__")
    if missing := [name for name in needed if not hasattr(made, name)]:
        raise UserError(f"{path}: its data source, {type(made).__name__}, has no {', '.join(missing)}")
    if not ours:
        return DatasetSource(path, made)
    if not (hasattr(made, "shape") and hasattr(made, "gather")):
        made.shape = None
    return made


def as_pixels(image: Any, name: str) -> np.ndarray:
    """(H, W, C) uint8 of a Pillow image, or of an array: (H, W), (H, W, C) or (C, H, W), uint8 or floats in [0, 1]."""
    if hasattr(image, "convert"):
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise UserError(
            f"{name}: has shape {pixels.shape}; expected (H, W), (H, W, 1 or 3) or (1 or 3, H, W)"
        )
    if pixels.dtype.kind == "f" and 0 <= pixels.min() <= pixels.max() <= 1:
        pixels = np.rint(255 * pixels).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"{name}: is {pixels.dtype}; expected uint8, or floats in [0, 1]")
    return pixels


class TorchvisionSource(DatasetSource):
    """A data set of torchvision."""

    def __init__(self, path: str):
        name, _, split = path.partition(":")[2].partition("/")
        declare_missing_operators()
        try:
            from torchvision import datasets
        except (ImportError, RuntimeError) as error:
            raise UserError(f"{path}: needs torchvision: {extra('datasets')} ({error})") from None
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
            data = make(**{key: value for key, value in offered.items() if key in takes})
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from None
        super().__init__(path, data)


class HuggingFaceSource(LibrarySource):
    """A data set of the Hugging Face hub, or of its kind on disk: its first feature of images.

    Labels: its first feature of class labels, else of integers under a usual name.
    """

    def __init__(self, path: str):
        super().__init__(path)
        name, _, split = path.removeprefix(HUB).partition("@")
        if not name:
            raise UserError(f"{path}: the name is missing: {HUB}OWNER/NAME, or {HUB}FOLDER")
        try:
            import datasets
        except ImportError:
            raise UserError(f"{path}: needs the package datasets: {extra('datasets')}") from None
        try:
            self._data = _opened(datasets, name, split or "train")
        except UserError:
            raise
        except Exception as error:  # the hub, the network, the script of a data set: a dozen types
            raise UserError(f"{path}: {' '.join(str(error).split())}") from None
        kinds = {key: type(feature).__name__ for key, feature in self._data.features.items()}
        integers = [key for key, f in self._data.features.items() if "int" in str(getattr(f, "dtype", ""))]
        self._key = next((key for key, kind in kinds.items() if kind == "Image"), "")
        self._label = next((key for key, kind in kinds.items() if kind == "ClassLabel"), "") or first_of(
            LABELS, integers
        )
        if not self._key:
            raise UserError(f"{path}: has no feature of images: {', '.join(map(' '.join, kinds.items()))}")
        self._count = len(self._data)

    def identity(self) -> Iterator[str]:
        """Files on disk may change; what lies behind a name does not."""
        yield from super().identity()
        place = Path(self.path.removeprefix(HUB).partition("@")[0])
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (f"{f.name}:{f.stat().st_size}" for f in files if f.is_file())

    def _image(self, index: int) -> Any:
        image = self._data[index][self._key]
        if image is None:
            raise UserError(f"{self.name(index)}: is empty")
        return image

    @cached_property
    def _stored(self) -> Labels:
        if not self._label:
            return label_modes.UNLABELLED
        return self._named(self._data[self._label], getattr(self._data.features[self._label], "names", None))


def _opened(datasets: Any, name: str, split: str) -> Any:
    """One split of a data set on disk or of the hub."""
    place = Path(name)
    if name.endswith(PARQUET) and not place.is_dir():
        if not place.exists():
            raise UserError(f"{name}: no such file")
        return datasets.load_dataset("parquet", data_files=name, split="train")
    if not place.exists():
        parts = name.split("/")
        return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    if not any((place / saved).exists() for saved in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(name, split=split)
    data = datasets.load_from_disk(name)
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise UserError(f"{HUB}{name}: has no split {split}: it has {', '.join(data)}")
    return data[split]


def is_torchvision(path: str) -> bool:
    """Whether a path is the name of a data set of torchvision."""
    return path.startswith("torchvision:")


def is_hugging_face(path: str) -> bool:
    """Whether a path is the name of a data set of the Hugging Face hub, or a file of its kind."""
    return path.startswith(HUB) or path.endswith(PARQUET)
