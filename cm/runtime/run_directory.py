"""The directory of a run: made when training starts, and taken away again when the start is refused."""

import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from cm.errors import UserError
from cm.runtime import distributed, liveness, logger
from cm.runtime.claims import Claim
from cm.runtime.files import whole_file
from cm.runtime.inputs import listed

# Characters of a path in a message
LONGEST_SHOWN = 300
# Larger files than this, which only logs of weeks are, are not put back after a refusal [bytes]
RESTORED = 64 << 20


class RunDirectory:
    """A run directory for the length of a with block, which all ranks enter; its path is the block's variable.

    One start at a time has it: a second is refused.
    A refusal or a signal before `started` removes what this start made: the directory, if it was not there before, and
    the folders above it. One that has got checkpoints meanwhile stays. Of one that was there, the names are what they
    were, and the files of a log's size say what they said.
    """

    def __init__(self, path: str):
        self.path = path
        self._claim = ExitStack()
        # On rank 0: folders that were not there, the innermost first; what lay in the directory if it was.
        self._made: list[Path] = []
        self._before: dict[Path, bytes | None] | None = None

    def __enter__(self) -> "RunDirectory":
        distributed.on_main(self._prepare)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, UserError | OSError | KeyboardInterrupt):  # a mistake, the machine, a signal
            self._remove()
        self._claim.close()

    def started(self) -> None:
        """Training begins: from here on the directory stays."""
        self._made, self._before = [], None

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
        if not missing:
            with suppress(OSError, UserError):  # what cannot be listed cannot be put back
                self._before = _contents(path)

    def _unwritable(self, error: OSError | ValueError) -> UserError:
        shown = self.path if len(self.path) <= LONGEST_SHOWN else f"{self.path[:LONGEST_SHOWN]}..."
        return UserError(f"{shown} cannot be written: {getattr(error, 'strerror', '') or error} (--out_dir)")

    def _remove(self) -> None:
        path = Path(self.path).absolute()
        if self._before is not None:
            logger.reset()  # its files lie in there
            _restore(path, self._before)
        if not self._made or any(Path(self._made[0], "checkpoints").glob("*")):
            return
        logger.reset()
        shutil.rmtree(self._made[0], ignore_errors=True)
        for folder in self._made[1:]:
            try:
                folder.rmdir()
            except OSError:  # something else lies in it now
                return


def _contents(folder: Path) -> dict[Path, bytes | None]:
    """What lies in a run directory: names, and the content of small files; of folders those in heartbeats."""
    found: dict[Path, bytes | None] = {}
    for path in [*listed(folder), *listed(liveness.folder(folder))]:
        found[path] = None
        with suppress(OSError):  # a file that this user may not read has its name
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= RESTORED:
                found[path] = path.read_bytes()
    return found


def _restore(folder: Path, before: dict[Path, bytes | None]) -> None:
    """Put back what `_contents` found; checkpoints that came from elsewhere stay."""
    with suppress(OSError, UserError):
        for path in set(_contents(folder)) - set(before):
            if not path.is_dir():
                path.unlink()
            elif path.name != "checkpoints" or not any(path.glob("*")):
                shutil.rmtree(path, ignore_errors=True)
        for path, content in before.items():
            if content is not None and (not path.is_file() or path.read_bytes() != content):
                path.write_bytes(content)
