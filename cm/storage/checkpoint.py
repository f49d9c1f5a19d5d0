"""Files of weights and checkpoint directories: written atomically, read without running code.

A weights file is a torch zip whose content is a plain, flat state dict, so that any PyTorch code loads it; the
resolved configuration travels in one more member of the same zip. Torch's zip was chosen over safetensors because the
released checkpoints and the names that other code looks for (`model000123.pt`) are in this format.

A checkpoint is one directory per step, `checkpoints/step_000123/`, written under a temporary name and renamed when
its manifest (sizes and hashes, written last) is on disk. A directory without a manifest is not a checkpoint.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm.errors import UserError

META_MEMBER = "extra/cm.json"
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_DIR = re.compile(r"step_(\d+)$")
_PLAIN_NAME = re.compile(r"\w[\w.+-]*")


class Damaged(UserError):
    """A file is not what was written."""


def save_weights(path: str | os.PathLike, state_dict: dict[str, Tensor], meta: dict | None = None) -> None:
    """Write a flat state dict (any nesting of tensors and plain values) and JSON meta to one file, atomically.

    Tensors are moved to the CPU and made contiguous. The parent directory must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Through Python's file: torch's own would hide the cause of a failed write (disk full, quota).
        with open(temporary, "wb") as file:
            torch.save(map_tensors(state_dict, _to_cpu), file)
        if meta is not None:
            with zipfile.ZipFile(temporary, "a") as archive:
                root = archive.namelist()[0].split("/")[0]
                archive.writestr(f"{root}/{META_MEMBER}", json.dumps(meta))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        raise _storage_error(error) or error from None
    finally:
        temporary.unlink(missing_ok=True)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples with `function` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, function) for v in value)
    return value


def _to_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # A view of a larger storage would write all of it.
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _storage_error(error: BaseException | None) -> OSError | None:
    """The failed write that torch's zip writer met, from the chain of its exceptions."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def load_weights(
    path: str | os.PathLike, map_location: str | torch.device = "cpu"
) -> tuple[dict, dict | None]:
    """(state dict, meta or None) of a weights file, local or remote; never runs code from it.

    UserError in one line when the file is missing, damaged, or holds anything but tensors and plain values.
    """
    from cm.storage.filesystem import cache_locally

    local = cache_locally(str(path))
    if not os.path.isfile(local):
        raise UserError(f"no such weights file: {path}")
    try:
        _check_zip(local)
        state = torch.load(local, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, or is damaged; it was not loaded ({_first_line(error)})"
        ) from None
    except Exception as error:  # damaged bytes make torch and zipfile raise almost anything
        raise UserError(f"{path} is not a readable weights file ({_first_line(error)})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state, read_meta(local)


def _check_zip(path: str) -> None:
    """Refuse a zip that would unpack to more than its size, or whose bytes do not have the checksums they should."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.filename.startswith("/") or ".." in member.filename.split("/"):
                raise zipfile.BadZipFile(f"its member {member.filename!r} leads out of the file")
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        # torch never compresses. Members that overlap in the file count twice here.
        if not stored or sum(member.file_size for member in members) > os.path.getsize(path):
            raise zipfile.BadZipFile("it would unpack to more than its size, as no file of torch does")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}: the file is damaged")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def read_meta(path: str | os.PathLike) -> dict | None:
    """The JSON that travels in a weights file, without reading its tensors; None for files of other code."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/" + META_MEMBER):
                return _parse_object(archive.read(name), f"{path}: its member {META_MEMBER}")
    return None


def _parse_object(text: bytes, source: str) -> dict:
    """The JSON object in a text; Damaged names the source."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{source} is not JSON ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{source} must hold one JSON object, not a {type(content).__name__}")
    return content


def file_sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_matching(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """UserError that names the first differing tensors when a state dict does not fit a module exactly."""
    expected = {name: _describe(t) for name, t in module.state_dict().items()}
    given = {name: _describe(t) for name, t in state.items() if isinstance(t, Tensor)}
    wrong = [
        f"{n}: {given[n]} in the file, {s} in the model" for n, s in expected.items() if given.get(n, s) != s
    ]
    missing = [f"{n}: missing in the file" for n in expected if n not in given]
    extra = [f"{n}: not in the model" for n in state if n not in expected]
    problems = wrong + missing + extra
    if problems:
        raise UserError(
            f"{source} does not fit the model: {'; '.join(problems[:3])}"
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        )


def _describe(tensor: Tensor) -> str:
    """Shape, and the type where it is not a floating-point one: half precision may stand in for single."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} {tensor.dtype}"


def step_directory(run_dir: str | os.PathLike, step: int) -> Path:
    """Directory of the checkpoint after `step` steps."""
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def write_checkpoint(
    run_dir: str | os.PathLike, step: int, files: dict[str, dict[str, Tensor]], state: dict, meta: dict
) -> Path:
    """Write one checkpoint directory: weights files by name, `state` and `meta` as JSON, and the manifest last.

    An interrupted write leaves only a directory with a temporary name, which the next write removes. OSError when
    the storage fails; whatever was complete before is so still.
    """
    final = step_directory(run_dir, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".tmp_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.parent / f".tmp_{final.name}"
    temporary.mkdir()
    try:
        for name, content in files.items():
            save_weights(temporary / name, content, meta)
        _write_json(temporary / STATE, {**state, **meta})
        manifest = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in (*files, STATE)
        }
        _write_json(temporary / MANIFEST, {"step": step, "files": manifest})
        _sync_directory(temporary)
        if final.exists():
            os.rename(final, final.parent / f".tmp_replaced_{final.name}")
        os.rename(temporary, final)
        _sync_directory(final.parent)
        shutil.rmtree(final.parent / f".tmp_replaced_{final.name}", ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_json(path: Path, content: dict) -> None:
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot: their renames are durable or not, whatever we do.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def checkpoint_directories(run_dir: str | os.PathLike) -> list[Path]:
    """All checkpoint directories of a run, complete or not, oldest first."""
    found = [path for path in Path(run_dir, "checkpoints").glob("step_*") if _STEP_DIR.search(path.name)]
    return sorted(found, key=_step_of)


def complete_checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint directories of a run whose manifest is present and sizes agree, oldest first."""
    return [path for path in checkpoint_directories(run_dir) if is_complete(path)]


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
    return parse_manifest((path / MANIFEST).read_bytes(), str(path / MANIFEST))


def parse_manifest(text: bytes, source: str) -> dict[str, dict]:
    """File name -> {"bytes", "sha256"} of a manifest's content; Damaged names the source when it is none."""
    files = _parse_object(text, source).get("files")
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
        _parse_object((path / STATE).read_bytes(), str(path / STATE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_state(path: Path) -> dict:
    """The JSON state of a checkpoint directory: step, loss scale, configuration, versions."""
    try:
        return _parse_object((path / STATE).read_bytes(), str(path / STATE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def prune_checkpoints(run_dir: str | os.PathLike, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest keep_last checkpoints and those whose step is a multiple of keep_every.

    keep_last 0 keeps all. The newest complete checkpoint is never deleted.
    """
    if keep_last < 1:
        return
    for path in complete_checkpoints(run_dir)[:-keep_last]:
        if not (keep_every and _step_of(path) % keep_every == 0):
            # First the name that makes it a checkpoint, so that no half-deleted one is ever taken for whole.
            doomed = path.with_name(f".tmp_pruned_{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
