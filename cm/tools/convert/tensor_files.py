"""Safetensors files, with our JSON meta in their header."""

import json
import os
from pathlib import Path

from torch import Tensor

from cm.errors import UserError, extra
from cm.runtime.files import draft_folder
from cm.runtime.inputs import check_regular, open_regular, parse_json

META = "cm"


def _library():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f"safetensors files need the package safetensors: {extra('safetensors')}") from None
    return safetensors


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict | None]:
    """(tensors, meta or None) of a safetensors file; UserError when it is damaged."""
    library = _library()
    check_regular(path)
    try:
        with library.safe_open(str(path), framework="pt") as file:
            meta = (file.metadata() or {}).get(META)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, meta and parse_json(meta, f"{path}: {META} in its header")
    except UserError:
        raise
    except (OSError, ValueError, library.SafetensorError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is not a readable safetensors file ({first[:120]})") from None


def write_safetensors(path: str | Path, state: dict[str, Tensor], meta: dict | None = None) -> None:
    """Write tensors and JSON meta to one file, which is there when it is whole."""
    library, path = _library(), Path(path)
    header = {"format": "pt"} | ({META: json.dumps(meta)} if meta else {})
    try:
        tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
        with draft_folder(path) as folder:  # the library writes under a name of its own first
            library.torch.save_file(tensors, folder / path.name, header)
            os.replace(folder / path.name, path)
    except library.SafetensorError as error:  # a full disk, too
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0][:200]}") from error


def is_safetensors(path: str | Path) -> bool:
    """Whether a file starts like one: the length of a JSON header, then the header."""
    with open_regular(path) as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32
