"""IDX files, the format of MNIST, Fashion-MNIST, KMNIST and EMNIST: images, and labels in a file beside them.

A path is a file of images, such as train-images-idx3-ubyte.gz, or a folder that holds one; of several those whose names
begin with `train` are taken. A text file classes.txt beside them names the classes, one a line.
"""

import gzip
import math
import struct

import numpy as np

from cm.config.parsing import printable
from cm.data import labels as label_modes
from cm.data.decode import readable
from cm.data.labels import Labels
from cm.data.sources import ArraySource
from cm.errors import UserError
from cm.runtime.inputs import JSON_LIMIT
from cm.storage import filesystem

MARK = "images-idx3-ubyte"
CLASSES = "classes.txt"
MAX_BYTES = 8 << 30


class IdxSource(ArraySource):
    """uint8 images (N, H, W) of an IDX file, with the integer labels of the file that belongs to it."""

    def __init__(self, path: str):
        file = images_of(path)
        with readable(file):
            images = read_idx(file)
        if images.ndim != 3 or 0 in images.shape:
            raise UserError(f"{file}: has shape {images.shape}; images are (N, H, W)")
        super().__init__(file, images[..., None])
        self._stored = self._read_labels()

    def _read_labels(self) -> Labels:
        path = labels_of(self.path)
        if not filesystem.exists(path):
            return label_modes.UNLABELLED
        with readable(path):
            values = read_idx(path)
        if values.shape != self.images.shape[:1]:
            raise UserError(f"{path}: labels of shape {values.shape} for {len(self.images)} images")
        found = label_modes.from_integers(values.astype(np.int64), path)
        file = f"{_folder(self.path)}{CLASSES}"
        if not filesystem.exists(file):
            return found
        text = filesystem.read_file(file, JSON_LIMIT).decode(errors="surrogateescape")
        names = [printable(line.strip()) for line in text.splitlines() if line.strip()]
        if len(names) < found.num_classes:
            raise UserError(f"{file}: names {len(names)} classes, the labels {found.num_classes}")
        return Labels(found.indices, tuple(names), CLASSES)


def is_idx(path: str) -> bool:
    """Whether a path is an IDX file of images, or a folder with one."""
    if not filesystem.isdir(path):
        return MARK in path.rpartition("/")[2].replace(".idx", "-idx")
    return bool(_images_in(path))


def images_of(path: str) -> str:
    """The file of images that a path means."""
    if not filesystem.isdir(path):
        return path
    found = _images_in(path)
    chosen = [name for name in found if name.startswith("train")] or found
    if len(chosen) > 1:
        raise UserError(f"{path}: holds several IDX files of images ({', '.join(chosen)}): give one of them")
    return f"{path.rstrip('/')}/{chosen[0]}"


def labels_of(path: str) -> str:
    """Where the labels of a file of images would be."""
    return path.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")


def read_idx(path: str) -> np.ndarray:
    """The uint8 array of an IDX file, compressed or not; UserError for anything else."""
    local = filesystem.cache_locally(path)
    with (gzip.open if path.endswith(".gz") else open)(local, "rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8 or not 1 <= head[3] <= 4:
            raise UserError(f"{path}: is no IDX file of bytes")
        sizes = file.read(4 * head[3])
        if len(sizes) < 4 * head[3]:
            raise UserError(f"{path}: ends in its header")
        shape = struct.unpack(f">{head[3]}I", sizes)
        count = math.prod(shape)
        if count > MAX_BYTES:
            raise UserError(f"{path}: says that it unpacks to {count} bytes (decompression bomb?)")
        # Read piece by piece: a header may promise more than there is.
        pieces, left = [], count
        while left and (piece := file.read(min(left, 1 << 24))):
            pieces.append(piece)
            left -= len(piece)
        if left:
            raise UserError(f"{path}: holds {count - left} of {count} bytes")
    return np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(shape)


def _images_in(path: str) -> list[str]:
    names = [] if filesystem.is_remote(path) else filesystem.list_files(path)
    return [name for name in names if MARK in name.replace(".idx", "-idx")]


def _folder(path: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return folder + slash
