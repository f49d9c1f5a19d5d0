"""Class labels of a data set: from dataset.json, from folders, or from file names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cm.config.parsing import printable
from cm.errors import UserError

MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Labels:
    """`indices` (N,) int64, or None when unlabelled; `classes` is the name of each index; `origin` says from where."""

    indices: np.ndarray | None
    classes: tuple[str, ...]
    origin: str

    @property
    def num_classes(self) -> int:
        """0 when unlabelled."""
        return len(self.classes)


UNLABELLED = Labels(None, (), "none")


def from_names(class_names: Sequence[str], origin: str) -> Labels:
    """One class name per image; classes are numbered in sorted order."""
    classes = sorted(set(class_names))
    number = {name: index for index, name in enumerate(classes)}
    indices = np.array([number[name] for name in class_names], dtype=np.int64)
    return Labels(indices, tuple(map(printable, classes)), origin)


def from_integers(values: Any, origin: str) -> Labels:
    """One class index per image, 0 or more; the class names are the numbers."""
    indices = np.asarray(values)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        hot = "; of one-hot rows store labels.argmax(1)" if indices.ndim == 2 else ""
        raise UserError(
            f"{origin}: {indices.dtype} {indices.shape}; labels must be one integer per image{hot}"
        )
    if indices.size == 0 or indices.min() < 0 or indices.max() >= MAX_CLASSES:
        raise UserError(f"{origin}: labels must lie in [0, {MAX_CLASSES})")
    return Labels(indices.astype(np.int64), tuple(str(i) for i in range(int(indices.max()) + 1)), origin)


def from_values(values: Any, origin: str) -> Labels:
    """One class per image: its index, or its name as text."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind != "U" or not len(values):
        return from_integers(values, origin)
    names, indices = np.unique(values, return_inverse=True)
    if len(names) > MAX_CLASSES:
        raise UserError(f"{origin}: {len(names)} names; at most {MAX_CLASSES} classes")
    return Labels(indices.astype(np.int64), tuple(map(printable, names.tolist())), origin)


def resolve(names: Sequence[str], mode: str, dataset_json: Any, where: str) -> Labels:
    """Labels of the images `names` (relative, with '/') by `mode`: auto, folder, prefix, json or none.

    auto: dataset.json when there is one, else subfolders, else the text before the first underscore of each file
    name when every name has one, else unlabelled. dataset_json: its parsed content, or None; where: for messages.
    """
    if mode not in MODES:
        raise UserError(f"--labels {mode}: choose one of {', '.join(MODES)}")
    return MODES[mode](names, dataset_json, where)


def _by_json(names: Sequence[str], content: Any, where: str) -> Labels:
    """EDM's layout {"labels": [[name, class], ...]} or plain {name: class}; a class is an integer or a string."""
    origin = f"{where}: dataset.json"
    if content is None:
        raise UserError(f"{where}: --labels json needs a dataset.json inside")
    if isinstance(content, dict) and "labels" in content:
        content = content["labels"]
    if content is None:
        return UNLABELLED
    try:
        table = {
            str(name): value for name, value in (content.items() if isinstance(content, dict) else content)
        }
    except (TypeError, ValueError):
        raise UserError(f'{origin}: expected {{"labels": [[name, class], ...]}} or {{name: class}}') from None
    missing = next((name for name in names if name not in table), None)
    if missing is not None:
        raise UserError(f"{origin} has no label for {missing}")
    values = [table[name] for name in names]
    if all(isinstance(value, str) for value in values):
        return replace(from_names(values, origin), origin="dataset.json")
    if all(type(value) is int and 0 <= value < MAX_CLASSES for value in values):
        return replace(from_integers(values, origin), origin="dataset.json")
    if all(type(value) is int for value in values):
        raise UserError(f"{origin}: labels must lie in [0, {MAX_CLASSES})")
    raise UserError(f"{origin}: classes must be all integers or all strings")


def _by_folder(names: Sequence[str], _content: Any, where: str) -> Labels:
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    outside = next((name for name, folder in zip(names, folders) if not folder), None)
    if outside is not None:
        raise UserError(f"{where}: --labels folder, but {outside} lies in no class folder")
    depth = min(_common_depth(folders), min(len(folder) for folder in folders) - 1)
    return from_names([folder[depth] for folder in folders], "folders")


def _by_prefix(names: Sequence[str], _content: Any, where: str) -> Labels:
    bare = next((name for name in names if "_" not in PurePosixPath(name).name), None)
    if bare is not None:
        raise UserError(f"{where}: --labels prefix, but {bare} has no underscore in its name")
    return from_names([name_prefix(name) for name in names], "file-name prefixes")


def _none(_names: Sequence[str], _content: Any, _where: str) -> Labels:
    return UNLABELLED


def _auto(names: Sequence[str], content: Any, where: str) -> Labels:
    if content is not None:
        return _by_json(names, content, where)
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    depth = _common_depth(folders)
    if all(len(folder) > depth for folder in folders):
        return from_names([folder[depth] for folder in folders], "folders")
    if all("_" in PurePosixPath(name).name for name in names):
        return _by_prefix(names, content, where)
    return UNLABELLED


def name_prefix(path: str) -> str:
    """The text before the first underscore of a file name; the whole file name when it has none."""
    return PurePosixPath(path).name.split("_")[0]


def _common_depth(folders: Sequence[tuple[str, ...]]) -> int:
    """How many leading folders all images share: a data set wrapped in one more folder has the same classes."""
    first, last = min(folders), max(folders)
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    return depth


MODES: dict[str, Callable[[Sequence[str], Any, str], Labels]] = {
    "auto": _auto,
    "folder": _by_folder,
    "prefix": _by_prefix,
    "json": _by_json,
    "none": _none,
}
