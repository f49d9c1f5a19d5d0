"""Files that come from outside: regular ones of bounded size, JSON of the right types. Standard library only."""

import json
import os
import stat
from typing import Any, BinaryIO

from cm.errors import UserError
from cm.runtime.platform import READ

JSON_LIMIT = 256 << 20  # bytes; a dataset.json of ten million labels has about as many

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike, limit: int | None = None) -> BinaryIO:
    """Open a local file for reading, if it is a regular one of at most `limit` bytes; else UserError.

    A pipe would wait for ever and a device has no end. OSError as open() raises it.
    """
    descriptor = os.open(path, READ)
    try:
        status = os.fstat(descriptor)
        if kind := KINDS.get(stat.S_IFMT(status.st_mode)):
            raise UserError(f"{os.fspath(path)} is {kind}, not a file")
        if limit is not None and status.st_size > limit:
            raise UserError(f"{os.fspath(path)} has {status.st_size:,} bytes; at most {limit:,} are read")
        return os.fdopen(descriptor, "rb")  # raises IsADirectoryError for a folder
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike) -> None:
    """UserError for a pipe, a socket or a device, where a library will open the path; nothing where it is missing."""
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind:
        raise UserError(f"{os.fspath(path)} is {kind}, not a file")


def read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open_regular(path, limit) as file:
        return file.read(limit)


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = dict) -> Any:
    """The content of a local JSON file; UserError in one line unless it is a `kind`. OSError as open() raises it."""
    return parse_json(read_regular(path, JSON_LIMIT), os.fspath(path), kind)


def parse_json(text: bytes | str, source: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The content of a JSON text; UserError that begins with the source unless it is a `kind`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{source}: not valid JSON ({first})") from None
    if not isinstance(content, kind):
        names = {dict: "object", list: "list", str: "text"}
        wanted = " or ".join(names[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{source}: must hold one JSON {wanted}, not a {type(content).__name__}")
    return content
