"""Files that may have to be downloaded once: kept in a user cache folder, checked by SHA-256."""

import hashlib
import os
import re
import shutil
import urllib.request
from pathlib import Path

from cm.errors import UserError
from cm.runtime import distributed
from cm.storage import filesystem
from cm.storage.weights import file_sha256

_TIMEOUT_S = 30


def cache_dir() -> Path:
    """`CM_CACHE_DIR`, else ~/.cache/consistency-models."""
    if os.environ.get("CM_CACHE_DIR"):
        return Path(os.environ["CM_CACHE_DIR"]).expanduser()
    return Path.home() / ".cache" / "consistency-models"


def check_sha256(path: str | Path, expected: str = "", *, name: str = "") -> str:
    """Hash of `path`; UserError when it does not begin with `expected`.

    Without `expected`, a name such as `weights-6726825d.pth` carries its own beginning (the convention of torch.hub),
    and a side file `NAME.sha256`, written after a download, carries the whole.
    """
    path = Path(path)
    side_file = path.with_name(path.name + ".sha256")
    named = re.search(r"-([0-9a-f]{8,64})\.(pt|pth|npz)$", name or path.name)
    expected = expected or (named[1] if named else "")
    if not expected and side_file.exists():
        expected = side_file.read_text().strip()
    found = file_sha256(path)
    if not found.startswith(expected.lower()):
        raise UserError(
            f"{path}: SHA-256 is {found[:16]}..., expected {expected[:16]}...: damaged or another file; delete it"
        )
    return found


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
    url_id = hashlib.sha256(location.encode()).hexdigest()[:8]
    target = target or cache_dir() / "downloads" / url_id / name
    with distributed.node_first():
        if not target.exists():
            _download(location, target, sha256, flag)
    return target


def _download(url: str, target: Path, sha256: str, flag: str) -> None:
    """Fetch to a temporary name, check the hash, then rename: a file at `target` is whole."""
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as source, open(part, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        found = check_sha256(part, sha256, name=target.name)
        os.replace(part, target)
        target.with_name(target.name + ".sha256").write_text(found + "\n")
    except OSError as error:  # URLError and time-outs are OSErrors
        raise UserError(
            f"{flag}: {target.name} is not here and {url} cannot be reached ({error}); "
            f"download it elsewhere and save it as {target}, or give {flag} its path"
        ) from None
    finally:
        part.unlink(missing_ok=True)
