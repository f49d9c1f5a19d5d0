"""Files that come from outside: regular ones of bounded size, JSON of the right types. Standard library only."""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from cm.errors import UserError
from cm.runtime.platform import READ

JSON_LIMIT = 256 << 20  # bytes; a dataset.json of ten million labels has about as many
LINES_LIMIT = 4 << 30  # bytes; a log of ten million rows has about as many
DIGITS = 40  # of a whole number in JSON; those of Python have no end, and become no float
NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
}
_UNUSABLE = re.compile(r"\\u([dD][89a-fA-F]|0000)")  # halves of a character, and what no path may have

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
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, READ))  # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ENXIO:  # what a socket answers
            raise UserError(f"{os.fspath(path)} is {KINDS[stat.S_IFSOCK]}, not a file") from None
        raise
    try:
        status = os.fstat(file.fileno())
        if kind := KINDS.get(stat.S_IFMT(status.st_mode)):
            raise UserError(f"{os.fspath(path)} is {kind}, not a file")
        if limit is not None and status.st_size > limit:
            raise UserError(f"{os.fspath(path)} has {status.st_size:,} bytes; at most {limit:,} are read")
        return file
    except BaseException:  # a signal, too; the file is its descriptor's only owner
        file.close()
        raise


def listed(folder: str | os.PathLike, pattern: str = "*") -> list[Path]:
    """What lies in a folder under names of a shell's pattern, sorted; nothing where there is no folder.

    UserError for a folder that cannot be listed, of which Path.glob says that it is empty.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ValueError):  # ValueError: a null byte
        return []
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not os.path.lexists(folder):
            return []
        raise UserError(f"{os.fspath(folder)}: cannot be listed ({error.strerror})") from error
    return sorted(Path(folder, name) for name in names if fnmatchcase(name, pattern))


def check_regular(path: str | os.PathLike) -> None:
    """UserError for a pipe, a socket or a device, where a library will open the path; nothing where it is missing."""
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind:
        raise UserError(f"{os.fspath(path)} is {kind}, not a file")


def read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; OSError as open() raises it, UserError for its bytes."""
    with open_regular(path, limit) as file:
        try:
            return file.read(limit)
        except OSError as error:  # a disk or a mount that fails
            raise UserError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from None


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = dict, limit: int = JSON_LIMIT) -> Any:
    """The content of a local JSON file; UserError in one line unless it is a `kind`. OSError as open() raises it."""
    return parse_json(read_regular(path, limit), os.fspath(path), kind)


def json_or_none(
    path: str | os.PathLike, kind: type | tuple[type, ...] = dict, limit: int = JSON_LIMIT
) -> Any:
    """As `read_json`; None where there is no such file, or it holds no such JSON."""
    try:
        return read_json(path, kind, limit)
    except (OSError, ValueError, UserError):
        return None


def read_json_lines(path: str | os.PathLike, limit: int = LINES_LIMIT) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line. Any other line is passed over: a crash may have torn it.

    OSError as open() raises it; UserError for what is no file, or has more than `limit` bytes.
    """
    for line in read_regular(path, limit).decode(errors="replace").splitlines():
        try:
            yield parse_json(line, os.fspath(path))
        except UserError:
            continue


def parse_json(text: bytes | str, source: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The content of a JSON text; UserError that begins with the source unless it is a `kind`."""
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        content = json.loads(text, parse_int=_whole_number)
        if _UNUSABLE.search(text):
            content = _printable(content)
    except (ValueError, RecursionError) as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{source}: not valid JSON ({first})") from None
    if not isinstance(content, kind):
        wanted = " or ".join(NAMES[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{source}: must hold {wanted} in JSON, not a {type(content).__name__}")
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _printable(value: Any) -> Any:
    """The content with lone halves of characters and zero bytes escaped."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode().replace("\0", "\\0")
    if isinstance(value, dict):
        return {_printable(name): _printable(inner) for name, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list) else value


def misfit(value: Any, schema: Any, where: str = "") -> str:
    """Where a JSON value differs from a schema, in words; empty when it fits.

    schema: a type, of which a float is any finite number and object anything; (schema, None) where null will do, too;
    [schema] for a list; {name: schema} for an object, in which names may be missing and others may stand.
    """
    if isinstance(schema, tuple):
        return "" if value is None else misfit(value, schema[0], where)
    kind = schema if isinstance(schema, type) else type(schema)
    numeric = kind is float and type(value) in (int, float) and math.isfinite(value)
    if not (
        numeric or (kind is not float and isinstance(value, kind) and (kind is not int or type(value) is int))
    ):
        return f"{where or 'it'} is {_shown(value)}, not {NAMES[kind]}"
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(schema, list):
        inner = [(f"{where}[{i}]", each, schema[0]) for i, each in enumerate(value)]
    elif isinstance(schema, dict):
        dot = f"{where}." if where else ""
        inner = [(f"{dot}{name}", value[name], schema[name]) for name in schema if name in value]
    return next((problem for at, each, rule in inner if (problem := misfit(each, rule, at))), "")


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)[:40]
