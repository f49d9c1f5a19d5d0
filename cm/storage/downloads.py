"""Files that may have to be downloaded once: kept in a user cache folder, checked by SHA-256.

Where no hash is known beforehand, that of the first use is noted beside the file and holds from then on.
"""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from cm.errors import UserError
from cm.runtime import distributed, logger
from cm.storage import filesystem
from cm.storage.weights import file_sha256


class Unreachable(UserError):
    """A file that is neither here nor can be fetched."""


def check_sha256(path: str | Path, expected: str = "") -> str:
    """Hash of `path`; UserError when it does not begin with `expected`.

    Without `expected`, a name such as `weights-6726825d.pth` carries its own beginning (the convention of torch.hub),
    and a side file `NAME.sha256`, written after a download, carries the whole.
    """
    path = Path(path)
    side_file = _note(path)
    expected = expected or _hash_in_name(path.name)
    if not expected and side_file.exists():
        expected = side_file.read_text().strip()
    found = file_sha256(path)
    if not found.startswith(expected.lower()):
        raise UserError(
            f"{path}: SHA-256 is {found[:16]}..., expected {expected[:16]}...: damaged or another file; delete it"
        )
    return found


def check_pinned(path: Path) -> None:
    """UserError where a downloaded file differs from what it was at its first use, whose hash is noted beside it."""
    found = check_sha256(path)
    if not (_hash_in_name(path.name) or _note(path).exists()):
        _pin(path, found)


def _pin(path: Path, found: str) -> None:
    with suppress(OSError):  # a cache that others fill
        _note(path).write_text(found + "\n")
    logger.log(f"{path}: SHA-256 {found}, which later starts compare")


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _hash_in_name(name: str) -> str:
    found = re.search(r"-([0-9a-f]{8,64})\.(pt|pth|npz)$", name)
    return found[1] if found else ""


def local_copy(location: str, *, target: Path | None = None, sha256: str = "", flag: str) -> Path:
    """A local path for a file, an http(s) URL or a gs:// or az:// path; downloads once per node into the cache.

    `flag` is the option that named the file; error messages repeat it. Offline and absent: one line that says
    which file, from where, and where to put it.
    """
    if not re.match(r"https?://", location):
        if not filesystem.is_remote(location) and not os.path.exists(location):
            raise UserError(f"{flag}: no file or folder {location}")
        with distributed.node_first():
            return Path(filesystem.cache_locally(location))
    name = location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    url_id = hashlib.sha256(location.encode(errors="surrogatepass")).hexdigest()[:8]
    target = target or Path(filesystem.cache_folder(), "downloads") / url_id / name
    with distributed.node_first():
        if not target.exists():
            _download(location, target, sha256, flag)
    return target


def _download(url: str, target: Path, sha256: str, flag: str) -> None:
    """Fetch a file; UserError says what else can be done."""
    filesystem.make_cache_folder(target.parent)
    try:
        fetch(url, target, sha256)
    except (OSError, RuntimeError) as error:  # no connection, no space; another hash
        raise Unreachable(
            f"{flag}: {target.name} is not here and cannot be fetched from {url} ({error}); "
            f"download it elsewhere and save it as {target}, or give {flag} its path"
        ) from None


def fetch(url: str, target: Path, sha256: str = "") -> None:
    """Fetch a file whose hash begins with `sha256`, or as its name says; it has its name when it is whole.

    OSError or RuntimeError where that fails. What was fetched without a known hash is told, and held to it from now on.
    """
    expected = sha256.lower() or _hash_in_name(target.name) or None
    torch.hub.download_url_to_file(url, str(target), expected, progress=False)
    _pin(target, file_sha256(target))
