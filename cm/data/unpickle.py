"""Pickles of other programs, read without running code: every name in them stands for a known object or is refused."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from cm.errors import UserError


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names of a pickle by a table {(module, name): what stands for it}; UserError for any other name.

    source: how messages begin; options: those of pickle.Unpickler.
    """

    def __init__(
        self, file: BinaryIO, stand_ins: Mapping[tuple[str, str], Any], source: str = "", **options: Any
    ):
        super().__init__(file, **options)
        self.stand_ins, self.source = stand_ins, source

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`; nothing is imported."""
        if (module, name) not in self.stand_ins:
            raise UserError(f"{self.source}refused: its pickle asks for {module}.{name}")
        return self.stand_ins[module, name]


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
