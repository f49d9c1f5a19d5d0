"""Second copies of runs: what --mirror writes, and finding and fetching checkpoints in another place (gs://, az://).

Layout: RUN/checkpoints/step_000123/, whose manifest was written last and has the size and the hash of every file.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from cm.errors import UserError
from cm.runtime.inputs import JSON_LIMIT
from cm.storage import filesystem
from cm.storage.checkpoint import MANIFEST, complete_checkpoints, parse_manifest, verify_checkpoint
from cm.storage.weights import Damaged, file_sha256

_STEP = re.compile(r"step_(\d+)")


def checkpoint_paths(run: str) -> list[str]:
    """All checkpoint directories of a run, complete or not, the newest first."""
    folder = f"{run.rstrip('/')}/checkpoints"
    if not filesystem.isdir(folder):
        return []
    names = [name for name in filesystem.list_files(folder) if _STEP.fullmatch(name)]
    return [f"{folder}/{name}" for name in sorted(names, key=lambda name: int(name[5:]), reverse=True)]


def newest_checkpoint(path: str, flag: str) -> tuple[str, dict[str, dict]]:
    """(path, manifest) of a run's newest checkpoint whose files are all there, or of a checkpoint directory itself."""
    path = path.rstrip("/")
    itself = filesystem.exists(f"{path}/{MANIFEST}")
    for checkpoint in [path] if itself else checkpoint_paths(path):
        if files := _complete_manifest(checkpoint):
            return checkpoint, files
    raise UserError(f"{path} holds no complete checkpoint (--{flag})")


def verified_copy(path: str, sha256: str) -> str:
    """A local copy of a remote file that has this hash; Damaged when it has another."""
    local = filesystem.cache_locally(path)
    if file_sha256(local) != sha256:
        os.unlink(local)  # a second try fetches it anew
        raise Damaged(f"{path} is damaged: its hash differs from the checkpoint's manifest")
    return local


def fetch_to_cache(checkpoint: str, files: dict[str, dict], flag: str) -> Path:
    """A local copy of a remote checkpoint directory in the cache; Damaged when its files are not as in its manifest."""
    content = "\n".join([checkpoint, *(f"{name} {files[name]['sha256']}" for name in sorted(files))])
    key = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]
    target = Path(filesystem.cache_folder(), f"{key}-{checkpoint.rsplit('/', 1)[-1]}")
    with filesystem.locked(target):
        if not target.exists() and fetch(checkpoint, target) is None:
            raise Damaged(f"{checkpoint} is damaged: its files differ from its manifest (--{flag})")
    return target


def fetch(checkpoint: str, target: Path) -> Path | None:
    """Copy a checkpoint directory under a temporary name, verify it, rename it; None when it is not whole."""
    files = _read_manifest(checkpoint)
    if files is None:
        return None
    temporary = target.with_name(f".tmp_{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name in (*files, MANIFEST):
            copy(f"{checkpoint}/{name}", temporary / name)
        verify_checkpoint(temporary)
    except (Damaged, FileNotFoundError):
        shutil.rmtree(temporary)
        return None
    os.rename(temporary, target)
    return target


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy one file between any two places, wholly or not at all."""
    with filesystem.reaching(source), filesystem.open_file(source, "rb") as file:
        filesystem.write_atomic(target, lambda out: shutil.copyfileobj(file, out, 1 << 20))


def _read_manifest(checkpoint: str) -> dict[str, dict] | None:
    source = f"{checkpoint}/{MANIFEST}"
    try:
        with filesystem.reaching(source), filesystem.open_file(source, "rb") as file:
            return parse_manifest(file.read(JSON_LIMIT), source)
    except (Damaged, FileNotFoundError):
        return None


def _complete_manifest(checkpoint: str) -> dict[str, dict] | None:
    """The manifest, when it is there and all files have the sizes that it says; else None."""
    files = _read_manifest(checkpoint)
    try:
        whole = files and all(
            filesystem.size(f"{checkpoint}/{name}") == f["bytes"] for name, f in files.items()
        )
    except FileNotFoundError:
        return None
    return files if whole else None


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
        with filesystem.reaching(self.path):
            filesystem.makedirs(there)
            for name in (*names, MANIFEST):
                copy(checkpoint / name, f"{there}/{name}")
        self.push_logs()

    def catch_up(self) -> None:
        """Copy the run's newest complete checkpoint unless it is there: its copy may have been cut off."""
        if own := complete_checkpoints(self.run_dir)[-1:]:
            there = f"{self.path}/checkpoints/{own[0].name}"
            with filesystem.reaching(self.path):
                known = _complete_manifest(there)
            if known != _read_manifest(str(own[0])):
                self.push(own[0])

    def push_logs(self) -> None:
        """Copy the small files of the run directory."""
        with filesystem.reaching(self.path):
            filesystem.makedirs(self.path)
            for name in LOGS:
                if (self.run_dir / name).is_file():
                    copy(self.run_dir / name, f"{self.path}/{name}")

    def pull(self) -> Path | None:
        """Bring the newest undamaged checkpoint to a run directory that has none; None when there is none there."""
        if complete_checkpoints(self.run_dir):
            return None
        with filesystem.reaching(self.path):
            for source in checkpoint_paths(self.path):
                target = self.run_dir / "checkpoints" / source.rsplit("/", 1)[-1]
                if fetch(source, target):
                    self._pull_logs(target)
                    return target
        return None

    def _pull_logs(self, checkpoint: Path) -> None:
        try:
            for name in LOGS:
                if filesystem.exists(f"{self.path}/{name}"):
                    copy(f"{self.path}/{name}", self.run_dir / name)
        except (OSError, UserError):
            shutil.rmtree(checkpoint)  # the next start fetches all again
            raise
