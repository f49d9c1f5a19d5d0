"""Shards of a checkpoint: what every rank of --shard fsdp wrote of its own part, by torch.distributed.checkpoint.

They stand for the files of weights that they were saved in the place of: a tensor is called FILE/NAME, so that a reader
who asks for the file gets it, put together from the parts. torch keeps its index as a pickle; here it is JSON, and
nothing that was saved can run code.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.files import whole_file
from cm.runtime.inputs import JSON_LIMIT, read_regular
from cm.storage.checkpoint import STATE
from cm.storage.filesystem import is_remote
from cm.storage.weights import Damaged, load_weights, parse_object

INDEX = "shards.json"
PICKLED = ".metadata"  # torch's index
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
}


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's part of tensors, distributed or the same on all ranks, into a folder that exists.

    All ranks must call it; UserError on all of them where one cannot write.
    """
    from cm.storage.pieces import described, write_pieces

    saved = write_pieces(folder, tensors)
    if distributed.is_main():
        with whole_file(folder / INDEX) as file:
            file.write(json.dumps(described(saved)).encode())
        (folder / PICKLED).unlink()


def read_index(folder: Path) -> dict[str, Any]:
    """What the shards of a checkpoint hold: FILE/NAME -> dtype, size, pieces; {} where there are none. Damaged if bad.

    Each piece has at least as many bytes in a file of the folder as its numbers take.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = parse_object(read_regular(path, JSON_LIMIT), str(path))
    files = {name: os.path.getsize(folder / name) for name in os.listdir(folder)}
    for name, entry in index.items():
        try:
            width, size = DTYPES[entry["dtype"]].itemsize, [_count(n) for n in entry["size"]]
            values = 0
            for begin, extent, file, offset, length in entry["pieces"]:
                held = math.prod(_count(n) for n in extent)
                inside = len(begin) == len(size) == len(extent) and all(
                    _count(b) + e <= s for b, e, s in zip(begin, extent, size)
                )
                if not inside or _count(offset) + _count(length) > files[file] or held * width > length:
                    raise ValueError("a piece lies outside")
                values += held
            if values != math.prod(size):
                raise ValueError("pieces are missing")
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path} is no index of shards: {name[:80]} ({error})") from None
    return index


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:20]!r} is no count")
    return value


def load_shards(
    folder: Path, tensors: Mapping[str, Tensor], index: Mapping[str, Any], **options: Any
) -> None:
    """Fill tensors, distributed or whole, from the shards of a checkpoint, whatever the number of ranks that saved.

    All ranks must call it; with no_dist=True this process alone. UserError where they do not fit.
    """
    for name, tensor in tensors.items():
        if name not in index or list(tensor.shape) != index[name]["size"]:
            there = f"has shape {tuple(index[name]['size'])}" if name in index else "is missing"
            raise UserError(f"{folder}: {name} {there}, the run has shape {tuple(tensor.shape)}")
    from cm.storage.pieces import read_pieces

    read_pieces(folder, tensors, index, **options)


def names_of(index: Mapping[str, Any]) -> list[str]:
    """Names of the files that the shards of a checkpoint stand for."""
    return sorted({name.partition("/")[0] for name in index})


def load_part(path: str | os.PathLike) -> tuple[dict, dict | None]:
    """(content, meta) of a file of a checkpoint: of the file itself, or put together from the shards in its place.

    The state of an optimizer comes back as {"state": {parameter number: moments}}.
    """
    if is_remote(str(path)) or os.path.isfile(path):
        return load_weights(path)
    path = Path(path)
    index = read_index(path.parent)
    wanted = {name: entry for name, entry in index.items() if name.startswith(f"{path.name}/")}
    if not wanted:
        return load_weights(path)  # which says what is wrong
    tensors = {name: torch.empty(e["size"], dtype=DTYPES[e["dtype"]]) for name, e in wanted.items()}
    load_shards(path.parent, tensors, index, no_dist=True)
    content = {name.partition("/")[2]: tensor for name, tensor in tensors.items()}
    if path.name.startswith("opt"):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in content.items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        content = {"state": state}
    return content, parse_object(read_regular(path.parent / STATE, JSON_LIMIT), str(path.parent / STATE))
