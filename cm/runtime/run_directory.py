"""The directory of a run: made when training starts, and taken away again when the start is refused."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cm.errors import UserError
from cm.runtime import distributed, logger
from cm.runtime.claims import Claim
from cm.runtime.files import whole_file

# Characters of a path in a message
LONGEST_SHOWN = 300


class RunDirectory:
    """A run directory for the length of a with block, which all ranks enter; its path is the block's variable.

    One start at a time has it: a second is refused.
    A UserError before `started` removes what this start made: the directory, if it was not there before, and the
    folders above it. One that has got checkpoints meanwhile stays.
    """

    def __init__(self, path: str):
        self.path = path
        self._claim = ExitStack()
        self._made: list[Path] = []  # folders that were not there, the innermost first; on rank 0

    def __enter__(self) -> "RunDirectory":
        distributed.on_main(self._prepare)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, UserError):
            self._remove()
        self._claim.close()

    def started(self) -> None:
        """Training begins: from here on the directory stays."""
        self._made = []

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run, on rank 0."""
        if distributed.is_main():
            try:
                with whole_file(Path(self.path, name)) as file:
                    file.write(text.encode())
            except OSError as error:
                raise self._unwritable(error) from None

    def _prepare(self) -> None:
        """Make the directory; UserError when it cannot be written."""
        path = Path(self.path).absolute()
        try:
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            os.makedirs(path, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            raise self._unwritable(error) from None
        self._claim.enter_context(Claim(path, folder=path))
        self._made = missing

    def _unwritable(self, error: OSError | ValueError) -> UserError:
        shown = self.path if len(self.path) <= LONGEST_SHOWN else f"{self.path[:LONGEST_SHOWN]}..."
        return UserError(f"{shown} cannot be written: {getattr(error, 'strerror', '') or error} (--out_dir)")

    def _remove(self) -> None:
        if not self._made or any(Path(self._made[0], "checkpoints").glob("*")):
            return
        logger.reset()  # its files lie in there
        shutil.rmtree(self._made[0], ignore_errors=True)
        for folder in self._made[1:]:
            try:
                folder.rmdir()
            except OSError:  # something else lies in it now
                return
