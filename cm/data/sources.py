"""Where images come from. A source has names, gives item i as file bytes or as a uint8 (H, W, C) array, and
knows the labels that were stored with it. Arrays of one size also offer `shape` and `gather` (no PIL needed).
"""

import functools
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Protocol

import numpy as np

from cm.config.registry import DataSource, resolve
from cm.config.rows import DATA_SOURCES
from cm.data import labels as label_modes
from cm.data import store
from cm.data.decode import EXTENSIONS, readable
from cm.data.labels import Labels
from cm.errors import UserError
from cm.runtime.inputs import JSON_LIMIT, parse_json
from cm.storage import filesystem

MAX_MEMBER_BYTES = 256 << 20
MAX_COMPRESSION = 200
# Of macOS, Synology and Windows
SYSTEM_NAMES = (
    "__MACOSX",
    "@eaDir",
    "@tmp",
    "@Recycle",
    "@Recently-Snapshot",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)


class Source(Protocol):
    """What `cm.data.dataset.ImageData` needs of a source."""

    path: str
    shape: tuple[int, int, int] | None  # (H, W, C) when all images are arrays of that shape
    passed_over: int  # images under hidden or system names, which are none of the data

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """For messages: which image this is."""

    def read(self, index: int) -> bytes | np.ndarray:
        """The bytes of an image file, or uint8 (H, W, C)."""

    def labels(self, mode: str) -> Labels:
        """Labels by `--labels` mode."""

    def identity(self) -> Iterator[str]:
        """Text that changes when the images change."""


class FolderSource:
    """All images below a folder, local or remote, sorted folder by folder; or the given ones of them."""

    shape = None

    def __init__(self, path: str, names: Sequence[str] | None = None):
        self.path = path
        listing = filesystem.list_recursive(path) if names is None else []
        self.names, self.passed_over = list(names or ()), 0
        if names is None:
            self.names, self.passed_over = without_hidden(image_names(listing, path), path)
        self._has_json = "dataset.json" in listing

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self._full(self.names[index])

    def read(self, index: int) -> bytes:
        with readable(self.name(index)):
            return filesystem.read_file(self.name(index), MAX_MEMBER_BYTES)

    def labels(self, mode: str) -> Labels:
        content = None
        if self._has_json and mode in ("auto", "json"):
            with readable(self._full("dataset.json")):
                data = filesystem.read_file(self._full("dataset.json"), JSON_LIMIT)
            content = parse_json(data, self._full("dataset.json"), (dict, list))
        return label_modes.resolve(self.names, mode, content, self.path)

    def identity(self) -> Iterator[str]:
        """Names and sizes; names only where each size would be a request over the network."""
        remote = filesystem.is_remote(self.path)
        for name in self.names:
            yield name if remote else f"{name}:{_size(self._full(name))}"

    def _full(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if self.path else name


class ZipSource:
    """All images in a zip file (compressed or not), with EDM's dataset.json when it is there."""

    shape = None

    def __init__(self, path: str):
        self.path = path
        self._local = filesystem.cache_locally(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        with readable(path):
            members = self._archive().infolist()
            for member in members:
                check_member(member.filename, member.file_size)
        self.names, self.passed_over = without_hidden(
            image_names(sorted(m.filename for m in members), path), path
        )
        self._identity = {m.filename: f"{m.filename}:{m.file_size}:{m.CRC}" for m in members}

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.path}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        with readable(self.name(index)):
            return self._archive().read(self.names[index])

    def labels(self, mode: str) -> Labels:
        content = None
        if "dataset.json" in self._identity and mode in ("auto", "json"):
            with readable(f"{self.path}: dataset.json"):
                data = self._archive().read("dataset.json")
            content = parse_json(data, f"{self.path}: dataset.json", (dict, list))
        return label_modes.resolve(self.names, mode, content, self.path)

    def identity(self) -> Iterator[str]:
        for name in self.names:
            yield self._identity[name]

    def _archive(self) -> zipfile.ZipFile:
        """One handle per process: workers that shared one would move each other's file position."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), filesystem.open_zip(self._local))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


class ArraySource:
    """uint8 images (N, H, W, C) in memory, with their labels."""

    passed_over = 0

    def __init__(self, path: str, images: np.ndarray, labels: Labels = label_modes.UNLABELLED):
        self.path, self.images, self._stored = path, images, labels
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def gather(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), H, W, C) uint8."""
        return self.images[np.asarray(indices, dtype=np.int64)]

    def labels(self, mode: str) -> Labels:
        """The stored labels; only auto and none make sense."""
        return stored_labels(self._stored, mode, self.path)

    def identity(self) -> Iterator[str]:
        """Hash of all pixels."""
        pixels = np.ascontiguousarray(self.images).data
        yield f"{self.images.shape}:{hashlib.sha256(pixels).hexdigest()}"


class NpzSource(ArraySource):
    """The layout of sample files: `arr_0` uint8 (N, H, W, C) or (N, H, W), optional integer labels `arr_1` (N,)."""

    def __init__(self, path: str):
        with readable(path):
            arrays = _read_npz(filesystem.cache_locally(path))
        stored = arrays["arr_0"]
        images = stored[..., None] if stored.ndim == 3 else stored
        if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
            raise UserError(
                f"{path}: arr_0 has shape {stored.shape}; expected (N, H, W, 1 or 3) or (N, H, W)"
            )
        labels = label_modes.UNLABELLED
        if "arr_1" in arrays:
            labels = label_modes.from_integers(arrays["arr_1"], f"{path}: arr_1")
            if len(labels.indices) != len(images):
                raise UserError(f"{path}: {len(labels.indices)} labels for {len(images)} images")
        super().__init__(path, images, labels)


class StoreSource:
    """A folder written by scripts/prepare_data.py: memory-mapped uint8 shards and a manifest."""

    passed_over = 0

    def __init__(self, path: str):
        self.path = path
        self.manifest = store.read_manifest(path)
        self.shape = (self.manifest["resolution"], self.manifest["resolution"], self.manifest["channels"])
        self._starts = np.cumsum([0, *(shard["count"] for shard in self.manifest["shards"])])
        _ = self._shards, self._checks  # all files are there and whole, now rather than in a worker

    def __len__(self) -> int:
        return self.manifest["count"]

    def name(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def read(self, index: int) -> np.ndarray:
        return self.gather([index])[0]

    def gather(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), H, W, C) uint8."""
        indices = np.asarray(indices)
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for row, (shard, offset) in enumerate(zip(shards, indices - self._starts[shards])):
            out[row] = self._shards[shard][offset]
        if self._checks is not None:
            self._compare(out, indices)
        return out

    def _compare(self, images: np.ndarray, indices: np.ndarray) -> None:
        """UserError for an image that is not as it was written: a disk may flip bits years later."""
        for image, expected, index in zip(images, self._checks[indices].tolist(), indices.tolist()):
            if zlib.crc32(image) != expected:
                raise UserError(f"{self.name(index)} is damaged (cm inspect {self.path} finds all that are)")

    def labels(self, mode: str) -> Labels:
        values = store.read_labels(self.path, self.manifest)
        classes = tuple(self.manifest["classes"])
        known = Labels(values, classes, "manifest") if values is not None else label_modes.UNLABELLED
        return stored_labels(known, mode, self.path)

    def identity(self) -> Iterator[str]:
        yield self.manifest["sha256"]

    @functools.cached_property
    def _shards(self) -> list[np.ndarray]:
        return store.open_shards(self.path, self.manifest)

    @functools.cached_property
    def _checks(self) -> np.ndarray | None:
        return store.read_checks(self.path, self.manifest)

    def __getstate__(self) -> dict:
        """Memory maps are opened again in a worker; pickling one would copy its pixels."""
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}


def is_prepared(path: str) -> bool:
    """Whether a path is a folder that scripts/prepare_data.py wrote."""
    return filesystem.isdir(path) and store.is_store(path)


def is_zip(path: str) -> bool:
    """Whether a path names a zip file."""
    return path.lower().endswith(".zip")


def is_npz(path: str) -> bool:
    """Whether a path names an npz file."""
    return path.lower().endswith(".npz")


def matches(row: DataSource, path: str) -> bool:
    """Whether a row of DATA_SOURCES reads a path."""
    return (resolve(row.matches) if isinstance(row.matches, str) else row.matches)(path)


def is_name(path: str) -> bool:
    """Whether a path may be any text for one that reads it: a plug-in, or names of other libraries' data sets."""
    return any((row.named or row.origin) and matches(row, path) for row in DATA_SOURCES.values())


def open_source(path: str) -> Source:
    """The source that reads a path: the first row of DATA_SOURCES that matches it, plug-ins' first.

    A plug-in's path may be any text, and so may names of other libraries' data sets; the others must exist.
    """
    if not path:
        raise UserError("--data_dir is missing: give a folder, a .zip or an .npz of images")
    rows = sorted(DATA_SOURCES.values(), key=lambda row: (not row.origin, not row.named))
    for row in rows:
        if not (row.origin or row.named) and not filesystem.exists(path):
            raise UserError(f"{path}: no such folder or file")
        if matches(row, path):
            return row.load()(path)
    raise UserError(
        f"{path}: not a folder, .zip, .npz, IDX or parquet file; cm prepare also reads tars, lmdb and CIFAR-10 "
        "(docs/data.md)"
    )


def image_names(names: Sequence[str], path: str, extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """Those names that end as image files do; UserError when there is none."""
    images = [name for name in names if PurePosixPath(name).suffix[1:].lower() in extensions]
    if not images:
        raise UserError(f"{path}: holds no images ({', '.join(extensions)})")
    return images


def without_hidden(names: Sequence[str], path: str) -> tuple[list[str], int]:
    """(names of the images that are data, how many are not); UserError when none is."""
    seen = [name for name in names if not is_hidden(name)]
    if not seen:
        raise UserError(f"{path}: holds no images but {len(names)} under hidden or system names")
    return seen, len(names) - len(seen)


def is_hidden(name: str) -> bool:
    """Whether a name within a data set is one that systems and editors leave behind: .name, __MACOSX, @eaDir ..."""
    parts = [part for part in PurePosixPath(name).parts if part != ".."]
    return any(part in SYSTEM_NAMES or part.startswith(".") for part in parts)


def check_member(name: str, size: int) -> None:
    """Refuse an archive member whose name leaves the archive, or that unpacks to more than any image."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"unsafe member name {name!r}")
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"member {name} unpacks to {size} bytes (decompression bomb?)")


def stored_labels(known: Labels, mode: str, where: str) -> Labels:
    """Labels of a source that brings its own: only auto and none make sense."""
    if mode == "none":
        return label_modes.UNLABELLED
    if mode != "auto":
        raise UserError(
            f"{where}: --labels {mode} needs image files; this source brings its own labels (auto)"
        )
    return known


def _size(path: str) -> str:
    """Length of a file; of one that is not there, such as a dangling link, reading it says more."""
    try:
        return str(filesystem.size(path))
    except OSError:
        return "unreadable"


def _read_npz(path: str) -> dict[str, np.ndarray]:
    """arr_0 and arr_1 of an npz."""
    with filesystem.open_npz(path) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile) or "arr_0" not in arrays.files:
            raise UserError("has no array arr_0")
        found = {"arr_0": bounded_array(arrays, "arr_0", images=True)}
        return found | ({"arr_1": bounded_array(arrays, "arr_1")} if "arr_1" in arrays.files else {})


def wrong_type(name: str, member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> str:
    """Why an array that is not uint8 is refused, with the conversion to images that would be right for its range.

    member: the array's file, just behind its header.
    """
    if dtype.hasobject or dtype.kind not in "fiu":
        return f"{name} is {dtype}; expected uint8 images"
    count = min(int(np.prod(shape)), 1 << 20)
    data = member.read(count * dtype.itemsize)
    values = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
    if not np.isfinite(values).all():
        return f"{name} is {dtype} and holds values that are not finite; expected uint8 images"
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if dtype.kind in "iu" or high > 1:
        advice = "x.clip(0, 255).astype(np.uint8)"
    else:
        scaled = "(x + 1) * 127.5" if low < 0 else "x * 255"
        advice = f"({scaled}).clip(0, 255).astype(np.uint8)"
    return f"{name} is {dtype} with values from {low:.3g} to {high:.3g}; expected uint8 images: save {advice}"


def bounded_array(arrays: np.lib.npyio.NpzFile, name: str, images: bool = False) -> np.ndarray:
    """An array of an open npz; its type and size are judged from headers before anything is unpacked."""
    member = arrays.zip.getinfo(f"{name}.npy")
    if member.file_size > MAX_MEMBER_BYTES and member.file_size > MAX_COMPRESSION * member.compress_size:
        raise UserError(f"{name} unpacks to {member.file_size} bytes (decompression bomb?)")
    with arrays.zip.open(member) as file:
        one = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, _fortran, dtype = read(file)
        if images and dtype != np.uint8:
            raise UserError(wrong_type(name, file, shape, dtype))
    if dtype.hasobject:
        raise UserError(f"{name} is {dtype}; expected integers")
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise UserError(f"{name} says {shape}, which is more than it holds")
    return arrays[name]
