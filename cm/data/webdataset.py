"""WebDataset: tars in which the files of a sample share a name: 000001.jpg with 000001.cls or 000001.json.

A path is a .tar, a list in braces (`shards-{000..012}.tar`), or a folder of .tar files. Uncompressed tars are indexed
once and read at any place.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from cm.data import labels as label_modes
from cm.data.decode import EXTENSIONS, readable
from cm.data.labels import Labels
from cm.data.sources import check_member, stored_labels
from cm.errors import UserError
from cm.runtime.inputs import parse_json
from cm.storage import filesystem

KEYS = ("cls", "label", "class", "class_name")
FIRST = 64  # members that decide what a tar is


class Member(NamedTuple):
    """Where a file of a tar lies."""

    tar: str
    name: str
    offset: int
    size: int


class WebDatasetSource:
    """The images of WebDataset shards, with their labels."""

    shape, passed_over = None, 0

    def __init__(self, path: str):
        self.path = path
        images, said = {}, {}
        for tar in shards(path):
            with readable(tar):
                for key, ending, member in members(tar):
                    if ending in EXTENSIONS:
                        images.setdefault((tar, key), member)
                    elif ending in ("cls", "json", "txt"):
                        said.setdefault((tar, key), {})[ending] = member
        if not images:
            raise UserError(f"{path}: holds no images ({', '.join(EXTENSIONS)})")
        self._images = list(images.values())
        self._stored = self._read_labels([said.get(key, {}) for key in images])

    def _read_labels(self, said: list[dict[str, Member]]) -> Labels:
        found = [self._label(files) for files in said]
        if all(value is None for value in found):
            return label_modes.UNLABELLED
        missing = next((i for i, value in enumerate(found) if value is None), None)
        if missing is not None:
            raise UserError(f"{self.name(missing)} has no label, other images have")
        if all(isinstance(value, int) for value in found):
            return label_modes.from_integers(found, self.path)
        return label_modes.from_names([str(value) for value in found], "WebDataset")

    def _label(self, files: dict[str, Member]) -> int | str | None:
        if "cls" in files:
            text = self._bytes(files["cls"]).decode("utf-8", "replace").strip()
            return int(text) if text.isdecimal() else text
        if "json" in files:
            with readable(files["json"].name):
                content = parse_json(self._bytes(files["json"]), files["json"].name, object)
            return next((content[key] for key in KEYS if isinstance(content, dict) and key in content), None)
        return None

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """For messages: which image this is."""
        return f"{self._images[index].tar}: {self._images[index].name}"

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        with readable(self.name(index)):
            return self._bytes(self._images[index])

    def labels(self, mode: str) -> Labels:
        """The stored labels; only auto and none make sense."""
        return stored_labels(self._stored, mode, self.path)

    def identity(self) -> Iterator[str]:
        """Names and sizes."""
        for member in self._images:
            yield f"{member.name}:{member.size}"

    def _bytes(self, member: Member) -> bytes:
        with open(filesystem.cache_locally(member.tar), "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def members(tar: str) -> Iterator[tuple[str, str, Member]]:
    """(key of the sample, ending, place) of every file of a tar."""
    with tarfile.open(filesystem.cache_locally(tar), mode="r:") as archive:
        for info in archive:
            if info.isfile():
                check_member(info.name, info.size)
                folder, slash, file = info.name.rpartition("/")
                key, _, ending = file.partition(".")
                place = Member(tar, info.name, info.offset_data, info.size)
                yield folder + slash + key, ending.lower().rpartition(".")[2], place


def shards(path: str) -> list[str]:
    """The tars that a path means."""
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = found.groups()
        numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
        return [path[: found.start()] + number + path[found.end() :] for number in numbers]
    if filesystem.isdir(path):
        return [f"{path.rstrip('/')}/{name}" for name in filesystem.list_files(path) if name.endswith(".tar")]
    return [path]


def is_webdataset(path: str) -> bool:
    """Whether a path is WebDataset: names in braces, a folder of tars, or a tar with labels beside its images."""
    if re.search(r"\{\d+\.\.\d+\}", path):
        return path.endswith(".tar")
    if filesystem.isdir(path):
        names = [] if filesystem.is_remote(path) else filesystem.list_files(path)
        tars = [name for name in names if name.endswith(".tar")]
        return bool(tars) and all(name.endswith((".tar", ".json", ".txt")) for name in names)
    if not path.endswith(".tar") or not filesystem.exists(path):
        return False
    try:
        endings = {ending for (_, ending, _), _ in zip(members(path), range(FIRST))}
    except Exception:  # damaged bytes make tarfile raise almost anything: who reads the archive says it
        return False
    return "cls" in endings or ("json" in endings and bool(endings & set(EXTENSIONS)))
