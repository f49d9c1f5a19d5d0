"""CIFAR-10 archives (Krizhevsky 2009): cifar-10-python.tar.gz and cifar-10-binary.tar.gz, the 50,000 training images.

The Python version is pickled. A pickle can run any code, so its few allowed objects are rebuilt by hand.
"""

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Any

import numpy as np

from cm.errors import UserError
from cm.storage.unpickle import RestrictedUnpickler, one_line

FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_SIDE = 32
_IMAGE_BYTES = 3 * _SIDE * _SIDE
_MAX_BATCH_BYTES = 64 << 20


def read_training_set(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images (N, 32, 32, 3) uint8, labels (N,) int64 and class names from an opened archive."""
    members = dict(_members(file))
    python = [members[name] for name in sorted(members) if name.startswith("data_batch_") and "." not in name]
    binary = [
        members[name] for name in sorted(members) if name.startswith("data_batch_") and name.endswith(".bin")
    ]
    if python:
        batches = [_python_batch(content) for content in python]
        classes = _python_classes(members.get("batches.meta"))
    elif binary:
        batches = [_binary_batch(content) for content in binary]
        classes = tuple(members.get("batches.meta.txt", b"").decode().split())
    else:
        raise UserError("holds no CIFAR-10 training batches")
    images = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([numbers for _, numbers in batches])
    classes = classes or tuple(str(number) for number in range(10))
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"a label is outside the {len(classes)} classes")
    return images.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels, classes


@contextmanager
def open_stream(file: IO[bytes], whole: bool = True) -> Iterator[tarfile.TarFile]:
    """A tar, compressed or not, to be read once from its beginning.

    whole: of a gzip file the rest is read, too, when the body is through: its end holds the checksum, which tarfile
    does not ask for.
    """
    if file.read(2) != b"\x1f\x8b":
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            yield archive
        return
    file.seek(0)
    with gzip.GzipFile(fileobj=file) as content:
        with tarfile.open(fileobj=content, mode="r|") as archive:
            yield archive
        while whole and content.read(1 << 20):
            pass


def _members(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """(name without folder, content) of the archive's batches and their descriptions."""
    with open_stream(file) as archive:
        for member in archive:
            folder, _, name = member.name.removeprefix("./").partition("/")
            if (
                not member.isfile()
                or folder not in FOLDERS
                or not name.startswith(("data_batch_", "batches.meta"))
            ):
                continue
            if member.size > _MAX_BATCH_BYTES:
                raise UserError(f"{member.name} unpacks to {member.size} bytes")
            yield name, archive.extractfile(member).read()


def _python_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = load_restricted(content)
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    numbers = batch.get(b"labels") if isinstance(batch, dict) else None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise UserError("a batch is not a CIFAR-10 batch: its labels are no list of integers")
    if not isinstance(pixels, _Array) or pixels.pixels.shape != (len(numbers), _IMAGE_BYTES):
        raise UserError(
            f"a batch is not a CIFAR-10 batch: its data are not {len(numbers)} rows of {_IMAGE_BYTES}"
        )
    return pixels.pixels, np.array(numbers, dtype=np.int64)


def _python_classes(content: bytes | None) -> tuple[str, ...]:
    meta = load_restricted(content) if content else {}
    names = meta.get(b"label_names", []) if isinstance(meta, dict) else []
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _binary_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3072 pixel bytes, red plane first."""
    if not content or len(content) % (1 + _IMAGE_BYTES):
        raise UserError("a binary batch has an incomplete record")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _IMAGE_BYTES)
    return records[:, 1:], records[:, 0].astype(np.int64)


def load_restricted(content: bytes) -> Any:
    """A pickle made of dict, list, tuple, bytes, str, numbers and uint8 arrays (`_Array`); else a UserError."""
    with one_line("damaged pickle"):
        return RestrictedUnpickler(BytesIO(content), _STAND_INS, encoding="bytes").load()


class _Array:
    """Stands in for numpy's _reconstruct; the content, `pixels`, follows in __setstate__."""

    pixels: np.ndarray

    def __init__(self, *_arguments: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Uint8) or not isinstance(content, bytes):
            raise UserError("refused: an array in it is not uint8")
        self.pixels = np.frombuffer(content, dtype=np.uint8).reshape(
            shape, order="F" if fortran_order else "C"
        )


class _Uint8:
    """Stands in for numpy.dtype: only 'u1' exists."""

    def __init__(self, code: str | bytes, *_flags: Any):
        if code not in ("u1", b"u1"):
            raise UserError(f"refused: an array in it has type {code!r}, not uint8")

    def __setstate__(self, state: tuple) -> None:
        """Byte order and alignment, which mean nothing for single bytes."""


_STAND_INS = {
    ("numpy", "ndarray"): "a name that _reconstruct is given, never called",
    ("numpy", "dtype"): _Uint8,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}
