"""Atomic file writes: a file is there with all of its content, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cm.errors import UserError
from cm.runtime.inputs import check_regular

# What file systems answer that cannot open or flush a folder (network mounts, folders without the right to list them).
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file, open for writing and reading, that has its name only when the block has ended without an error.

    Until then it has a temporary name in the same folder; content and rename are flushed to disk. After an error the
    file that was there before is unchanged, and nothing else is left. OSError where the storage fails; UserError for
    a pipe or a device, which the rename would replace: /dev/null for everyone.
    """
    check_regular(path)
    path = Path(path)
    temporary = draft_of(path)
    try:
        with open(temporary, "wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # where the storage fails, its first error counts
            temporary.unlink()
    sync_folder(path.parent)


@contextmanager
def draft_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside a path, for the length of a with block: where libraries write what then moves to the path."""
    path = Path(path).absolute()
    folder = draft_of(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def draft_of(path: Path) -> Path:
    """The temporary name of a file or folder that this process is writing; `claimed_place` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """An OSError of the body becomes a UserError that names the path and the cause, chained to it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's entries to disk, so that renames in it survive a crash; nothing where the storage cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
