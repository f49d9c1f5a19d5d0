"""Pickles of other programs, read without running code: every name in them stands for a known object or is refused.

A pickle of few bytes can also ask for gigabytes, by a memo with a huge index or by calling a constructor many times on
one large argument. So its operations are looked through before they run, and what calls make has to be paid for.
"""

import os
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from cm.errors import UserError


class Refused(UserError):
    """A pickle asks for something that is not known, or for more room than it may have."""


MAX_OPERATIONS = 2_000_000  # a pickle of EDM's largest network with its optimizer has about 200,000
MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names of a pickle by a table {(module, name): what stands for it}; Refused for any other.

    source: how messages begin; room: bytes that calls may make in all, by default three times those of the file;
    options: those of pickle.Unpickler. The file must be seekable. Bytes, which old protocols write as a call of
    _codecs.encode, are always known.
    """

    def __init__(
        self,
        file: BinaryIO,
        stand_ins: Mapping[tuple[str, str], Any],
        source: str = "",
        room: int = 0,
        **options: Any,
    ):
        check_operations(file, source)
        super().__init__(file, **options)
        self.stand_ins, self.source = {("_codecs", "encode"): self._bytes, **stand_ins}, source
        self.room = room or 3 * _length(file) + (1 << 20)

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`; nothing is imported."""
        if (module, name) not in self.stand_ins:
            raise Refused(f"{self.source}refused: its pickle asks for {f'{module}.{name}'[:80]}")
        return self.stand_ins[module, name]

    def spend(self, size: int) -> None:
        """Take the room for a result of `size` bytes; Refused when the pickle has used up its own."""
        self.room -= size
        if self.room < 0:
            raise Refused(f"{self.source}refused: its pickle makes far more than it holds")

    def _bytes(self, text: str, encoding: str | bytes = "latin1") -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise Refused(f"{self.source}refused: unexpected text encoding in it")
        self.spend(len(text))
        return text.encode("latin1")


def check_operations(file: BinaryIO, source: str = "") -> None:
    """Look through the pickle at the file's position, which is kept.

    Refused for more operations than any file of weights or images has, and for a memo whose index was not counted up
    to: the unpickler makes room for all indices below it.
    """
    start = file.tell()
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name in MEMO and argument > number:
            raise Refused(f"{source}refused: its pickle has a memo of {argument} entries")
        if number >= MAX_OPERATIONS:
            raise Refused(f"{source}refused: its pickle has more than {MAX_OPERATIONS:,} operations")
    file.seek(start)


def _length(file: BinaryIO) -> int:
    position = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(position)
    return length


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever damaged bytes lead the body to raise becomes a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{what} ({type(error).__name__}: {first})") from None
