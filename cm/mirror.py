"""A second copy of a run in another place, local or remote (gs://, az://): it survives the machine.

Checkpoints are copied when they are complete, the manifest last, so that the copy has complete checkpoints only. Old
ones are not deleted there.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cm import blob
from cm.checkpoint import MANIFEST, complete_checkpoints, verify_checkpoint
from cm.errors import UserError

T = TypeVar("T")
LOGS = ("config.json", "progress.csv", "progress.jsonl", "log.txt", "status.json")


class Mirror:
    """Copies of one run below `path`. UserError in one line when the other place fails."""

    def __init__(self, path: str | os.PathLike, run_dir: str | os.PathLike):
        self.path = os.fspath(path).rstrip("/")
        self.run_dir = Path(run_dir)

    def push(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint and the logs as they are now."""
        there = f"{self.path}/checkpoints/{checkpoint.name}"
        names = sorted(file.name for file in checkpoint.iterdir() if file.name != MANIFEST)
        self._make(there)
        for name in (*names, MANIFEST):
            self._copy(checkpoint / name, f"{there}/{name}")
        self.push_logs()

    def push_logs(self) -> None:
        """Copy the small files of the run directory."""
        self._make(self.path)
        for name in LOGS:
            if (self.run_dir / name).is_file():
                self._copy(self.run_dir / name, f"{self.path}/{name}")

    def pull(self) -> Path | None:
        """Bring the newest undamaged checkpoint to a run directory that has none; None when there is none there."""
        folder = f"{self.path}/checkpoints"
        if complete_checkpoints(self.run_dir) or not self._guarded(lambda: blob.isdir(folder)):
            return None
        names = [name for name in self._guarded(lambda: blob.list_files(folder)) if name.startswith("step_")]
        for name in sorted(names, key=lambda name: (len(name), name), reverse=True):
            if fetched := self._fetch(f"{folder}/{name}", self.run_dir / "checkpoints" / name):
                return fetched
        return None

    def _fetch(self, source: str, target: Path) -> Path | None:
        temporary = target.with_name(f".tmp_{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in self._guarded(lambda: blob.list_files(source)):
            self._copy(f"{source}/{name}", temporary / name)
        try:
            verify_checkpoint(temporary)
        except UserError:  # copied half-way
            return None
        for name in LOGS:
            if self._guarded(lambda there=f"{self.path}/{name}": blob.exists(there)):
                self._copy(f"{self.path}/{name}", self.run_dir / name)
        os.rename(temporary, target)
        return target

    def _make(self, folder: str) -> None:
        self._guarded(lambda: blob.makedirs(folder))

    def _copy(self, source: str | os.PathLike, target: str | os.PathLike) -> None:
        def copy() -> None:
            with blob.open_file(source, "rb") as file:
                blob.write_atomic(target, lambda out: shutil.copyfileobj(file, out, 1 << 20))

        self._guarded(copy)

    def _guarded(self, action: Callable[[], T]) -> T:
        """Run an action; blobfile raises errors of its own when a bucket cannot be reached."""
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            cause = str(error).strip().splitlines() or [""]
            raise UserError(f"--mirror {self.path}: {type(error).__name__}: {cause[0][:200]}") from error
