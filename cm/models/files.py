"""Finding a model on disk: weights files, checkpoint directories, run directories; and what they say of themselves."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cm.config.parsing import parse_weights
from cm.config.stored import checked
from cm.errors import UserError
from cm.models.wrappers import require_flat
from cm.runtime import distributed
from cm.runtime.inputs import listed, read_json
from cm.storage import filesystem, mirror, posthoc
from cm.storage.checkpoint import newest_checkpoint
from cm.storage.filesystem import cache_locally, is_remote
from cm.storage.shards import INDEX, load_part, names_of, read_index
from cm.storage.weights import file_sha256, map_tensors, tensors_sha256, without_loss

_EMA_FILE = re.compile(r"^ema_(.+)_(\d+)\.pt$")


@dataclass(frozen=True)
class ModelFile:
    """Weights as loaded: the state dict, where it came from, which weights it holds, and the stored configuration."""

    path: str
    kind: str  # raw, target, ema:RATE, posthoc:LENGTH, or "file" for a file without a checkpoint around it
    state: dict[str, Tensor]
    config: dict | None

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes, for provenance."""
        if _is_posthoc(self.kind):
            return posthoc.fingerprint(*_average(self.path, self.kind))
        if not is_remote(self.path) and not os.path.exists(self.path):  # put together from shards
            return tensors_sha256(self.state)
        return file_sha256(cache_locally(self.path))


def load_model_file(model_path: str, weights: str = "", flag: str = "model_path") -> ModelFile:
    """Load weights from a file, a checkpoint directory or a run directory (its newest complete checkpoint).

    weights: raw, ema:RATE, posthoc:LENGTH, target; empty takes the slowest average of a directory.
    """
    return _read(*find_model_file(model_path, weights, flag))


def load_on_main(model_path: str, weights: str = "", flag: str = "model_path") -> ModelFile:
    """As load_model_file, but only rank 0 reads the file; the others get its tensors without values (device meta)."""
    path, kind = find_model_file(model_path, weights, flag)
    read: list[ModelFile] = []

    def shapes() -> ModelFile:
        read.append(_read(path, kind))
        return replace(read[0], state=map_tensors(read[0].state, lambda tensor: tensor.to("meta")))

    outline = distributed.on_main(shapes)
    return read[0] if read else outline


def find_model_file(model_path: str, weights: str = "", flag: str = "model_path") -> tuple[str, str]:
    """(path of a weights file, which weights it holds), as rank 0 finds it. All ranks must call it.

    A run that is still training may save in between.
    """
    if not model_path:
        raise UserError(f"--{flag} is needed")
    find = _find_in_bucket if is_remote(model_path) else _find_on_disk
    return distributed.on_main(lambda: find(model_path, weights, flag))


def _find_on_disk(path: str, weights: str, flag: str) -> tuple[str, str]:
    if os.path.isfile(path):
        return _single_file(path, weights, flag)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such file or directory (--{flag})")
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} holds no complete checkpoint (--{flag})")
    if _is_posthoc(weights):
        return str(checkpoint), weights  # it has no file of its own
    names = (*(file.name for file in listed(checkpoint, "*.pt")), *names_of(read_index(checkpoint)))
    name, kind = choose_weights(names, weights, str(checkpoint))
    return str(checkpoint / name), kind


def _find_in_bucket(path: str, weights: str, flag: str) -> tuple[str, str]:
    """Of a directory, this node's copy of the file is fetched and compared with the hash in the manifest."""
    if not filesystem.isdir(path):
        return _single_file(path, weights, flag)
    checkpoint, files = mirror.newest_checkpoint(path, flag)
    if INDEX in files:
        raise UserError(
            f"{checkpoint} holds the shards of several ranks: copy the run to this machine (--{flag})"
        )
    name, kind = choose_weights(files, weights, checkpoint)
    mirror.verified_copy(f"{checkpoint}/{name}", files[name]["sha256"])
    return f"{checkpoint}/{name}", kind


def searched_points(model_path: str) -> str:
    """The time points of multistep sampling that `cm search RUN` found, as --ts; empty where it was not run."""
    place = Path(model_path, "search", "search_result.json")
    if is_remote(model_path) or not place.is_file():
        return ""
    ts = read_json(place).get("ts")
    return ",".join(map(str, ts)) if isinstance(ts, list) and all(type(t) is int for t in ts) else ""


def _single_file(path: str, weights: str, flag: str) -> tuple[str, str]:
    if weights:
        raise UserError(
            f"{path} is one file: there is nothing to choose from (--{flag}, --weights {weights})"
        )
    return path, _kind_of(Path(path).name)


def _is_posthoc(weights: str) -> bool:
    return weights.startswith("posthoc:")


def _average(checkpoint: str, kind: str) -> tuple[Path, float, int]:
    """(run directory, relative length, step) of an average that is made of the snapshots up to a checkpoint."""
    path = Path(checkpoint)
    return path.parent.parent, parse_weights(kind)[1], int(path.name.rpartition("_")[2])


def _read(path: str, kind: str) -> ModelFile:
    if _is_posthoc(kind):
        state, meta, _ = posthoc.reconstruct(*_average(path, kind))
        return ModelFile(path, kind, without_loss(state), _stored(meta, path))
    state, meta = load_part(path)
    config = _stored(meta, path)
    return ModelFile(
        path, kind, require_flat(without_loss(state), path, described=config is not None), config
    )


def _stored(meta: dict | None, path: str) -> dict | None:
    """The configuration that a file describes itself by, checked."""
    stored = (meta or {}).get("config")
    return None if stored is None else checked(stored, path)


def _kind_of(name: str) -> str:
    if match := _EMA_FILE.match(name):
        return f"ema:{match[1]}"
    if name.startswith("target_model"):
        return "target"
    return "raw" if re.match(r"^model\d+\.pt$", name) else "file"


def choose_weights(names: Iterable[str], weights: str, checkpoint: str) -> tuple[str, str]:
    """(file name, kind) of the wanted weights among a checkpoint's files; empty: the slowest average, else raw."""
    if _is_posthoc(weights):
        raise UserError(f"{checkpoint} is remote: copy the run to this machine (--weights {weights})")
    available = {_kind_of(name): name for name in sorted(names)}
    available.pop("file", None)
    averages = {kind: float(kind[4:]) for kind in available if kind.startswith("ema:")}
    wanted, rate = parse_weights(weights)
    if wanted == "ema":
        kind = next((k for k, value in averages.items() if value == rate), weights)
    else:
        kind = wanted or (max(averages, key=averages.get) if averages else "raw")
    if not available:
        raise UserError(f"{checkpoint} holds no weights of a model")
    if kind not in available:
        raise UserError(
            f"{checkpoint} has no {weights or kind}, but {', '.join(sorted(available))} (--weights)"
        )
    return available[kind], kind
