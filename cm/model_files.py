"""Finding a model on disk: weights files, checkpoint directories, run directories; and what they say of themselves."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cm import dist_util
from cm.blob import is_remote
from cm.checkpoint import MANIFEST, complete_checkpoints, file_sha256, load_weights
from cm.errors import UserError
from cm.parsing import parse_weights

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
        from cm.blob import cache_locally

        return file_sha256(cache_locally(self.path))


def load_model_file(model_path: str, weights: str = "", flag: str = "model_path") -> ModelFile:
    """Load weights from a file, a checkpoint directory or a run directory (its newest complete checkpoint).

    weights: raw, ema:RATE, target; empty takes the slowest average of a directory.
    """
    if not model_path:
        raise UserError(f"--{flag} is needed")
    if is_remote(model_path) or os.path.isfile(model_path):
        if weights:
            raise UserError(
                f"--weights {weights} chooses within a run directory; --{flag} {model_path} is one file"
            )
        path, kind = model_path, _kind_of(Path(model_path).name)
    elif os.path.isdir(model_path):
        # A run that is still training may save in between: all ranks take what rank 0 finds.
        directory = Path(model_path)
        path, kind = dist_util.on_main(lambda: find_weights(_checkpoint_in(directory, flag), weights))
    else:
        raise UserError(f"--{flag} {model_path}: no such file or directory")
    state, meta = load_weights(path)
    return ModelFile(str(path), kind, state, (meta or {}).get("config"))


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
    available = {_kind_of(p.name): p for p in sorted(checkpoint.glob("*.pt"))}
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
