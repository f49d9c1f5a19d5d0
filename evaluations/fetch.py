"""Files that may have to be downloaded once: kept in a user cache folder, checked by SHA-256."""

import hashlib
import os
import re
import urllib.request
from pathlib import Path

from cm import dist_util
from cm.errors import UserError

_TIMEOUT_S = 30
_CHUNK = 1 << 20


def cache_dir() -> Path:
    """`CM_CACHE_DIR`, else `consistency_models` in the user's cache folder (`XDG_CACHE_HOME` or ~/.cache)."""
    if os.environ.get("CM_CACHE_DIR"):
        return Path(os.environ["CM_CACHE_DIR"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "consistency_models"


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: str | Path, expected: str = "") -> str:
    """Hash of `path`; UserError when it does not begin with `expected`.

    Without `expected`, a name such as `weights-6726825d.pth` carries its own beginning (the convention of torch.hub),
    and a side file `NAME.sha256`, written after a download, carries the whole.
    """
    path = Path(path)
    side_file = path.with_name(path.name + ".sha256")
    named = re.search(r"-([0-9a-f]{8,64})\.(pt|pth|pkl|npz)$", path.name)
    expected = expected or (named[1] if named else "")
    if not expected and side_file.exists():
        expected = side_file.read_text().strip()
    found = sha256_file(path)
    if not found.startswith(expected.lower()):
        raise UserError(
            f"{path}: SHA-256 is {found[:16]}..., expected {expected[:16]}...; delete it and try again"
        )
    return found


def local_copy(location: str, *, target: Path | None = None, sha256: str = "", flag: str) -> Path:
    """A local path for a file or http(s) URL; downloads once per node into the cache.

    `flag` is the option that named the file; error messages repeat it. Offline and absent: one line that says
    which file, from where, and where to put it.
    """
    if not re.match(r"https?://", location):
        if not Path(location).is_file():
            raise UserError(f"{flag}: no file {location}")
        return Path(location)
    name = location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    url_id = hashlib.sha256(location.encode()).hexdigest()[:8]
    target = target or cache_dir() / "downloads" / url_id / name
    with dist_util.node_first():
        if not target.exists():
            _download(location, target, sha256, flag)
    return target


def _download(url: str, target: Path, sha256: str, flag: str) -> None:
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as source, open(part, "wb") as sink:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
        os.replace(part, target)
    except OSError as error:  # URLError and time-outs are OSErrors
        part.unlink(missing_ok=True)
        reason = str(error).replace("\n", " ")
        raise UserError(
            f"{flag}: {target.name} is not here and {url} cannot be reached ({reason}); "
            f"download it elsewhere and save it as {target}, or give {flag} its path"
        ) from None
    try:
        found = check_sha256(target, sha256)
    except UserError:
        target.unlink()
        raise
    target.with_name(target.name + ".sha256").write_text(found + "\n")
