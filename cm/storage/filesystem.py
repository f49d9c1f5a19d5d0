"""File access by path: local paths with the standard library, gs:// and az:// through blobfile.

A local path never goes through blobfile, and blobfile is imported at the first remote path only.

A storage that has never answered is given up within about 15 seconds, since its name or the network is wrong; one that
has answered is waited for through an outage of minutes.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import ModuleType
from typing import IO, Any, TypeVar

from cm.errors import UserError
from cm.runtime import platform
from cm.runtime.files import whole_file, writing
from cm.runtime.inputs import check_regular, open_regular, read_regular

T = TypeVar("T")

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_AZURE_HTTPS = re.compile(r"^https://[^/]+\.blob\.core\.windows\.net(/|$)")
# Options of blobfile. A try ends after connect_timeout or read_timeout seconds; between tries it waits up to a minute.
_QUICK = {"retry_limit": 2, "connect_timeout": 4, "read_timeout": 5}
_PATIENT = {"retry_limit": 20}
# Storages that have answered: gs://bucket, az://account
_answered: set[str] = set()


class Unreachable(UserError):
    """A storage does not answer, or refuses; the cause is chained."""


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
    """Open a file for reading, a regular one, or for writing in place (see `write_atomic` for what must stay whole)."""
    if is_remote(path):
        return _remote(path, lambda store: store.BlobFile(os.fspath(path), mode))
    return open_regular(path) if mode == "rb" else open(path, mode)


def read_file(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; UserError for a larger one."""
    if not is_remote(path):
        return read_regular(path, limit)
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{os.fspath(path)} has more than {limit:,} bytes")
    return content


def exists(path: str | os.PathLike) -> bool:
    """True when a file or folder is there."""
    if is_remote(path):
        return _remote(path, lambda store: store.exists(os.fspath(path)))
    return os.path.exists(path)


def isdir(path: str | os.PathLike) -> bool:
    """True when the path is a folder."""
    if is_remote(path):
        return _remote(path, lambda store: store.isdir(os.fspath(path)))
    return os.path.isdir(path)


def makedirs(path: str | os.PathLike) -> None:
    """Create a folder and its parents; an existing one is fine."""
    if is_remote(path):
        _remote(path, lambda store: store.makedirs(os.fspath(path)))
    else:
        os.makedirs(path, exist_ok=True)


def list_files(path: str | os.PathLike) -> list[str]:
    """Sorted names of what lies directly in a folder (files and folders, without trailing slashes)."""
    if not is_remote(path):
        return sorted(os.listdir(path))
    return sorted(
        name.rstrip("/") for name in _remote(path, lambda store: list(store.listdir(os.fspath(path))))
    )


def list_recursive(path: str | os.PathLike) -> list[str]:
    """All files below a folder: names relative to it, with '/', sorted folder by folder.

    Symbolic links to folders are followed, except those that lead back to one of their own parents. UserError for a
    folder that cannot be listed: its files would be missing without a word.
    """
    if is_remote(path):
        names = [
            _relative(file_root, os.fspath(path)) + name
            for file_root, _, files in _remote(path, lambda store: list(store.walk(os.fspath(path))))
            for name in files
        ]
    else:
        names = []
        for folder, subfolders, files in os.walk(path, onerror=_not_listed, followlinks=True):
            subfolders[:] = [name for name in subfolders if not _is_loop(folder, name)]
            relative = os.path.relpath(folder, path).replace(os.sep, "/")
            names += files if relative == "." else [f"{relative}/{name}" for name in files]
    return sorted(names, key=lambda name: name.split("/"))


def _not_listed(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def size(path: str | os.PathLike) -> int:
    """Length of a file in bytes."""
    if is_remote(path):
        return _remote(path, lambda store: store.stat(os.fspath(path))).size
    return os.stat(path).st_size


def cache_folder() -> str:
    """Where copies of remote files lie: $CM_CACHE_DIR, by default ~/.cache/consistency-models. It need not exist."""
    folder = os.path.expanduser(os.environ.get("CM_CACHE_DIR") or "~/.cache/consistency-models")
    if folder.startswith("~"):
        raise UserError("no home folder for downloads (HOME is not set): set CM_CACHE_DIR to a folder")
    return folder


def make_cache_folder(folder: str | os.PathLike) -> None:
    """Make a folder of the cache; UserError where nothing can be written to it."""
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write downloads to {os.fspath(folder)} ({error.strerror}): set CM_CACHE_DIR"
        ) from None


def cache_locally(path: str | os.PathLike) -> str:
    """A local path with the content of `path`: itself when local, else a copy made once.

    Random access (zip, npz, memory maps) needs this. Copies lie in the cache folder, under a name that changes when
    the remote file changes.
    """
    path = os.fspath(path)
    if not is_remote(path):
        check_regular(path)
        return path
    try:
        stat = _remote(path, lambda store: store.stat(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such remote file") from None
    version = f"{path}\n{stat.size}\n{stat.mtime}".encode(errors="surrogatepass")
    key = hashlib.sha256(version).hexdigest()[:16]
    target = os.path.join(cache_folder(), f"{key}-{path.partition('?')[0].rstrip('/').rsplit('/', 1)[-1]}")
    if not os.path.exists(target):
        with locked(target):
            if not os.path.exists(target):
                with reaching(path), open_file(path, "rb") as source:
                    write_atomic(target, lambda file: shutil.copyfileobj(source, file, 1 << 20))
    return target


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """A zip, local or cached, for reading.

    BadZipFile where a member is compressed by anything but deflate, as no zip of images or arrays is: of bzip2 and LZMA
    the first bytes cannot be had without unpacking what a few thousand more stand for, which may be gigabytes.
    """
    archive = zipfile.ZipFile(cache_locally(path))
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            archive.close()
            raise zipfile.BadZipFile(f"{member.filename} is compressed by another method than deflate")
    return archive


def open_npz(path: str | os.PathLike) -> Any:
    """numpy's view of an npz, local or cached, whose members `open_zip` has looked at; a plain array of an npy."""
    import numpy as np

    local = cache_locally(path)
    if zipfile.is_zipfile(local):
        open_zip(local).close()
    return np.load(local, allow_pickle=False)


@contextmanager
def locked(target: str | os.PathLike) -> Iterator[None]:
    """Run the body while no other process on this machine does so for the same target.

    The ranks of a node come to the cache together: one of them fetches. The target's folder is made.
    """
    make_cache_folder(os.path.dirname(target) or ".")
    with open(f"{os.fspath(target)}.lock", "w") as file:
        with suppress(OSError):  # some network file systems have no locks: then each process works for itself
            platform.lock(file)
        yield


def write_atomic(path: str | os.PathLike, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write a whole file or nothing: bytes, or a function that writes to the binary file it is given.

    Locally as `cm.runtime.files.whole_file`; remotely one upload that is dropped when the writer raises. A failure of
    a local disk is a UserError with the path and the cause, chained to its OSError.
    """
    writer = content if callable(content) else lambda file: file.write(content)
    path = os.fspath(path)
    if is_remote(path):
        options = {"streaming": False, "partial_writes_on_exc": False}
        with _remote(path, lambda store: store.BlobFile(path, "wb", **options)) as file:
            writer(file)
        return
    with writing(path), whole_file(path) as file:
        writer(file)


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


def be_patient(path: str | os.PathLike) -> None:
    """From now on, wait for the storage of this path through an outage, also when it has not answered yet."""
    _answered.add(_storage_of(path))


@contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """A failure of the path's storage in the body becomes Unreachable, in one line.

    Of a local path that is any OSError, of a remote one whatever blobfile, urllib3 or an authentication raises; that a
    file is missing is an answer, no failure.
    """
    try:
        yield
    except (UserError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or is_remote(path)):
            raise
        if isinstance(error, KeyError) and error.args == ("HOME",):
            raise UserError(
                f"{os.fspath(path)}: its library looks for keys in the home folder; set HOME"
            ) from None
        lines = str(error).strip().splitlines() or [""]
        cause = (
            lines[0].removeprefix("message=").partition(", request=<")[0]
        )  # blobfile adds the whole request
        raise Unreachable(
            f"{os.fspath(path)} cannot be reached: {type(error).__name__}: {cause[:200]}"
        ) from error


def _remote(path: str | os.PathLike, call: Callable[[Any], T]) -> T:
    """The result of a call of blobfile's functions; Unreachable when the storage does not answer."""
    storage = _storage_of(path)
    with reaching(path):
        result = call(_context(_blobfile(), storage in _answered))
    _answered.add(storage)
    return result


def _storage_of(path: str | os.PathLike) -> str:
    """gs://bucket of gs://bucket/folder/file."""
    return "/".join(os.fspath(path).split("/")[:3])


@lru_cache
def _context(blobfile: ModuleType, patient: bool) -> Any:
    """blobfile's functions with many or few retries; only the former say that they try again."""
    if patient:
        return blobfile.create_context(**_PATIENT, log_callback=_report)
    return blobfile.create_context(**_QUICK, log_callback=lambda message: None)


def _report(message: str) -> None:
    sys.stderr.write(f"remote storage: {message.splitlines()[0][:200]}\n")


def _blobfile() -> ModuleType:
    try:
        import blobfile
    except ImportError as error:
        raise UserError(f"remote paths need the package blobfile: {error}") from error
    return blobfile
