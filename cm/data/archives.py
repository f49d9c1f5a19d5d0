"""What scripts/prepare_data.py can read: every source of `cm.data.sources`, and tars, lmdb, CIFAR-10, digits."""

import colorsys
import os
import random
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from cm.data import cifar
from cm.data import labels as label_modes
from cm.data.cifar import open_stream
from cm.data.dataset import sampled_channels
from cm.data.decode import EXTENSIONS, readable
from cm.data.labels import Labels
from cm.data.sources import Source, check_member, is_hidden, is_name, open_source, stored_labels
from cm.errors import UserError, extra, masked
from cm.runtime.inputs import open_regular
from cm.seeding import derive_seed
from cm.storage import filesystem

Pixels = bytes | np.ndarray | UserError  # an image file, a uint8 (H, W, C) array, or why it cannot be read

# --split of the built-in digits -> its images
DIGITS_SPLITS = {
    "all": slice(None),
    "train": slice(1500),
    "test": slice(1500, None),
}


@dataclass(frozen=True)
class Items:
    """Images to prepare.

    images: (name, content) in order. total: their number, 0 when it is not known. channels: 1 or 3.
    labels: from the numbers (in order of appearance) and names of the images that were kept, to their labels.
    passed_over: how many images had hidden or system names, once all have been read.
    """

    description: str
    images: Iterable[tuple[str, Pixels]]
    total: int
    channels: int
    labels: Callable[[Sequence[int], Sequence[str]], Labels]
    passed_over: Callable[[], int] = lambda: 0


def open_items(
    path: str, *, labels: str = "auto", limit: int = 0, seed: int = 0, split: str = "all"
) -> Items:
    """Everything to prepare from a path, or from the built-in sets `digits` and `digits_rgb`.

    labels: mode of `cm.data.labels.resolve`. limit: this many images only (0: all), evenly spaced where the source
    allows, else the first ones. seed: of the tints of digits_rgb. split: of the digits, in `DIGITS_SPLITS`.
    """
    if path in ("digits", "digits_rgb"):
        return _digits(path == "digits_rgb", labels, limit, seed, split)
    if split != "all":
        raise UserError(f"--split {split} is for digits and digits_rgb only, not for {path or 'SOURCE'}")
    if path and is_name(path):
        return _source(open_source(path), labels, limit)
    if not path or not filesystem.exists(path):
        raise UserError(f"{path or 'SOURCE'}: no such folder or file, and not digits or digits_rgb")
    if not filesystem.isdir(path) and path.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return _cifar(path, labels, limit) if is_cifar(path) else _tar(path, labels, limit)
    if filesystem.isdir(path) and filesystem.exists(f"{path.rstrip('/')}/data.mdb"):
        return _lmdb(path, labels, limit)
    return _source(open_source(path), labels, limit)


def _source(source: Source, labels: str, limit: int) -> Items:
    table = source.labels(labels)
    count = min(limit, len(source)) if limit else len(source)
    positions = [i * len(source) // count for i in range(count)]

    def images() -> Iterator[tuple[str, Pixels]]:
        for position in positions:
            try:
                yield source.name(position), source.read(position)
            except UserError as error:
                yield source.name(position), error

    def kept_labels(numbers: Sequence[int], _names: Sequence[str]) -> Labels:
        return _subset(table, [positions[number] for number in numbers])

    channels = sampled_channels(source, skip_unreadable=True)
    description = f"{type(source).__name__} {_basename(masked(source.path))}"
    return Items(description, images(), count, channels, kept_labels, lambda: source.passed_over)


def _tar(path: str, labels: str, limit: int) -> Items:
    """A tar of images, or of tars that hold one class each (ILSVRC2012_img_train.tar: named by WordNet id)."""
    hidden: list[str] = []

    def images() -> Iterator[tuple[str, Pixels]]:
        with readable(path), filesystem.open_file(path, "rb") as file, open_stream(file) as archive:
            yield from _tar_members(archive, "", hidden)

    def kept_labels(_numbers: Sequence[int], names: Sequence[str]) -> Labels:
        return label_modes.resolve(names, labels, None, path)

    return Items(
        f"tar {_basename(path)}", _first(images(), limit), limit, 3, kept_labels, lambda: len(hidden)
    )


def _tar_members(archive: tarfile.TarFile, folder: str, hidden: list[str]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        name = member.name.removeprefix("./")
        suffix = PurePosixPath(name).suffix[1:].lower()
        if not member.isfile() or suffix not in (*EXTENSIONS, "tar"):
            continue
        if is_hidden(name):
            hidden.append(name)
        elif suffix == "tar" and not folder:
            check_member(name, 0)
            with tarfile.open(fileobj=archive.extractfile(member), mode="r|*") as inner:
                yield from _tar_members(inner, f"{PurePosixPath(name).stem}/", hidden)
        elif suffix in EXTENSIONS:
            check_member(name, member.size)
            yield folder + name, archive.extractfile(member).read()


def _lmdb(path: str, labels: str, limit: int) -> Items:
    """LSUN: a database of key -> encoded image, one category and so unlabelled."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{path}: reading lmdb needs the package lmdb: {extra('lsun')} ({error})") from error
    if labels not in ("auto", "none"):
        raise UserError(f"{path}: --labels {labels}, but an LSUN database has no labels")
    if filesystem.is_remote(path):
        raise UserError(f"{path}: copy an lmdb to a local disk first")
    with readable(path):
        _check_lmdb(f"{path.rstrip('/')}/data.mdb")
        database = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
        total = database.stat()["entries"]

    def images() -> Iterator[tuple[str, Pixels]]:
        with readable(path), database, database.begin() as transaction:
            for key, value in transaction.cursor():
                yield f"{path}: entry {key.decode('ascii', 'replace')!r}", bytes(value)

    count = min(limit, total) if limit else total
    return Items(
        f"lmdb {_basename(path)}", _first(images(), limit), count, 3, lambda *_: label_modes.UNLABELLED
    )


def _check_lmdb(path: str) -> None:
    """UserError for a database that was cut off: reading its map behind the file's end would kill this process.

    Page 0 begins with a header of 16 bytes; at 24 behind it stands the size of a page, at 120 the number of the last
    one and of the transaction that wrote them. Page 1 has the same of another transaction; the later one counts.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(152)
        magic, page = struct.unpack_from("<I20xI", first.ljust(152, b"\0"), 16)
        if magic != 0xBEEFC0DE:
            return  # the library says what it is
        file.seek(page)
        metas = [struct.unpack_from("<QQ", m.ljust(152, b"\0"), 136) for m in (first, file.read(152))]
    last, _ = max(metas, key=lambda meta: meta[1])
    if size < (last + 1) * page:
        raise UserError(f"data.mdb has {size:,} of {(last + 1) * page:,} bytes: it was cut off")


def is_cifar(path: str) -> bool:
    """Whether a tar's first entry lies in a folder of CIFAR's."""
    with (
        readable(path),
        filesystem.open_file(path, "rb") as file,
        open_stream(file, whole=False) as archive,
    ):
        first = archive.next()
        return first is not None and first.name.removeprefix("./").partition("/")[0] in cifar.FOLDERS


def _cifar(path: str, labels: str, limit: int) -> Items:
    with readable(path), filesystem.open_file(path, "rb") as file:
        images, numbers, classes = cifar.read_training_set(file)
    table = Labels(numbers, classes, "CIFAR-10")
    return _arrays(f"CIFAR-10 {_basename(path)}", path, images, table, labels, limit)


def _digits(in_colour: bool, labels: str, limit: int, seed: int, split: str) -> Items:
    """scikit-learn's 1797 handwritten digits: 8x8, grey 0..16 as 0..255, bright ink on black.

    In colour, image i of all 1797 is written in ink of a hue and saturation drawn from (seed, i).
    """
    if split not in DIGITS_SPLITS:
        raise UserError(f"--split {split}: choose one of {', '.join(DIGITS_SPLITS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"digits needs the package scikit-learn: {extra('quickstart')} ({error})") from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    if in_colour:
        tints = np.array([_tint(seed, index) for index in range(len(images))])
        images = np.round(images * tints[:, None, None, :]).astype(np.uint8)
    table = Labels(bunch.target.astype(np.int64), tuple("0123456789"), "digits")
    numbers = range(len(images))[DIGITS_SPLITS[split]]
    name = ("digits_rgb" if in_colour else "digits") + ("" if split == "all" else f" ({split})")
    return _arrays(f"scikit-learn {name}", name, images[numbers], _subset(table, numbers), labels, limit)


def _tint(seed: int, index: int) -> tuple[float, float, float]:
    """RGB factors of one ink: any hue, well saturated, full brightness."""
    draw = random.Random(derive_seed(seed, "tint", index))
    return colorsys.hsv_to_rgb(draw.random(), 0.6 + 0.4 * draw.random(), 1.0)


def _arrays(
    description: str, where: str, images: np.ndarray, table: Labels, labels: str, limit: int
) -> Items:
    table = stored_labels(table, labels, where)
    count = min(limit, len(images)) if limit else len(images)
    named = ((f"{where}: image {i}", images[i]) for i in range(count))
    return Items(description, named, count, images.shape[3], lambda numbers, _names: _subset(table, numbers))


def _subset(table: Labels, numbers: Sequence[int]) -> Labels:
    indices = None if table.indices is None else table.indices[np.asarray(numbers, dtype=np.int64)]
    return Labels(indices, table.classes, table.origin)


def _first(images: Iterator[tuple[str, Pixels]], limit: int) -> Iterator[tuple[str, Pixels]]:
    for number, item in enumerate(images, start=1):
        yield item
        if number == limit:
            return


def _basename(path: str) -> str:
    return os.path.basename(path.rstrip("/"))
