"""File access by path: local paths with the standard library, gs:// and az:// through blobfile.

A local path never goes through blobfile, and blobfile is imported at the first remote path only.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cm.errors import UserError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_AZURE_HTTPS = re.compile(r"^https://[^/]+\.blob\.core\.windows\.net(/|$)")


def is_remote(path: str | os.PathLike) -> bool:
    """True for gs://, az:// and https://*.blob.core.windows.net; UserError for any other scheme."""
    path = os.fspath(path)
    if not _SCHEME.match(path):
        return False
    if path.startswith(("gs://", "az://")) or _AZURE_HTTPS.match(path):
        return True
    raise UserError(
        f"{path}: only local paths, gs://, az:// and https://*.blob.core.windows.net can be opened"
    )


def open_file(path: str | os.PathLike, mode: str = "rb") -> IO[Any]:
    """Open a file for reading or for writing in place (see `write_atomic` for files that must stay whole)."""
    if is_remote(path):
        return _blobfile().BlobFile(os.fspath(path), mode)
    return open(path, mode)


def exists(path: str | os.PathLike) -> bool:
    """True when a file or folder is there."""
    return _blobfile().exists(os.fspath(path)) if is_remote(path) else os.path.exists(path)


def isdir(path: str | os.PathLike) -> bool:
    """True when the path is a folder."""
    return _blobfile().isdir(os.fspath(path)) if is_remote(path) else os.path.isdir(path)


def makedirs(path: str | os.PathLike) -> None:
    """Create a folder and its parents; an existing one is fine."""
    if is_remote(path):
        _blobfile().makedirs(os.fspath(path))
    else:
        os.makedirs(path, exist_ok=True)


def list_files(path: str | os.PathLike) -> list[str]:
    """Sorted names of what lies directly in a folder (files and folders, without trailing slashes)."""
    names = _blobfile().listdir(os.fspath(path)) if is_remote(path) else os.listdir(path)
    return sorted(name.rstrip("/") for name in names)


def list_recursive(path: str | os.PathLike) -> list[str]:
    """All files below a folder: names relative to it, with '/', sorted folder by folder.

    Symbolic links to folders are followed, except those that lead back to one of their own parents.
    """
    if is_remote(path):
        names = [
            _relative(file_root, os.fspath(path)) + name
            for file_root, _, files in _blobfile().walk(os.fspath(path))
            for name in files
        ]
    else:
        names = []
        for folder, subfolders, files in os.walk(path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not _is_loop(folder, name)]
            relative = os.path.relpath(folder, path).replace(os.sep, "/")
            names += files if relative == "." else [f"{relative}/{name}" for name in files]
    return sorted(names, key=lambda name: name.split("/"))


def size(path: str | os.PathLike) -> int:
    """Length of a file in bytes."""
    return _blobfile().stat(os.fspath(path)).size if is_remote(path) else os.stat(path).st_size


def cache_locally(path: str | os.PathLike) -> str:
    """A local path with the content of `path`: itself when local, else a copy made once.

    Random access (zip, npz, memory maps) needs this. Copies lie in $CM_CACHE_DIR, by default
    ~/.cache/consistency-models, under a name that changes when the remote file changes.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return path
    try:
        stat = _blobfile().stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such remote file") from None
    key = hashlib.sha256(f"{path}\n{stat.size}\n{stat.mtime}".encode()).hexdigest()[:16]
    folder = os.environ.get("CM_CACHE_DIR") or os.path.join(Path.home(), ".cache", "consistency-models")
    target = os.path.join(folder, f"{key}-{path.rstrip('/').rsplit('/', 1)[-1]}")
    if not os.path.exists(target):
        os.makedirs(folder, exist_ok=True)
        with _locked(f"{target}.lock"):  # the ranks of a node come here together: one of them fetches
            if not os.path.exists(target):
                with open_file(path, "rb") as source:
                    write_atomic(target, lambda file: shutil.copyfileobj(source, file, 1 << 20))
    return target


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Run the body while no other process on this machine holds the lock of this file."""
    with open(path, "w") as file:
        with suppress(OSError):  # some network file systems have no locks: then each process works for itself
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomic(path: str | os.PathLike, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write a whole file or nothing: bytes, or a function that writes to the binary file it is given.

    Locally: a temporary name in the same folder, fsync, rename. Remotely: one upload that is dropped when the
    writer raises. A failure of the storage is a UserError with the path and the cause, chained to its OSError.
    """
    writer = content if callable(content) else lambda file: file.write(content)
    path = os.fspath(path)
    if is_remote(path):
        with _blobfile().BlobFile(path, "wb", streaming=False, partial_writes_on_exc=False) as file:
            writer(file)
        return
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _fsync_folder(folder: str) -> None:
    """Make a rename durable; some network file systems refuse to open a folder, which is no failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _is_loop(parent: str, name: str) -> bool:
    """True when parent/name is a link to parent or to a folder above it."""
    link = os.path.join(parent, name)
    if not os.path.islink(link):
        return False
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(parent)]) == target


def _relative(folder: str, root: str) -> str:
    """'' for the root itself, else the path below it with a trailing slash."""
    below = folder.rstrip("/")[len(root.rstrip("/")) :].strip("/")
    return f"{below}/" if below else ""


def _blobfile():
    try:
        import blobfile
    except ImportError as error:
        raise UserError(f"remote paths need the package blobfile: {error}") from error
    return blobfile
