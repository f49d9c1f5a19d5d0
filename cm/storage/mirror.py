"""A second copy of a run in another place, local or remote (gs://, az://): it survives the machine.

Checkpoints are copied when they are complete, the manifest last, so that the copy has complete checkpoints only. Old
ones are not deleted there.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cm.errors import UserError
from cm.storage import filesystem, remote_runs
from cm.storage.checkpoint import MANIFEST, complete_checkpoints

T = TypeVar("T")
LOGS = ("config.json", "progress.csv", "progress.jsonl", "log.txt", "status.json")


class Mirror:
    """Copies of one run below `path`. UserError in one line when the other place fails."""

    def __init__(self, path: str | os.PathLike, run_dir: str | os.PathLike):
        self.path = os.fspath(path).rstrip("/")
        self.run_dir = Path(run_dir)

    def push(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint and the logs as they are now; hours of training wait for a slow storage."""
        filesystem.be_patient(self.path)
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
        if complete_checkpoints(self.run_dir):
            return None
        for source in self._guarded(lambda: remote_runs.checkpoint_paths(self.path)):
            target = self.run_dir / "checkpoints" / source.rsplit("/", 1)[-1]
            if self._guarded(lambda source=source, target=target: remote_runs.fetch(source, target)):
                self._pull_logs(target)
                return target
        return None

    def _pull_logs(self, checkpoint: Path) -> None:
        try:
            for name in LOGS:
                if self._guarded(lambda there=f"{self.path}/{name}": filesystem.exists(there)):
                    self._copy(f"{self.path}/{name}", self.run_dir / name)
        except UserError:
            shutil.rmtree(checkpoint)  # the next start fetches all again
            raise

    def _make(self, folder: str) -> None:
        self._guarded(lambda: filesystem.makedirs(folder))

    def _copy(self, source: str | os.PathLike, target: str | os.PathLike) -> None:
        self._guarded(lambda: remote_runs.copy(source, target))

    def _guarded(self, action: Callable[[], T]) -> T:
        """Run an action; blobfile raises errors of its own when a bucket cannot be reached."""
        try:
            return action()
        except filesystem.Unreachable as error:
            raise UserError(f"--mirror {self.path}: {filesystem.describe(error.__cause__)}") from error
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--mirror {self.path}: {filesystem.describe(error)}") from error
