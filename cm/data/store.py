"""The prepared data set on disk: uncompressed uint8 .npy shards, labels.npy, checks.npy, and manifest.json.

Why plain arrays: no decoding, one page-cache copy for all ranks and workers through memory maps, random access
without an index, readable by numpy alone. They cost about twice the disk space of PNG at 64 px.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from cm.errors import UserError
from cm.runtime.claims import claimed_place
from cm.runtime.inputs import JSON_LIMIT, open_regular, parse_json
from cm.storage import filesystem

MANIFEST = "manifest.json"
FORMAT = "cm-image-store"
VERSION = 1
SHARD_BYTES = 256 << 20


def is_store(path: str) -> bool:
    """True when a folder holds a manifest of this format."""
    return _load_manifest(path).get("format") == FORMAT


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest, checked field by field; UserError names the file."""
    manifest = _load_manifest(path)
    where = f"{path}/{MANIFEST}"
    if manifest.get("version") != VERSION:
        raise UserError(f"{where}: version {manifest.get('version')}, this code reads version {VERSION}")
    for key, kind in _FIELDS.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest.get(key), bool):
            raise UserError(f"{where}: {key} is missing or of the wrong type")
    if not all(map(_is_entry, _entries(manifest))):
        raise UserError(f"{where}: lists a file without a hash, or outside its folder")
    if not all(isinstance(name, str) for name in manifest["classes"]):
        raise UserError(f"{where}: the names of classes must be texts")
    counts = [shard.get("count") for shard in manifest["shards"]]
    if not all(type(count) is int and count > 0 for count in counts) or sum(counts) != manifest["count"]:
        raise UserError(f"{where}: the shards do not add up to {manifest['count']} images")
    if not counts or manifest["resolution"] < 1 or manifest["channels"] not in (1, 3):
        raise UserError(f"{where}: no images, or an impossible resolution or number of channels")
    return manifest


def open_shards(path: str, manifest: dict[str, Any]) -> list[np.ndarray]:
    """Memory maps of all shards, (count, R, R, C) uint8 each; UserError for a missing or damaged one."""
    side, channels = manifest["resolution"], manifest["channels"]
    return [
        _map_array(f"{path}/{shard['file']}", (shard["count"], side, side, channels), np.uint8)
        for shard in manifest["shards"]
    ]


def read_labels(path: str, manifest: dict[str, Any]) -> np.ndarray | None:
    """(N,) int64, or None for an unlabelled store."""
    if manifest["labels"] is None:
        return None
    name = f"{path}/{manifest['labels']['file']}"
    values = _checked_array(path, manifest["labels"], manifest["count"], np.int64)
    if values.min() < 0 or values.max() >= len(manifest["classes"]):
        raise UserError(f"{name}: a label is outside the {len(manifest['classes'])} classes of the manifest")
    return values


def read_checks(path: str, manifest: dict[str, Any]) -> np.ndarray | None:
    """(N,) uint32: CRC-32 of each image's pixels; None for a store of a version that kept none."""
    entry = manifest.get("checks")
    return _checked_array(path, entry, manifest["count"], np.uint32) if entry else None


def damaged_files(path: str, manifest: dict[str, Any]) -> list[str]:
    """Files whose SHA-256 differs from the manifest's."""
    return [
        entry["file"]
        for entry in _entries(manifest)
        if _file_sha256(f"{path}/{entry['file']}") != entry["sha256"]
    ]


class StoreWriter:
    """Writes a store beside its destination and moves it there when complete; the manifest comes last."""

    def __init__(self, path: str, *, resolution: int, channels: int, overwrite: bool = False):
        if filesystem.is_remote(path):
            raise UserError(f"{path}: a data set is prepared on a local disk, then copied")
        self.path = path.rstrip("/")
        self._overwrite = overwrite
        self._partial = f"{self.path}.partial-{os.getpid()}"
        self._claim = ExitStack()
        image_bytes = resolution * resolution * channels
        self._buffer = np.empty(
            (max(1, SHARD_BYTES // image_bytes), resolution, resolution, channels), np.uint8
        )
        self._fill = 0
        self._shards: list[dict[str, Any]] = []
        self._checks: list[int] = []

    def __enter__(self) -> "StoreWriter":
        try:
            self._claim.enter_context(claimed_place(self.path, "OUT", folder=True))
            _remove_leftovers(self.path)
            self._check_free()
            try:
                os.makedirs(self._partial)
            except OSError as error:
                raise UserError(f"{self.path}: cannot create it ({error.strerror})") from error
        except BaseException:  # a signal, too
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove everything that was written; a store that `finish` completed stays."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._claim.close()

    def _check_free(self) -> None:
        """UserError unless a store may be written at the path."""
        path = self.path
        if not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)):
            return
        if not (os.path.isdir(path) and is_store(path)):
            raise UserError(f"{path}: exists and is not a prepared data set; choose another output folder")
        if not self._overwrite:
            raise UserError(f"{path}: exists; pass --overwrite True to replace it")

    def add(self, image: np.ndarray) -> None:
        """Append one (R, R, C) uint8 image."""
        self._buffer[self._fill] = image
        self._checks.append(zlib.crc32(self._buffer[self._fill]))
        self._fill += 1
        if self._fill == len(self._buffer):
            self._flush()

    @property
    def count(self) -> int:
        """Images added so far."""
        return sum(shard["count"] for shard in self._shards) + self._fill

    def finish(self, labels: np.ndarray | None, classes: Sequence[str], **description: Any) -> dict[str, Any]:
        """Write labels and manifest and put the store in its place; returns the manifest."""
        self._flush()
        label_entry = None if labels is None else self._save("labels.npy", labels.astype(np.int64))
        counts = [] if labels is None else np.bincount(labels, minlength=len(classes)).tolist()
        hashes = [shard["sha256"] for shard in self._shards] + [label_entry["sha256"] if label_entry else ""]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "count": self.count,
            "resolution": self._buffer.shape[1],
            "channels": self._buffer.shape[3],
            "num_classes": len(classes),
            "classes": list(classes),
            "class_counts": counts,
            **description,
            "shards": self._shards,
            "labels": label_entry,
            "checks": self._save("checks.npy", np.array(self._checks, np.uint32)),
            "sha256": hashlib.sha256("\n".join([*hashes, *classes]).encode()).hexdigest(),
        }
        content = json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"
        filesystem.write_atomic(f"{self._partial}/{MANIFEST}", content)
        self._replace()
        return manifest

    def _flush(self) -> None:
        if self._fill:
            entry = self._save(f"images-{len(self._shards):05d}.npy", self._buffer[: self._fill])
            self._shards.append({**entry, "count": self._fill})
            self._fill = 0

    def _save(self, name: str, array: np.ndarray) -> dict[str, Any]:
        path = f"{self._partial}/{name}"

        def write(file: IO[bytes]) -> None:
            # np.save would hide the cause of a failed write, such as a full disk
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(np.ascontiguousarray(array).data)

        filesystem.write_atomic(path, write)
        return {"file": name, "sha256": _file_sha256(path)}

    def _replace(self) -> None:
        old = f"{self.path}.old-{os.getpid()}"
        if not os.path.exists(self.path):
            os.rename(self._partial, self.path)
            return
        os.rename(self.path, old)
        os.rename(self._partial, self.path)
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(path: str) -> None:
    """Remove what a killed process left beside a store that it was writing; an old store that it had moved comes back.

    Whoever calls it has claimed the path, so that nobody else writes there.
    """
    folder, name = os.path.split(os.path.abspath(path))
    left = [n for n in os.listdir(folder) if re.fullmatch(re.escape(name) + r"\.(partial|old)-\d+", n)]
    for leftover in (os.path.join(folder, n) for n in sorted(left)):
        if ".old-" in leftover and not os.path.exists(path):
            os.rename(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


_FIELDS: dict[str, Any] = {
    "count": int,
    "resolution": int,
    "channels": int,
    "classes": list,
    "shards": list,
    "labels": (dict, type(None)),
    "checks": (dict, type(None)),
    "sha256": str,
}


def _entries(manifest: dict[str, Any]) -> list[Any]:
    """What the manifest says of its files."""
    return [*manifest["shards"], *(manifest[key] for key in ("labels", "checks") if manifest.get(key))]


def _is_entry(entry: Any) -> bool:
    """True for {"file": a bare file name, "sha256": text, ...}."""
    name, digest = (entry.get("file"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    return isinstance(name, str) and isinstance(digest, str) and bool(name) and name == os.path.basename(name)


def _load_manifest(path: str) -> dict[str, Any]:
    name = f"{path.rstrip('/')}/{MANIFEST}"
    if not filesystem.exists(name):
        return {}
    content = parse_json(filesystem.read_file(name, JSON_LIMIT), name, object)
    return content if isinstance(content, dict) else {}


def _map_array(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        array = np.load(filesystem.cache_locally(name), mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many types on damaged headers
        raise UserError(f"{name}: missing or damaged ({' '.join(str(error).split())})") from error
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        raise UserError(f"{name}: is not the {np.dtype(dtype)} array of shape {shape} in the manifest")
    return np.asarray(array)  # a plain view: indexing a memmap object is several times slower


def _checked_array(path: str, entry: dict[str, Any], count: int, dtype: type) -> np.ndarray:
    """A small array, read and compared with its hash."""
    name = f"{path}/{entry['file']}"
    values = np.array(_map_array(name, (count,), dtype))
    if _file_sha256(name) != entry["sha256"]:
        raise UserError(f"{name}: differs from its hash in the manifest, it is damaged")
    return values


def _file_sha256(name: str) -> str:
    with open_regular(filesystem.cache_locally(name)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
