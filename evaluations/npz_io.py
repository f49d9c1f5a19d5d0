"""Sets of images and reference statistics on disk.

Images: an npz with `arr_0` uint8 (N, H, W, C) and optional labels `arr_1`, or under usual names
(`cm.data.npz_names`), a folder, a zip, or a prepared store. They are streamed: only the batch in hand is in memory.
Statistics: an npz with `mu`, `sigma` (pooled features) and optionally `mu_s`, `sigma_s` (spatial
features) and `arr_0`, the layout of guided-diffusion's reference batches; files written here also carry `meta`, a JSON
text that says where the numbers come from.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cm.data.dataset import sampled_channels
from cm.data.decode import Decoder, readable
from cm.data.npz_names import IMAGES, first_of, is_named_npz
from cm.data.sources import Source, open_source, wrong_type
from cm.data.transforms import center_crop_arr
from cm.errors import UserError
from cm.runtime.inputs import parse_json, read_json
from cm.storage import filesystem
from cm.storage.weights import file_sha256

META = "meta"
MAX_FEATURES = 8192  # the covariance of so many has 512 MiB
META_LIMIT, LABELS_LIMIT = 16 << 20, 1 << 30  # bytes
ROUNDING = 1e-5  # relative error of a covariance that is only rounded
# Which arrays hold the mean and covariance of which features.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class ImageSet(Protocol):
    """Images of one size, read in order."""

    path: str
    shape: tuple[int, int, int, int]  # N, H, W, C
    labels: np.ndarray | None  # (N,) int64
    meta: dict | None  # how the images were made

    def batches(self, rows: range, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, C) arrays that cover `rows` (contiguous) in order."""

    def sha256(self) -> str:
        """Hash of the content."""


def open_images(path: str, image_size: int = 0) -> ImageSet:
    """The images that a path is: .npz, .zip, folder or prepared store. At least 2, all of one size.

    `image_size` crops and resizes as training does (ADM's centre crop); 0 takes the images as they are.
    """
    stream = str(path).lower().endswith(".npz") and not image_size and not is_named_npz(str(path))
    images = NpzImages(path) if stream else FileImages(path, image_size)
    if images.shape[0] < 2:
        raise UserError(f"{path}: holds {images.shape[0]} image; statistics need at least 2")
    return images


class NpzImages:
    """`arr_0` of an npz that has it, compressed or not, streamed from the archive."""

    def __init__(self, path: str):
        self.path = str(path)
        self._local = filesystem.cache_locally(self.path)
        with (
            readable(self.path),
            filesystem.open_zip(self._local) as archive,
            archive.open("arr_0.npy") as member,
        ):
            shape, dtype = _npy_header(member)
            if dtype != np.uint8:
                raise UserError(wrong_type("arr_0", member, shape, dtype))
        if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
            raise UserError(f"{path}: arr_0 is {shape}; expected (N, H, W, C): transpose it to channels last")
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape[1:]:
            raise UserError(f"{path}: arr_0 is {shape}; expected (N, H, W, 3), (N, H, W, 1) or (N, H, W)")
        self.shape = shape if len(shape) == 4 else (*shape, 1)
        with readable(self.path), filesystem.open_npz(self._local) as arrays:
            known = "arr_1" in arrays.files
            limit = min(16 * shape[0], LABELS_LIMIT)
            self.labels = _labels(_bounded(arrays, "arr_1", limit), shape[0]) if known else None
            self.meta = _read_meta(arrays) or _read_side_file(self.path)

    def batches(self, rows: range, batch_size: int) -> Iterator[np.ndarray]:
        size = int(np.prod(self.shape[1:]))
        archive = filesystem.open_zip(self._local)
        with readable(f"{self.path}: arr_0.npy"), archive, archive.open("arr_0.npy") as member:
            _npy_header(member)
            member.seek(member.tell() + rows.start * size)
            for start in range(rows.start, rows.stop, batch_size):
                n = min(batch_size, rows.stop - start)
                data = member.read(n * size)
                if len(data) != n * size:
                    raise UserError("ends early")
                yield np.frombuffer(data, np.uint8).reshape(n, *self.shape[1:])

    def sha256(self) -> str:
        return file_sha256(self._local)


class FileImages:
    """A folder, zip or prepared store of images; files are grey when a sample of them is, else RGB."""

    meta = None

    def __init__(self, path: str, image_size: int = 0):
        self.path = str(path)
        self._image_size = image_size
        self._source: Source = open_source(self.path)
        known = self._source.labels("auto")
        self.labels = known.indices
        self._decode = Decoder(channels=sampled_channels(self._source))
        self.shape = (len(self._source), *self._pixels(0).shape)

    def _pixels(self, index: int) -> np.ndarray:
        image = self._decode(self._source.read(index), self._source.name(index))
        pixels = center_crop_arr(image, self._image_size) if self._image_size else np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def batches(self, rows: range, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(rows.start, rows.stop, batch_size):
            stop = min(start + batch_size, rows.stop)
            out = np.empty((stop - start, *self.shape[1:]), np.uint8)
            for i in range(start, stop):
                pixels = self._pixels(i)
                if pixels.shape != self.shape[1:]:
                    raise UserError(
                        f"{self._source.name(i)} is {pixels.shape[1]}x{pixels.shape[0]}, "
                        f"{self._source.name(0)} is {self.shape[2]}x{self.shape[1]}: all images must have one size"
                    )
                out[i - start] = pixels
            yield out

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in self._source.identity():
            digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics, images or both. `statistics`: "pool", "spatial" -> (mu, sigma)."""

    path: str
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    images: ImageSet | None
    meta: dict | None

    def sha256(self) -> str:
        """Hash of the file, or of the images of a folder or zip."""
        return self.images.sha256() if self.images else file_sha256(filesystem.cache_locally(self.path))


def open_reference(path: str) -> Reference:
    """A statistics npz, with or without `arr_0`, or any set of images."""
    ending = os.path.splitext(str(path))[1].lower()
    if ending in (".npy", ".pkl", ".pickle", ".pt", ".pth", ".mat"):
        raise UserError(
            f"{path}: statistics are read from an .npz with the arrays mu and sigma, not from {ending}"
        )
    if ending != ".npz":
        return Reference(str(path), {}, open_images(path), None)
    with readable(str(path)), filesystem.open_npz(path) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise UserError("is not an npz archive")
        statistics = {
            kind: _gaussian(
                _bounded(arrays, mu, 8 * MAX_FEATURES),
                _bounded(arrays, sigma, 8 * MAX_FEATURES**2),
                mu,
                sigma,
            )
            for kind, (mu, sigma) in STATISTICS.items()
            if mu in arrays.files and sigma in arrays.files
        }
        named = not statistics and first_of(IMAGES, arrays.files) and is_named_npz(str(path))
        has_images, meta = "arr_0" in arrays.files or bool(named), _read_meta(arrays)
        if "pool" not in statistics and not has_images:
            raise UserError(
                f"has neither mu and sigma nor arr_0 (it holds {', '.join(arrays.files) or 'nothing'})"
            )
    return Reference(str(path), statistics, open_images(path) if has_images else None, meta)


def write_reference(
    path: str,
    statistics: dict[str, tuple[np.ndarray, np.ndarray]],
    meta: dict[str, Any],
    images: np.ndarray | None = None,
) -> None:
    """Write a statistics npz, whole or not at all. `images` (n, H, W, C) uint8 become `arr_0`."""
    arrays = {name: a for kind, pair in statistics.items() for name, a in zip(STATISTICS[kind], pair)}
    if images is not None:
        arrays["arr_0"] = images
    filesystem.write_atomic(path, lambda file: np.savez(file, **arrays, **{META: np.array(json.dumps(meta))}))


def default_json(samples: str, reference: str) -> Path:
    """Where a result goes unless told otherwise: beside the samples, named after both files."""
    place = Path(str(samples).rstrip("/"))
    return place.parent / f"{place.stem}_vs_{Path(str(reference).rstrip('/')).stem}.json"


def _npy_header(member) -> tuple[tuple[int, ...], np.dtype]:
    shape, fortran, dtype = _read_header(member)
    if fortran and len(shape) > 1:
        raise UserError("arr_0 is in Fortran order; save it in C order (np.ascontiguousarray)")
    return shape, dtype


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    one = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
    return read(member)


def array_header(arrays: np.lib.npyio.NpzFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of an array of an open npz, which is not unpacked for it."""
    with arrays.zip.open(f"{name}.npy") as member:
        shape, _fortran, dtype = _read_header(member)
    return shape, dtype


def _bounded(arrays: np.lib.npyio.NpzFile, name: str, limit: int) -> np.ndarray:
    """An array of an npz, if its header says at most `limit` bytes: a small file may unpack to any number."""
    shape, dtype = array_header(arrays, name)
    if (size := math.prod(shape) * dtype.itemsize) > limit:
        raise UserError(f"{name} unpacks to {size:,} bytes; at most {limit:,} are read")
    return arrays[name]


def _labels(values: np.ndarray, count: int) -> np.ndarray:
    if values.dtype.kind not in "iu" or values.shape != (count,):
        raise UserError(f"arr_1 is {values.dtype} {values.shape}; expected integer labels ({count},)")
    return values.astype(np.int64)


def _gaussian(
    mu: np.ndarray, sigma: np.ndarray, mu_name: str, sigma_name: str
) -> tuple[np.ndarray, np.ndarray]:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{mu_name} {mu.shape} and {sigma_name} {sigma.shape} do not fit together")
    for name, array in ((mu_name, mu), (sigma_name, sigma)):
        if array.dtype.kind not in "fiu":
            raise UserError(f"{name} is {array.dtype}; expected real numbers")
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds values that are not finite numbers")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    size = np.abs(sigma).max(initial=0.0)
    if (differ := np.abs(sigma - sigma.T).max(initial=0.0)) > ROUNDING * size:
        raise UserError(f"{sigma_name} is no covariance: it differs from its transpose by {differ:.3g}")
    try:  # positive definite but for rounding; far faster than the eigenvalues
        np.linalg.cholesky(sigma + (ROUNDING * size * len(mu) + np.finfo(np.float64).tiny) * np.eye(len(mu)))
    except np.linalg.LinAlgError:
        lowest = np.linalg.eigvalsh(sigma)[0]
        raise UserError(f"{sigma_name} is no covariance: it has the eigenvalue {lowest:.3g}") from None
    return mu, sigma


def _read_side_file(path: str) -> dict | None:
    """The JSON that image_sample writes beside its samples; None when there is none."""
    side_file = Path(path).with_suffix(".json")
    if filesystem.is_remote(path) or not side_file.is_file():
        return None
    try:
        meta = read_json(side_file, object)
    except OSError as error:
        raise UserError(f"{side_file} cannot be read: {error.strerror}") from None
    return meta if isinstance(meta, dict) else None


def _read_meta(arrays: np.lib.npyio.NpzFile) -> dict | None:
    if META not in arrays.files or array_header(arrays, META)[1].kind != "U":
        return None
    meta = parse_json(str(_bounded(arrays, META, META_LIMIT)), META, object)
    return meta if isinstance(meta, dict) else None
