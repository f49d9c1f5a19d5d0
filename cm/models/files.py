"""Finding a model on disk: weights files, checkpoint directories, run directories; and what they say of themselves."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cm.config.parsing import parse_weights
from cm.errors import UserError
from cm.runtime import distributed
from cm.storage import filesystem, mirror
from cm.storage.checkpoint import MANIFEST, complete_checkpoints
from cm.storage.filesystem import is_remote
from cm.storage.weights import file_sha256, load_weights, map_tensors

_EMA_FILE = re.compile(r"^ema_(.+)_(\d+)\.pt$")


@dataclass(frozen=True)
class ModelFile:
    """Weights as loaded: the state dict, where it came from, which weights it holds, and the stored configuration."""

    path: str
    kind: str  # raw, target, ema:RATE, or "file" for a file without a checkpoint around it
    state: dict[str, Tensor]
    config: dict | None

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes, for provenance."""
        from cm.storage.filesystem import cache_locally

        return file_sha256(cache_locally(self.path))


def load_model_file(model_path: str, weights: str = "", flag: str = "model_path") -> ModelFile:
    """Load weights from a file, a checkpoint directory or a run directory (its newest complete checkpoint).

    weights: raw, ema:RATE, target; empty takes the slowest average of a directory.
    """
    return _read(*_locate(model_path, weights, flag))


def load_on_main(model_path: str, weights: str = "", flag: str = "model_path") -> ModelFile:
    """As load_model_file, but only rank 0 reads the file; the others get its tensors without values (device meta)."""
    path, kind = _locate(model_path, weights, flag)
    read: list[ModelFile] = []

    def shapes() -> ModelFile:
        read.append(_read(path, kind))
        return replace(read[0], state=map_tensors(read[0].state, lambda tensor: tensor.to("meta")))

    outline = distributed.on_main(shapes)
    return read[0] if read else outline


def _locate(model_path: str, weights: str, flag: str) -> tuple[str, str]:
    """Path of a weights file, and which weights it holds. All ranks must call it."""
    if not model_path:
        raise UserError(f"--{flag} is needed")
    if is_remote(model_path) and (
        found := distributed.on_main(lambda: _remote_weights(model_path, weights, flag))
    ):
        return found
    if is_remote(model_path) or os.path.isfile(model_path):
        if weights:
            raise UserError(
                f"--weights {weights} chooses within a run directory; --{flag} {model_path} is one file"
            )
        return model_path, _kind_of(Path(model_path).name)
    if os.path.isdir(model_path):
        # A run that is still training may save in between: all ranks take what rank 0 finds.
        directory = Path(model_path)
        path, kind = distributed.on_main(lambda: find_weights(_checkpoint_in(directory, flag), weights))
        return str(path), kind
    raise UserError(f"--{flag} {model_path}: no such file or directory")


def _read(path: str, kind: str) -> ModelFile:
    state, meta = load_weights(path)
    return ModelFile(path, kind, state, (meta or {}).get("config"))


def _remote_weights(path: str, weights: str, flag: str) -> tuple[str, str] | None:
    """(path, kind) of the wanted weights of a remote run or checkpoint directory; None when `path` is no folder.

    This node's copy is fetched and compared with the hash that the checkpoint's manifest has.
    """
    if not filesystem.isdir(path):
        return None
    checkpoint, files = mirror.newest_checkpoint(path, flag)
    name, kind = choose_weights(files, weights, checkpoint)
    mirror.verified_copy(f"{checkpoint}/{name}", files[name]["sha256"])
    return f"{checkpoint}/{name}", kind


def _checkpoint_in(directory: Path, flag: str) -> Path:
    if (directory / MANIFEST).is_file():
        return directory
    found = complete_checkpoints(directory)
    if not found:
        raise UserError(f"--{flag} {directory} holds no complete checkpoint")
    return found[-1]


def _kind_of(name: str) -> str:
    if match := _EMA_FILE.match(name):
        return f"ema:{match[1]}"
    if name.startswith("target_model"):
        return "target"
    return "raw" if re.match(r"^model\d+\.pt$", name) else "file"


def find_weights(checkpoint: Path, weights: str) -> tuple[Path, str]:
    """(file, kind) of the wanted weights in a checkpoint directory; empty: the slowest average, else raw."""
    name, kind = choose_weights((path.name for path in checkpoint.glob("*.pt")), weights, str(checkpoint))
    return checkpoint / name, kind


def choose_weights(names: Iterable[str], weights: str, checkpoint: str) -> tuple[str, str]:
    """As `find_weights`, among the names of a checkpoint's files."""
    available = {_kind_of(name): name for name in sorted(names)}
    available.pop("file", None)
    averages = {kind: float(kind[4:]) for kind in available if kind.startswith("ema:")}
    wanted, rate = parse_weights(weights)
    if wanted == "ema":
        kind = next((k for k, value in averages.items() if value == rate), weights)
    else:
        kind = wanted or (max(averages, key=averages.get) if averages else "raw")
    if kind not in available:
        raise UserError(
            f"--weights {weights or kind}: {checkpoint} has {', '.join(sorted(available)) or 'no weights'}"
        )
    return available[kind], kind
