"""Files of weights: plain state dicts in torch's zip, written wholly or not at all, read without running code.

The content is a flat state dict, so that any PyTorch code loads it; the resolved configuration travels in one more
member of the same zip. Torch's zip was chosen over safetensors because the released checkpoints and the names that
other code looks for (`model000123.pt`) are in this format.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cm.errors import UserError
from cm.runtime.files import whole_file
from cm.runtime.inputs import open_regular, parse_json
from cm.storage.filesystem import cache_locally
from cm.storage.torch_format import check_size, read_torch
from cm.storage.unpickle import Refused

META_MEMBER = "extra/cm.json"


class Damaged(UserError):
    """A file is not what was written."""


def save_weights(path: str | os.PathLike, state_dict: dict[str, Tensor], meta: dict | None = None) -> None:
    """Write a flat state dict (any nesting of tensors and plain values) and JSON meta to one file, atomically.

    Tensors are moved to the CPU and made contiguous. The parent directory must exist.
    """
    with whole_file(path) as file:
        try:
            # Through Python's file: torch's own would hide the cause of a failed write (disk full, quota).
            torch.save(map_tensors(state_dict, _to_cpu), file)
        except RuntimeError as error:
            raise _storage_error(error) or error from None
        if meta is not None:
            with zipfile.ZipFile(file, "a") as archive:
                root = archive.namelist()[0].split("/")[0]
                archive.writestr(f"{root}/{META_MEMBER}", json.dumps(meta))


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
    local = cache_locally(str(path))
    if not os.path.isfile(local):
        raise UserError(f"no such weights file: {path}")
    try:
        state = read_torch(local)
        check_size(state, os.path.getsize(local), "it")
        state = map_tensors(state, lambda tensor: tensor.to(map_location))
    except Refused as error:
        # Of NVIDIA's EDM and EDM2, whose models are read by a reader of their own.
        hint = "; cm convert makes a model of it" if "torch_utils.persistence" in str(error) else ""
        raise UserError(
            f"{path} holds more than tensors and plain values; it was not loaded ({error}){hint}"
        ) from None
    except UserError:
        raise
    except Exception as error:  # damaged bytes make pickle, zipfile and torch raise almost anything
        raise UserError(f"{path} is not a readable weights file ({_first_line(error)})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state, read_meta(local)


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
                return parse_object(archive.read(name), f"{path}: its member {META_MEMBER}")
    return None


def parse_object(text: bytes, source: str) -> dict:
    """The JSON object in a text; Damaged names the source."""
    try:
        return parse_json(text, source)
    except UserError as error:
        raise Damaged(str(error)) from None


def file_sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Submodule of a student that belongs to its loss: in checkpoints, but no part of the model
LOSS_MODULE = "loss_weight"


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values: the same for two files that hold the same weights in different layouts."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def without_loss(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that make images."""
    return {name: t for name, t in state.items() if not str(name).startswith(f"{LOSS_MODULE}.")}


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
