"""Files of weights and checkpoint directories: written atomically, read without running code.

A weights file is a torch zip whose content is a plain, flat state dict, so that any PyTorch code loads it; the
resolved configuration travels in one more member of the same zip. Torch's zip was chosen over safetensors because the
released checkpoints and the names that other code looks for (`model000123.pt`) are in this format.

A checkpoint is one directory per step, `checkpoints/step_000123/`, written under a temporary name and renamed when
its manifest (sizes and hashes, written last) is on disk. A directory without a manifest is not a checkpoint.
"""

import json
import os
import re
import shutil
from pathlib import Path

from torch import Tensor

from cm.errors import UserError
from cm.runtime.files import sync_folder, whole_file
from cm.runtime.inputs import JSON_LIMIT, listed, read_regular
from cm.storage.posthoc import keep_snapshots
from cm.storage.weights import Damaged, file_sha256, parse_object, save_weights

MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_DIR = re.compile(r"step_(\d+)$")
_PLAIN_NAME = re.compile(r"\w[\w.+-]*")


def step_directory(run_dir: str | os.PathLike, step: int) -> Path:
    """Directory of the checkpoint after `step` steps."""
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def begin_checkpoint(run_dir: str | os.PathLike, step: int) -> Path:
    """The empty directory, under a temporary name, in which a checkpoint is made; what others left goes away."""
    final = step_directory(run_dir, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".tmp_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.parent / f".tmp_{final.name}"
    temporary.mkdir()
    return temporary


def write_checkpoint(
    run_dir: str | os.PathLike,
    step: int,
    files: dict[str, dict[str, Tensor]],
    state: dict,
    meta: dict,
    begun: Path | None = None,
) -> Path:
    """Write one checkpoint directory: weights files by name, `state` and `meta` as JSON, and the manifest last.

    begun: of `begin_checkpoint`, where other files, such as shards, are there already. An interrupted write leaves only
    a directory with a temporary name, which the next write removes. OSError when the storage fails; whatever was
    complete before is so still.
    """
    final = step_directory(run_dir, step)
    temporary = begun or begin_checkpoint(run_dir, step)
    there = sorted(path.name for path in temporary.iterdir())
    try:
        for name, content in files.items():
            save_weights(temporary / name, content, meta)
        _write_json(temporary / STATE, {**state, **meta})
        manifest = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in (*there, *files, STATE)
        }
        _write_json(temporary / MANIFEST, {"step": step, "files": manifest})
        if final.exists():
            os.rename(final, final.parent / f".tmp_replaced_{final.name}")
        os.rename(temporary, final)
        sync_folder(final.parent)
        shutil.rmtree(final.parent / f".tmp_replaced_{final.name}", ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_json(path: Path, content: dict) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def checkpoint_directories(run_dir: str | os.PathLike) -> list[Path]:
    """All checkpoint directories of a run, complete or not, oldest first."""
    found = listed(Path(run_dir, "checkpoints"), "step_*")
    return sorted((path for path in found if _STEP_DIR.search(path.name)), key=_step_of)


def complete_checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint directories of a run whose manifest is present and sizes agree, oldest first."""
    return [path for path in checkpoint_directories(run_dir) if is_complete(path)]


def newest_checkpoint(path: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run directory, or `path` itself where it is a checkpoint directory."""
    if Path(path, MANIFEST).is_file():
        return Path(path)
    return next(reversed(complete_checkpoints(path)), None)


def _step_of(path: Path) -> int:
    return int(_STEP_DIR.search(path.name)[1])


def is_complete(path: Path) -> bool:
    """Whether a checkpoint directory has its manifest, and all files with their sizes; UserError if nobody can tell."""
    try:
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in _manifest(path).items())
    except (FileNotFoundError, NotADirectoryError, Damaged):
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _manifest(path: Path) -> dict[str, dict]:
    """File name -> {"bytes", "sha256"} of a checkpoint directory; Damaged when it is not what we write."""
    return parse_manifest(read_regular(path / MANIFEST, JSON_LIMIT), str(path / MANIFEST))


def parse_manifest(text: bytes, source: str) -> dict[str, dict]:
    """File name -> {"bytes", "sha256"} of a manifest's content; Damaged names the source when it is none."""
    files = parse_object(text, source).get("files")
    if not isinstance(files, dict) or not files:
        raise Damaged(f"{source} lists no files")
    for name, entry in files.items():
        # Names are those of files in this directory: none may lead out of it.
        if not _PLAIN_NAME.fullmatch(name):
            raise Damaged(f"{source} lists {name!r}, which is no plain file name")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise Damaged(f"{source} says nothing of size and hash of {name}")
    return files


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest's hash; Damaged names the first one that differs."""
    if not is_complete(path):
        raise Damaged(f"{path} is incomplete: no manifest, or a file that is missing or has another size")
    try:
        for name, entry in _manifest(path).items():
            if file_sha256(path / name) != entry["sha256"]:
                raise Damaged(f"{path / name} is damaged: its hash differs from the checkpoint's manifest")
        parse_object(read_regular(path / STATE, JSON_LIMIT), str(path / STATE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_state(path: Path) -> dict:
    """The JSON state of a checkpoint directory: step, loss scale, configuration, versions."""
    try:
        return parse_object(read_regular(path / STATE, JSON_LIMIT), str(path / STATE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def prune_checkpoints(run_dir: str | os.PathLike, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest keep_last checkpoints and those whose step is a multiple of keep_every.

    keep_last 0 keeps all. The newest complete checkpoint is never deleted. Snapshots of averages stay, in RUN/posthoc.
    """
    if keep_last < 1:
        return
    for path in complete_checkpoints(run_dir)[:-keep_last]:
        if not (keep_every and _step_of(path) % keep_every == 0):
            keep_snapshots(path, run_dir)
            # First the name that makes it a checkpoint, so that no half-deleted one is ever taken for whole.
            doomed = path.with_name(f".tmp_pruned_{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
